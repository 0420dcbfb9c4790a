// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Where the networks' windows tile the image and the pooled map of an image fits into the shared
// memory of a block, one kernel does it all (stage_tiles.cu). Elsewhere the three operators do, one
// after the other, between which everything is in the type to compute in: half types are rounded
// once here, too. They move three to four times as much, and nothing measured asks for more than
// the networks' windows. No atomics either way.

#include "../stage.h"

#include "lp_pool.cuh"
#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(int64_t count, ActivationKind activation, const T* __restrict__ x,
                    opmath_t<T>* __restrict__ a) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    a[i] = activation_value(activation, static_cast<opmath_t<T>>(x[i]));
  }
}

// From the gradient of a = act(x), in the type to compute in, to that of x.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_gradient_kernel(int64_t count, ActivationKind activation,
                               const opmath_t<T>* __restrict__ grad,
                               const opmath_t<T>* __restrict__ a, T* __restrict__ grad_x) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    grad_x[i] = static_cast<T>(activation_gradient(activation, grad[i], a[i]));
  }
}

// act(x) in the type to compute in.
template <typename T>
Images activated(const Images& x, ActivationKind activation) {
  Images a = x;
  a.data = empty_images(x, x.H, x.W, type_to_compute_in(x.data));
  Launcher(x.data).run_over(activate_kernel<T>, x.data.numel(), x.data.numel(), activation,
                            x.data.const_data_ptr<T>(), a.data.mutable_data_ptr<opmath_t<T>>());
  return a;
}

Tensor in_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  const PoolGeometry& g = arguments.geometry;
  if (x.data.numel() == 0) return new_pooled(x, g);
  Tensor output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (forward_tiles<T>(x, kernel, arguments, output)) return;
    const Images a = activated<T>(x, arguments.activation);
    output = in_type(subtractive_norm2d(pooled(a, g, arguments.p), kernel), x.data.scalar_type());
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  const PoolGeometry& g = arguments.geometry;
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    if (backward_tiles<T>(grad_output, x, kernel, arguments, grad_input)) return;
    const Images a = activated<T>(x, arguments.activation);
    const Tensor y = pooled(a, g, arguments.p);
    const Tensor grad_z = in_type(grad_output, a.data.scalar_type());
    const Tensor grad_y = subtractive_norm2d_backward(grad_z, kernel);
    const Tensor grad_a = pool_gradient(grad_y, a, y, g, arguments.p);
    const int64_t count = x.data.numel();
    Launcher(x.data).run_over(activation_gradient_kernel<T>, count, count, arguments.activation,
                              grad_a.const_data_ptr<A>(), a.data.const_data_ptr<A>(),
                              grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
