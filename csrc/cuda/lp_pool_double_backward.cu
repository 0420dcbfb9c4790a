// LP pooling on CUDA, the derivative of the backward pass: two launches.

#include "lp_pool.cuh"

namespace mnist_ops::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    directional_kernel(int64_t count, PoolGeometry g, bool channels_last, opmath_t<T> p,
                       const T* __restrict__ direction, const T* __restrict__ input,
                       const T* __restrict__ output, T* __restrict__ directional) {
  using A = opmath_t<T>;
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const auto at = position_of(i, g, channels_last, g.OH, g.OW);
    with_norm(AnyNorm{}, p, [&](auto tag) {
      directional[i] = static_cast<T>(directional_derivative<decltype(tag)::value>(
          direction + at.in_plane, input + at.in_plane, static_cast<A>(output[i]), g, p, at.h,
          at.w));
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    second_kernel(int64_t count, PoolGeometry g, bool channels_last, opmath_t<T> p,
                  const T* __restrict__ direction, const T* __restrict__ grad_output,
                  const T* __restrict__ input, const T* __restrict__ output,
                  const T* __restrict__ directional, T* __restrict__ grad_input) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const auto at = position_of(i, g, channels_last, g.H, g.W);
    with_norm(AnyNorm{}, p, [&](auto tag) {
      grad_input[i] = static_cast<T>(second_gradient<decltype(tag)::value>(
          direction + at.in_plane, grad_output + at.out_plane, input + at.in_plane,
          output + at.out_plane, directional + at.out_plane, g, p, at.h, at.w));
    });
  }
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
  p = usable_norm_type(op, p, input.scalar_type());
  check_like(op, "grad_grad_input", grad_grad_input, "input", input);
  const Tensor direction = dense(grad_grad_input, x.channels_last);
  const Tensor y = pooled_like(op, "output", output, x, g);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, g);
  const Launcher launcher(input);
  Tensor directional = new_pooled(x, g);
  Tensor grad_input = empty_images(x, g.H, g.W);
  if (x.data.numel() == 0) return {directional, grad_input};
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    const T* v = direction.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    T* dd = directional.mutable_data_ptr<T>();
    const T* gy = grad.const_data_ptr<T>();
    launcher.run_over(directional_kernel<T>, directional.numel(), directional.numel(), g,
                      x.channels_last, static_cast<A>(p), v, in, out, dd);
    launcher.run_over(second_kernel<T>, grad_input.numel(), grad_input.numel(), g, x.channels_last,
                      static_cast<A>(p), v, gy, in, out, static_cast<const T*>(dd),
                      grad_input.mutable_data_ptr<T>());
  });
  return {directional, grad_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("lp_pool2d_double_backward", TORCH_BOX(&lp_pool2d_double_backward));
}

}  // namespace mnist_ops::cuda
