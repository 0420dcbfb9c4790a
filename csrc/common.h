// What every family needs on both backends: dtypes, argument checks, memory layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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

inline Tensor dense(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(
      tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
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

// A new tensor for images with the layout, dtype and device of others, but another height and
// width.
inline Tensor empty_images(const Images& like, int64_t H, int64_t W) {
  std::vector<int64_t> size;
  if (like.batched) size.push_back(like.N);
  size.insert(size.end(), {like.C, H, W});
  return torch::stable::empty(
      size, like.data.scalar_type(), like.data.layout(), like.data.device(), std::nullopt,
      like.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace mnist_ops
