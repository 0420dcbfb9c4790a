// What every family needs on both backends: dtypes, argument checks, memory layouts.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#define MNIST_OPS_HD __host__ __device__ __forceinline__
#else
#define MNIST_OPS_HD inline __attribute__((always_inline))
#endif

namespace mnist_ops {

// Throws what becomes Python's RuntimeError, with the arguments behind the condition as its message
// and nothing before it: torch's own macro would begin with a function, a file and a line.
#define MNIST_OPS_CHECK(condition, ...)                             \
  do {                                                              \
    if (!(condition)) {                                             \
      throw std::runtime_error(mnist_ops::message_of(__VA_ARGS__)); \
    }                                                               \
  } while (false)

template <typename... Parts>
std::string message_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type a kernel computes in: half types accumulate in float32.
template <typename T>
struct OpMath {
  using type = T;
};
template <>
struct OpMath<Half> {
  using type = float;
};
template <>
struct OpMath<BFloat16> {
  using type = float;
};
template <typename T>
using opmath_t = typename OpMath<T>::type;

inline ScalarType type_to_compute_in(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body with a value of the element type; only the type of that value is used.
template <typename F>
void dispatch_floating(const char* op, ScalarType dtype, F&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      MNIST_OPS_CHECK(false, op, ": expected float64, float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The same for a tensor of a type that is computed in.
template <typename F>
void dispatch_computed(const Tensor& tensor, F&& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  body(float{});
}

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Two arguments of one call that must agree in shape, dtype and device.
inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const char* other_name, const Tensor& other) {
  MNIST_OPS_CHECK(same_shape(tensor, other), op, ": ", name, " must have the shape of ", other_name,
                  ", ", shape_string(other), ", got ", shape_string(tensor));
  MNIST_OPS_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name,
                  " must have the dtype of ", other_name, ", ",
                  torch::headeronly::toString(other.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  MNIST_OPS_CHECK(tensor.device() == other.device(), op, ": ", name, " and ", other_name,
                  " are on different devices");
}

// Whether the channels are innermost in memory. mnist_ops/ops/_common.py repeats this rule for the
// fake kernels: both must say the same for every tensor. Where both layouts are the same memory
// (one channel, or one pixel of unit strides) the answer is no.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.numel() == 0) return false;
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  if (size[1] == 1 || stride[1] != 1) return false;
  int64_t inner = size[1];  // elements below the dimension looked at
  for (const int d : {3, 2, 0}) {
    if (size[d] != 1) {
      if (stride[d] < inner) return false;
      inner = stride[d] * size[d];
    } else if (d != 0 && stride[d] < size[1]) {
      return false;
    }
  }
  return true;
}

// A batch of images: (N, C, H, W), or (C, H, W) as a batch of one, dense in one of two layouts.
struct Images {
  Tensor data;  // dense in the layout named below
  int64_t N, C, H, W;
  bool channels_last;
  bool batched;

  // Distance between neighbours along each dimension.
  int64_t stride_n() const { return C * H * W; }
  int64_t stride_c() const { return channels_last ? 1 : H * W; }
  int64_t stride_h() const { return channels_last ? C * W : W; }
  int64_t stride_w() const { return channels_last ? C : 1; }
};

// -------------------------------------------------------------------------------- new tensors
//
// torch::stable's empty, empty_like, new_empty and contiguous look their operator up by name and go
// through the dispatcher, which costs a small call about a microsecond each. The allocation that
// they end in is a function of the ABI, too, and what is contiguous needs no call at all.

using torch::headeronly::IntHeaderOnlyArrayRef;

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has it without the reason in its message
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// A new tensor on the device of like.
inline Tensor new_strided(const Tensor& like, IntHeaderOnlyArrayRef size,
                          IntHeaderOnlyArrayRef stride, ScalarType dtype) {
  namespace detail = torch::stable::detail;
  const auto device = like.device();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.data(), stride.data(),
      detail::to<int32_t>(detail::from(dtype)), detail::to<int32_t>(detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

// A new contiguous tensor on the device of like.
inline Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size());
  int64_t inner = 1;
  for (size_t d = size.size(); d-- > 0;) {
    stride[d] = inner;
    inner *= std::max<int64_t>(size[d], 1);
  }
  return new_strided(like, size, stride, dtype);
}
inline Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef size) {
  return new_tensor(like, size, like.scalar_type());
}

inline Tensor new_like(const Tensor& like) {
  if (!like.is_contiguous()) return torch::stable::empty_like(like);
  return new_strided(like, like.sizes(), like.strides(), like.scalar_type());
}

// The tensor, whose storage has all of its elements: one can be resized, to nothing by those who
// free memory for a while, and a kernel would read beyond it.
inline const Tensor& in_storage(const Tensor& tensor) {
  if (tensor.numel() == 0) return tensor;
  int64_t last = 0, elements = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &last));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_numel(tensor.get(), &elements));
  const auto size = tensor.sizes(), stride = tensor.strides();
  for (size_t d = 0; d < size.size(); ++d) last += (size[d] - 1) * stride[d];
  MNIST_OPS_CHECK(last < elements, "mnist_ops: a tensor of the shape ", shape_string(tensor),
                  " needs ", last + 1, " elements of its storage, which has ", elements);
  return tensor;
}

inline Tensor contiguous_of(const Tensor& tensor) {
  return in_storage(tensor).is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The tensor, or a contiguous copy that is copied back when it has changed. A tensor that cannot be
// copied to (a leaf that requires grad, overlapping memory) is an error now, not then.
inline Tensor contiguous_to_write(const Tensor& tensor) {
  Tensor contiguous = contiguous_of(tensor), original = tensor;
  if (contiguous.data_ptr() != original.data_ptr()) torch::stable::copy_(original, contiguous);
  return contiguous;
}

// A new tensor for images with the layout and device of others, but another height and width.
inline Tensor empty_images(const Images& like, int64_t H, int64_t W, ScalarType dtype) {
  if (!like.batched) return new_tensor(like.data, {like.C, H, W}, dtype);
  if (!like.channels_last) return new_tensor(like.data, {like.N, like.C, H, W}, dtype);
  return new_strided(like.data, {like.N, like.C, H, W}, {H * W * like.C, 1, W * like.C, like.C},
                     dtype);
}
inline Tensor empty_images(const Images& like, int64_t H, int64_t W) {
  return empty_images(like, H, W, like.data.scalar_type());
}

// An image or a batch of images, dense in one of two layouts: the tensor itself where it is, and
// where is_channels_last() says so, which strides of dimensions of size 1 can keep it from.
inline Tensor dense(const Tensor& tensor, bool channels_last) {
  if (!channels_last) return contiguous_of(tensor);
  const auto size = in_storage(tensor).sizes(), stride = tensor.strides();
  const bool same_memory = size[1] == 1 || size[2] * size[3] == 1;
  bool is_dense = same_memory || is_channels_last(tensor);
  int64_t inner = 1;
  for (const int d : {1, 3, 2, 0}) {
    is_dense = is_dense && (size[d] == 1 || stride[d] == inner);
    inner *= size[d];
  }
  if (is_dense) return tensor;
  const Images like{tensor, size[0], size[1], size[2], size[3], true, true};
  Tensor copy = empty_images(like, like.H, like.W);
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline Images images_of(const char* op, const char* name, const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  MNIST_OPS_CHECK(dim == 3 || dim == 4, op, ": ", name,
                  " must be (N, C, H, W) or (C, H, W), got the shape ", shape_string(tensor));
  const bool channels_last = is_channels_last(tensor);
  return Images{dense(tensor, channels_last),
                dim == 4 ? tensor.size(0) : 1,
                tensor.size(dim - 3),
                tensor.size(dim - 2),
                tensor.size(dim - 1),
                channels_last,
                dim == 4};
}

}  // namespace mnist_ops
