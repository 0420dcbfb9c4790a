// Softmax and log-softmax of beta * x along one dimension, and log-softmax with negative log
// likelihood in one. The reports' Gibbs form exp(-b x) / sum exp(-b x) is beta = -b.
//
//   d = beta x - max beta x      Z = sum exp(d)
//   y = exp(d) / Z               gx = beta y (g - sum g y)
//   l = d - log Z                gx = beta (g - exp(l) sum g)
//   loss = log Z - d_t           gx = beta g (exp(d - log Z) - [i = t])
// The difference comes first: with the logarithm of sum exp(beta x) instead, l would lose the
// digits of what all x have in common. A row of -inf gives NaN, as in PyTorch.
#pragma once

#include "common.h"
#include "elementary.h"
#include "sigmoid.h"  // in_memory_order_of

#include <cmath>
#include <limits>
#include <tuple>

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

// d = beta x - max beta x, as factor (scale x - max scale x). The scale is 1 or -1, or a half of
// that where |beta| < 1: neither the product nor the difference of equal numbers is rounded, and
// what overflows is d itself.
template <typename A>
struct Differences {
  A beta, scale, factor;

  MNIST_OPS_HD explicit Differences(double number)
      : beta(static_cast<A>(number)), scale(0), factor(1) {
    if (beta == A(0)) return;
    scale = std::copysign(std::fabs(beta) < A(1) ? A(0.5) : A(1), beta);
    factor = beta / scale;
  }

  MNIST_OPS_HD A scaled(A x) const { return scale * x; }
  MNIST_OPS_HD A of_scaled(A scaled, A largest) const { return factor * (scaled - largest); }
  MNIST_OPS_HD A operator()(A x, A largest) const {
    return factor * elementary::fmadd(scale, x, -largest);
  }
};

// beta must be a number in the type to compute in, too.
inline void check_beta(const char* op, const Tensor& input, double beta) {
  const ScalarType wide = type_to_compute_in(input);
  const double most = wide == ScalarType::Double ? std::numeric_limits<double>::max()
                                                 : std::numeric_limits<float>::max();
  MNIST_OPS_CHECK(std::fabs(beta) <= most, op, ": beta must be finite in ",
                  torch::headeronly::toString(wide), ", got ", beta);
}

enum class Reduction { kNone, kMean, kSum };

inline Reduction reduction_named(const char* op, const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "mean") return Reduction::kMean;
  MNIST_OPS_CHECK(name == "sum", op, ": reduction must be 'mean', 'sum' or 'none', got '", name,
                  "'");
  return Reduction::kSum;
}

// The gradient of each target's loss, where the losses were added up: one number for all of them,
// which the mean divides by their number.
template <typename T>
struct LossGradient {
  using A = opmath_t<T>;
  const T* values;
  int64_t step;  // between the gradients of two targets: 1, or 0 where they share one
  A count;       // what the sum of the losses was divided by, else 1

  MNIST_OPS_HD A operator[](int64_t line) const {
    const A value = static_cast<A>(values[line * step]);
    return count == A(1) ? value : value / count;
  }
};

template <typename T>
LossGradient<T> loss_gradient(const Tensor& grad_loss, int64_t targets, Reduction reduction) {
  using A = opmath_t<T>;
  return {grad_loss.const_data_ptr<T>(), reduction == Reduction::kNone ? 1 : 0,
          reduction == Reduction::kMean ? static_cast<A>(targets) : A(1)};
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

// Returns how the losses were reduced.
inline Reduction check_softmax_nll_gradient(const char* op, const Tensor& grad_loss,
                                            const Tensor& input, const Tensor& target,
                                            const Tensor& largest, const Tensor& log_sum,
                                            const std::string& name) {
  const Reduction reduction = reduction_named(op, name);
  if (reduction == Reduction::kNone) {
    MNIST_OPS_CHECK(same_shape(grad_loss, target), op,
                    ": grad_loss must have the shape of target, ", shape_string(target), ", got ",
                    shape_string(grad_loss));
  } else {
    MNIST_OPS_CHECK(grad_loss.dim() == 0, op, ": grad_loss must be a scalar, got the shape ",
                    shape_string(grad_loss));
  }
  MNIST_OPS_CHECK(grad_loss.scalar_type() == input.scalar_type(), op,
                  ": grad_loss must have the dtype of input, ",
                  torch::headeronly::toString(input.scalar_type()), ", got ",
                  torch::headeronly::toString(grad_loss.scalar_type()));
  MNIST_OPS_CHECK(grad_loss.device() == input.device(), op,
                  ": grad_loss and input are on different devices");
  const auto check_saved = [&](const char* what, const Tensor& saved) {
    MNIST_OPS_CHECK(same_shape(saved, target), op, ": ", what, " must have the shape of target, ",
                    shape_string(target), ", got ", shape_string(saved));
    const ScalarType wide = type_to_compute_in(input);
    MNIST_OPS_CHECK(saved.scalar_type() == wide, op, ": ", what, " must be ",
                    torch::headeronly::toString(wide), ", got ",
                    torch::headeronly::toString(saved.scalar_type()));
    MNIST_OPS_CHECK(saved.device() == input.device(), op, ": ", what,
                    " and input are on different devices");
  };
  check_saved("largest", largest);
  check_saved("log_sum", log_sum);
  return reduction;
}

// ------------------------------------------------------------------------- what kernels are given

enum class SoftmaxKind { kSoftmax, kLogSoftmax, kNll };

template <typename T>
struct SoftmaxForward {
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  Differences<A> differences;
  const T* in;
  T* out;  // every element's (log-)probability, or every line's loss
  // softmax_nll only
  const int64_t* target = nullptr;
  A *largest = nullptr, *log_sum = nullptr;  // of every line: max scale x, log Z
};

template <typename T>
struct SoftmaxBackward {
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  A beta;
  const T *grad, *out;
  T* result;
};

template <typename T>
struct NllBackward {
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  Differences<A> differences;
  LossGradient<T> grad;
  const T* in;
  const int64_t* target;
  const A *largest, *log_sum;
  T* result;
};

// The operators of one backend. Kernels has static functions, of which each is also told a tensor
// on whose device it is to work:
//   forward<kind, T>(tensor, SoftmaxForward<T>), backward<kind, T>(tensor, SoftmaxBackward<T>),
//   nll_backward<T>(tensor, NllBackward<T>),
//   check_targets(op, targets, classes), which may leave it to the kernels to make NaN of others,
//   reduced(losses, reduction).
template <typename Kernels>
struct SoftmaxOperators {
  template <SoftmaxKind kind>
  static Tensor forward(const char* op, const Tensor& input, int64_t dim, double beta) {
    dim = checked_dim(op, input, dim);
    check_beta(op, input, beta);
    Tensor output = new_like(input);
    const Tensor x = in_memory_order_of(output, input);
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::template forward<kind, T>(
          output, {softmax_geometry(output, dim), Differences<opmath_t<T>>(beta),
                   x.const_data_ptr<T>(), output.mutable_data_ptr<T>()});
    });
    return output;
  }

  template <SoftmaxKind kind>
  static Tensor backward(const char* op, const Tensor& grad_output, const Tensor& output,
                         int64_t dim, double beta) {
    dim = checked_dim(op, output, dim);
    check_like(op, "grad_output", grad_output, "output", output);
    check_beta(op, output, beta);
    Tensor grad_input = new_like(output);
    const Tensor y = in_memory_order_of(grad_input, output);
    const Tensor grad = in_memory_order_of(grad_input, grad_output);
    dispatch_floating(op, output.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::template backward<kind, T>(
          grad_input,
          {softmax_geometry(grad_input, dim), static_cast<opmath_t<T>>(beta),
           grad.const_data_ptr<T>(), y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>()});
    });
    return grad_input;
  }

  static Tensor softmax(const Tensor& input, int64_t dim, double beta) {
    return forward<SoftmaxKind::kSoftmax>("softmax", input, dim, beta);
  }
  static Tensor log_softmax(const Tensor& input, int64_t dim, double beta) {
    return forward<SoftmaxKind::kLogSoftmax>("log_softmax", input, dim, beta);
  }
  static Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim,
                                 double beta) {
    return backward<SoftmaxKind::kSoftmax>("softmax_backward", grad_output, output, dim, beta);
  }
  static Tensor log_softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim,
                                     double beta) {
    return backward<SoftmaxKind::kLogSoftmax>("log_softmax_backward", grad_output, output, dim,
                                              beta);
  }

  static std::tuple<Tensor, Tensor, Tensor> softmax_nll(const Tensor& input, const Tensor& target,
                                                        double beta, std::string reduction) {
    const char* op = "softmax_nll";
    const Reduction kind = reduction_named(op, reduction);
    const int64_t dim = check_softmax_nll(op, input, target);
    check_beta(op, input, beta);
    const Tensor x = dense(input, is_channels_last(input));
    const Tensor targets = contiguous_of(target);
    Kernels::check_targets(op, targets, x.size(dim));
    Tensor loss = new_tensor(x, targets.sizes());
    Tensor largest = new_tensor(x, targets.sizes(), type_to_compute_in(x));
    Tensor log_sum = new_like(largest);
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = opmath_t<T>;
      Kernels::template forward<SoftmaxKind::kNll, T>(
          loss, {softmax_geometry(x, dim), Differences<A>(beta), x.const_data_ptr<T>(),
                 loss.mutable_data_ptr<T>(), targets.const_data_ptr<int64_t>(),
                 largest.mutable_data_ptr<A>(), log_sum.mutable_data_ptr<A>()});
    });
    return {kind == Reduction::kNone ? loss : Kernels::reduced(loss, kind), largest, log_sum};
  }

  static Tensor softmax_nll_backward(const Tensor& grad_loss, const Tensor& input,
                                     const Tensor& target, const Tensor& largest,
                                     const Tensor& log_sum, double beta, std::string reduction) {
    const char* op = "softmax_nll_backward";
    const int64_t dim = check_softmax_nll(op, input, target);
    const Reduction kind =
        check_softmax_nll_gradient(op, grad_loss, input, target, largest, log_sum, reduction);
    check_beta(op, input, beta);
    const Tensor x = dense(input, is_channels_last(input));
    const Tensor targets = contiguous_of(target);
    Kernels::check_targets(op, targets, x.size(dim));
    const Tensor grad = contiguous_of(grad_loss);
    const Tensor maxima = contiguous_of(largest), log_sums = contiguous_of(log_sum);
    Tensor grad_input = new_like(x);
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = opmath_t<T>;
      Kernels::template nll_backward<T>(
          grad_input, {softmax_geometry(x, dim), Differences<A>(beta),
                       loss_gradient<T>(grad, targets.numel(), kind), x.const_data_ptr<T>(),
                       targets.const_data_ptr<int64_t>(), maxima.const_data_ptr<A>(),
                       log_sums.const_data_ptr<A>(), grad_input.mutable_data_ptr<T>()});
    });
    return grad_input;
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("softmax", TORCH_BOX(&SoftmaxOperators::softmax));
    m.impl("softmax_backward", TORCH_BOX(&SoftmaxOperators::softmax_backward));
    m.impl("log_softmax", TORCH_BOX(&SoftmaxOperators::log_softmax));
    m.impl("log_softmax_backward", TORCH_BOX(&SoftmaxOperators::log_softmax_backward));
    m.impl("softmax_nll", TORCH_BOX(&SoftmaxOperators::softmax_nll));
    m.impl("softmax_nll_backward", TORCH_BOX(&SoftmaxOperators::softmax_nll_backward));
  }
};

}  // namespace mnist_ops
