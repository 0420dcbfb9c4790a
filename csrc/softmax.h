// Softmax and log-softmax of beta * x along one dimension, and log-softmax with negative log
// likelihood in one. The reports' Gibbs form exp(-b x) / sum exp(-b x) is beta = -b.
//
//   y = exp(beta x) / Z          gx = beta y (g - sum g y)
//   l = beta x - log Z           gx = beta (g - exp(l) sum g)
//   loss = log Z - beta x_t      gx = beta g (exp(beta x - log Z) - [i = t])
// The largest beta x is subtracted before exp, so nothing overflows. A row of -inf gives NaN, as in
// PyTorch.
#pragma once

#include "common.h"
#include "sigmoid.h"  // in_memory_order_of

namespace mnist_ops {

// A tensor seen as (outer, size, inner) with the dimension of the softmax in the middle: whatever
// the order of its dimensions in memory, a dense tensor's elements along one dimension lie `inner`
// apart, and everything above repeats every size * inner elements.
struct SoftmaxGeometry {
  int64_t outer, size, inner;
};

inline int64_t checked_dim(const char* op, const Tensor& tensor, int64_t dim) {
  const int64_t n = tensor.dim() == 0 ? 1 : tensor.dim();
  MNIST_OPS_CHECK(dim >= -n && dim < n, op, ": dim must be in [", -n, ", ", n - 1, "], got ", dim);
  return dim < 0 ? dim + n : dim;
}

inline SoftmaxGeometry softmax_geometry(const Tensor& dense_tensor, int64_t dim) {
  const int64_t numel = dense_tensor.numel();
  if (numel == 0) return {0, 0, 0};
  const int64_t size = dense_tensor.dim() == 0 ? 1 : dense_tensor.size(dim);
  const int64_t inner = size == 1 ? 1 : dense_tensor.stride(dim);
  return {numel / size / inner, size, inner};
}

// softmax_nll: classes are dimension 1, or 0 of a vector; targets have the other dimensions.
inline int64_t check_softmax_nll(const char* op, const Tensor& input, const Tensor& target) {
  MNIST_OPS_CHECK(input.dim() >= 1, op,
                  ": input must be (C), (N, C) or (N, C, d1, ...), got a scalar");
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  bool fits = target.dim() == input.dim() - 1;
  for (int64_t d = 0, t = 0; fits && d < input.dim(); ++d) {
    if (d != class_dim) fits = target.size(t++) == input.size(d);
  }
  MNIST_OPS_CHECK(fits, op,
                  ": target must have the shape of input without its class dimension, got ",
                  shape_string(target), " for an input of ", shape_string(input));
  MNIST_OPS_CHECK(target.scalar_type() == ScalarType::Long, op,
                  ": target must be int64 class indices, got ",
                  torch::headeronly::toString(target.scalar_type()));
  MNIST_OPS_CHECK(target.device() == input.device(), op,
                  ": target and input are on different devices");
  MNIST_OPS_CHECK(input.size(class_dim) > 0, op, ": input has no classes, its shape is ",
                  shape_string(input));
  return class_dim;
}

}  // namespace mnist_ops
