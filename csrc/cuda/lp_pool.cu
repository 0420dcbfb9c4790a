// LP pooling on CUDA.
//
// One thread computes one result with the functions of one window and one element in ../lp_pool.h,
// results in the order of memory: along a row in NCHW, along the channels in NHWC, so that writes
// are coalesced in both and reads are apart by no more than the stride. p = 1, 2 and inf are bound
// by memory (one read of the input and one write forward; gradient, input and output read and one
// write backward: what windows share comes from cache), other norms by pow.
//
// The gradients gather from the windows over an element, in a fixed order: no atomics.

#include "../lp_pool.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

// Calls body with the geometry in 32 bits where every index and every bound of a window fits: the
// divisions that find a result's window are then several times cheaper.
template <typename F>
void dispatch_index(const PoolGeometry& g, F&& body) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  if (!fits_32_bits(g.N * g.C * g.H * g.W) || !fits_32_bits(g.N * g.C * g.OH * g.OW) ||
      !fits_32_bits(rows) || !fits_32_bits(columns)) {
    return body(g);
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  PoolGeometryOf<int32_t> s{};
  s.N = narrow(g.N), s.C = narrow(g.C), s.H = narrow(g.H), s.W = narrow(g.W);
  s.OH = narrow(g.OH), s.OW = narrow(g.OW);
  s.kernel_h = narrow(g.kernel_h), s.kernel_w = narrow(g.kernel_w);
  s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.padding_h = narrow(g.padding_h), s.padding_w = narrow(g.padding_w);
  s.in_n = narrow(g.in_n), s.in_c = narrow(g.in_c);
  s.in_h = narrow(g.in_h), s.in_w = narrow(g.in_w);
  s.out_n = narrow(g.out_n), s.out_c = narrow(g.out_c);
  s.out_h = narrow(g.out_h), s.out_w = narrow(g.out_w);
  return body(s);
}

// Where one result belongs: the first elements of its input and output planes, its row and column.
template <typename I>
struct Position {
  I in_plane, out_plane, h, w;
};

// The position of the index-th element, in the order of memory, of a tensor with planes of H x W.
template <typename I>
__device__ __forceinline__ Position<I> position_of(I index, const PoolGeometryOf<I>& g,
                                                   bool channels_last, I H, I W) {
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  U rest = static_cast<U>(index);
  U c = 0;
  if (channels_last) {
    c = rest % static_cast<U>(g.C);
    rest /= static_cast<U>(g.C);
  }
  const I w = static_cast<I>(rest % static_cast<U>(W));
  rest /= static_cast<U>(W);
  const I h = static_cast<I>(rest % static_cast<U>(H));
  const I outer = static_cast<I>(rest / static_cast<U>(H));
  if (channels_last) {
    const I channel = static_cast<I>(c);
    return {g.input_offset(outer, channel), g.output_offset(outer, channel), h, w};
  }
  // In NCHW planes follow each other at one distance, across channels and images alike.
  return {outer * g.in_c, outer * g.out_c, h, w};
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                   const T* __restrict__ input, T* __restrict__ output) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.OH, g.OW);
    output[i] = static_cast<T>(window_norm<norm>(input + at.in_plane, g, p, at.h, at.w));
  }
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                    const T* __restrict__ grad_output, const T* __restrict__ input,
                    const T* __restrict__ output, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    grad_input[i] = static_cast<T>(input_gradient<norm>(
        grad_output + at.out_plane, input + at.in_plane, output + at.out_plane, g, p, at.h, at.w));
  }
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    directional_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                       const T* __restrict__ direction, const T* __restrict__ input,
                       const T* __restrict__ output, T* __restrict__ directional) {
  using A = opmath_t<T>;
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.OH, g.OW);
    directional[i] = static_cast<T>(directional_derivative<norm>(
        direction + at.in_plane, input + at.in_plane, static_cast<A>(output[i]), g, p, at.h, at.w));
  }
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    second_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                  const T* __restrict__ direction, const T* __restrict__ grad_output,
                  const T* __restrict__ input, const T* __restrict__ output,
                  const T* __restrict__ directional, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    grad_input[i] = static_cast<T>(second_gradient<norm>(
        direction + at.in_plane, grad_output + at.out_plane, input + at.in_plane,
        output + at.out_plane, directional + at.out_plane, g, p, at.h, at.w));
  }
}

// ------------------------------------------------------------------------------------- operators

Tensor lp_pool2d(const Tensor& input, double p, std::vector<int64_t> kernel,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d";
  const Images x = images_of(op, "input", input);
  const PoolGeometry geometry = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  const Launcher launcher(input);
  Tensor output = empty_images(x, geometry.OH, geometry.OW);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      dispatch_index(geometry, [&](const auto& g) {
        using I = decltype(g.N + 0);
        launcher.run_over(forward_kernel<norm, T, I>, output.numel(),
                          static_cast<I>(output.numel()), g, x.channels_last, static_cast<A>(p),
                          x.data.const_data_ptr<T>(), output.mutable_data_ptr<T>());
      });
    });
  });
  return output;
}

Tensor lp_pool2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& output,
                          double p, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d_backward";
  const Images x = images_of(op, "input", input);
  const PoolGeometry geometry = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  const Tensor y = pooled_like(op, "output", output, x, geometry);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, geometry);
  const Launcher launcher(input);
  Tensor grad_input = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      dispatch_index(geometry, [&](const auto& g) {
        using I = decltype(g.N + 0);
        launcher.run_over(backward_kernel<norm, T, I>, grad_input.numel(),
                          static_cast<I>(grad_input.numel()), g, x.channels_last, static_cast<A>(p),
                          grad.const_data_ptr<T>(), x.data.const_data_ptr<T>(),
                          y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>());
      });
    });
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> lp_pool2d_double_backward(const Tensor& grad_grad_input,
                                                     const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& output, double p,
                                                     std::vector<int64_t> kernel,
                                                     std::vector<int64_t> stride,
                                                     std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d_double_backward";
  const Images x = images_of(op, "input", input);
  const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  check_like(op, "grad_grad_input", grad_grad_input, "input", input);
  const Tensor direction = dense(grad_grad_input, x.channels_last);
  const Tensor y = pooled_like(op, "output", output, x, g);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, g);
  const Launcher launcher(input);
  Tensor directional = empty_images(x, g.OH, g.OW);
  Tensor grad_input = empty_images(x, g.H, g.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    const T* v = direction.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    T* dd = directional.mutable_data_ptr<T>();
    dispatch_norm(p, [&](auto tag) {
      // Rare enough to do without a 32-bit version.
      constexpr Norm norm = decltype(tag)::value;
      launcher.run_over(directional_kernel<norm, T, int64_t>, directional.numel(),
                        directional.numel(), g, x.channels_last, static_cast<A>(p), v, in, out, dd);
      launcher.run_over(second_kernel<norm, T, int64_t>, grad_input.numel(), grad_input.numel(), g,
                        x.channels_last, static_cast<A>(p), v, grad.const_data_ptr<T>(), in, out,
                        static_cast<const T*>(dd), grad_input.mutable_data_ptr<T>());
    });
  });
  return {directional, grad_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("lp_pool2d", TORCH_BOX(&lp_pool2d));
  m.impl("lp_pool2d_backward", TORCH_BOX(&lp_pool2d_backward));
  m.impl("lp_pool2d_double_backward", TORCH_BOX(&lp_pool2d_double_backward));
}

}  // namespace mnist_ops::cuda
