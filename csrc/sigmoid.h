// sigmoid: y = 1 / (1 + exp(-x)); gradient g * y * (1 - y).
#pragma once

#include "common.h"

namespace mnist_ops {

// The input's elements in the memory order of out, which is dense: the input itself where it is
// dense in that order, else a copy.
inline Tensor in_memory_order_of(const Tensor& out, const Tensor& input) {
  bool same = true;
  for (int64_t d = 0; d < out.dim(); ++d) {
    same = same && (out.size(d) == 1 || out.stride(d) == input.stride(d));
  }
  in_storage(input);
  if (same) return input;
  Tensor copy = new_like(out);
  torch::stable::copy_(copy, input);
  return copy;
}

template <typename T>
MNIST_OPS_HD T sigmoid_gradient(T grad, T y) {
  return grad * y * (T(1) - y);
}

}  // namespace mnist_ops
