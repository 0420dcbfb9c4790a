// Sigmoid on the CPU. Bound by memory in float32 (2 and 3 words an element) once exp is vectorised,
// by the exponential's 13-term polynomial in float64.

#include "../sigmoid.h"

#include "common.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements of a half type converted at a time

Tensor sigmoid(const Tensor& input) {
  Tensor output = new_like(input);
  const Tensor x = in_memory_order_of(output, input);
  dispatch_floating("sigmoid", input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    parallel_for(input.numel(), 4, [=](int64_t begin, int64_t end) {
      A from[kBlock], to[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        const A* xs = load(in + i, from, n);
        A* ys = stage(out + i, to);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) ys[j] = elementary::sigmoid(xs[j]);
        store(ys, out + i, n);
      }
    });
  });
  return output;
}

Tensor sigmoid_backward(const Tensor& grad_output, const Tensor& output) {
  check_like("sigmoid_backward", "grad_output", grad_output, "output", output);
  Tensor grad_input = new_like(output);
  const Tensor y = in_memory_order_of(grad_input, output);
  const Tensor g = in_memory_order_of(grad_input, grad_output);
  dispatch_floating("sigmoid_backward", output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* grad = g.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    T* result = grad_input.mutable_data_ptr<T>();
    parallel_for(output.numel(), 1, [=](int64_t begin, int64_t end) {
      A from_g[kBlock], from_y[kBlock], to[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        const A* gs = load(grad + i, from_g, n);
        const A* ys = load(out + i, from_y, n);
        A* rs = stage(result + i, to);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) rs[j] = sigmoid_gradient(gs[j], ys[j]);
        store(rs, result + i, n);
      }
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("sigmoid", TORCH_BOX(&sigmoid));
  m.impl("sigmoid_backward", TORCH_BOX(&sigmoid_backward));
}

}  // namespace mnist_ops::cpu
