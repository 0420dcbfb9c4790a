// Local normalization on CUDA.
//
// Bound by memory. Subtractive needs the input twice (for the sum over channels, then to subtract)
// and writes it once, divisive and contrastive need it once more for the squares. Between those
// passes everything happens on planes, one value a pixel, 1/C of the data.
//
// Images that fit into shared memory: one launch, one read and one write of memory
// (local_norm_image). Images too large for a block, or too large for two blocks a multiprocessor,
// are shared by the blocks of a cluster, up to 8 of them (from compute capability 9.0 on).
//
// Other images: the steps are kernels of their own (local_norm_steps.cu), so that images and
// kernels may have any size.
//
// Squares leave the range of the type that computes long before their roots do, and the gradient
// has the inverse of a square. Images for which that happens go through their sums and blurs again,
// multiplied by a power of two (Range): in the same kernel where they are in shared memory, in one
// more launch, repair, where they are not. All other images have the bits that they would have
// without.
//
// A kernel whose sum is 0 or not finite gives infinities and NaN: to refuse it, as the CPU does,
// the host would have to wait for the device.

#include "local_norm.cuh"

namespace mnist_ops::cuda {
namespace {

// Forward, or backward from a gradient.
Tensor normalize(const char* op, const Tensor* grad_output, const Tensor& input,
                 const Tensor& kernel, const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options, input.scalar_type());
  if (grad_output) check_like(op, "grad_output", *grad_output, "input", input);
  const Tensor grad = grad_output ? dense(*grad_output, x.channels_last) : x.data;
  const Launcher launcher(input);
  Tensor result = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (result.numel() == 0) return;
    const T *in = x.data.const_data_ptr<T>(), *go = grad.const_data_ptr<T>();
    const bool adjoint = grad_output && options.kind == LocalNorm::kSubtractive;
    const NormCall<T> call{launcher,
                           x,
                           kernel,
                           options,
                           adjoint,
                           grad_output && !adjoint ? go : nullptr,
                           adjoint ? go : in,
                           result.mutable_data_ptr<T>()};
    if (!run_images(call)) run_steps(call);
  });
  return result;
}

Tensor forward(const char* op, const Tensor& input, const Tensor& kernel,
               const LocalNormOptions& options) {
  return normalize(op, nullptr, input, kernel, options);
}

Tensor backward(const char* op, const Tensor& grad_output, const Tensor& input,
                const Tensor& kernel, const LocalNormOptions& options) {
  return normalize(op, &grad_output, input, kernel, options);
}

}  // namespace

Tensor subtractive_norm2d(const char* op, const Tensor& input, const Tensor& kernel) {
  return forward(op, input, kernel, {LocalNorm::kSubtractive, 0, 0});
}

Tensor subtractive_norm2d_backward(const char* op, const Tensor& grad, const Tensor& kernel) {
  return backward(op, grad, grad, kernel, {LocalNorm::kSubtractive, 0, 0});
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  LocalNormOperators<&forward, &backward>::register_all(m);
}

}  // namespace mnist_ops::cuda
