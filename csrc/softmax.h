// Softmax and log-softmax of beta * x along one dimension, and log-softmax with negative log
// likelihood in one. The reports' Gibbs form exp(-b x) / sum exp(-b x) is beta = -b.
//
//   d = beta x - max beta x      Z = sum exp(d)
//   y = exp(d) / Z               gx = beta y (g - sum g y)
//   l = d - log Z                gx = beta (g - exp(l) sum g)
//   loss = log Z - d_t           gx = beta g (y - [i = t]); see Targets for the general one
// The difference comes first: with the logarithm of sum exp(beta x) instead, l would lose the
// digits of what all x have in common. A row of -inf gives NaN, as in PyTorch.
#pragma once

#include "common.h"
#include "elementary.h"
#include "sigmoid.h"  // in_memory_order_of

#include <cmath>
#include <limits>
#include <optional>
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

// The gradient of each line's loss, where the losses were added up: one number for all of them,
// which the mean divides by what the sum was divided by.
template <typename T>
struct LossGradient {
  using A = opmath_t<T>;
  const T* values;
  int64_t step;      // between the gradients of two lines: 1, or 0 where they share one
  const A* divisor;  // of the mean, else null

  MNIST_OPS_HD A operator[](int64_t line) const {
    const A value = static_cast<A>(values[line * step]);
    return divisor ? value / *divisor : value;
  }
};

// What lines are to be. Of one line, with w the weights of the classes and s label_smoothing,
//   a_c = w_c ((1 - s) [c = t] + s / C)    for the class t
//   a_c = w_c ((1 - s) p_c + s / C)        for probabilities p
//   loss = sum_c a_c (log Z - d_c)         gx_c = beta g (y_c sum_k a_k - a_c)
// and both are 0 where t is ignore_index. With a class and s = 0 there is one a_c that is not 0.
template <typename T>
struct Targets {
  using A = opmath_t<T>;
  const int64_t* classes;  // of every line, or null:
  const T* probabilities;  // in the memory order of the input
  const A* weight;         // of every class; null: 1
  int64_t ignored;
  A share, rest;  // 1 - s, s / C

  MNIST_OPS_HD A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }
  MNIST_OPS_HD bool one_class() const { return classes && rest == A(0); }
};

template <typename T>
struct LineTarget {
  using A = opmath_t<T>;
  Targets<T> all = {};
  const T* probabilities = nullptr;  // of the first class; those of two are step apart
  int64_t step = 0, chosen = -1;
  A counts = A(1);  // 0 for a line that is ignored, NaN where the target is no class

  LineTarget() = default;
  // Of a line for class t, or for probabilities, whose first element is element `offset` of the
  // input.
  MNIST_OPS_HD LineTarget(const Targets<T>& targets, const SoftmaxGeometry& g, int64_t t,
                          int64_t offset)
      : all(targets), step(g.inner) {
    if (!all.classes) {
      probabilities = all.probabilities + offset;
      return;
    }
    if (t >= 0 && t < g.size) chosen = t;
    if (t == all.ignored) {
      counts = A(0);
    } else if (chosen < 0) {
      counts = std::numeric_limits<A>::quiet_NaN();
    }
  }

  // a_c of a line that counts.
  MNIST_OPS_HD A operator[](int64_t c) const {
    const A hit = probabilities ? all.share * static_cast<A>(probabilities[c * step])
                  : c == chosen ? all.share
                                : A(0);
    return all.weight_of(c) * (hit + all.rest);
  }

  // This of a line that counts, and of others what they are.
  template <typename F>
  MNIST_OPS_HD A if_it_counts(const F& value) const {
    return counts == A(1) ? value() : counts;
  }

  // What the line adds to the divisor of the mean.
  MNIST_OPS_HD A divisor() const {
    return if_it_counts([&] { return probabilities ? A(1) : all.weight_of(chosen); });
  }

  // sum(f) adds up f(c) over the classes, and is called for all lines or for none.
  template <typename Sum>
  MNIST_OPS_HD A loss(const Differences<A>& difference, const T* first, A largest, A log_sum,
                      const Sum& sum) const {
    const auto term = [&](int64_t c) {
      return log_sum - difference(static_cast<A>(first[c * step]), largest);
    };
    if (all.one_class()) {
      return if_it_counts([&] { return all.weight_of(chosen) * term(chosen); });
    }
    const A whole = sum([&](int64_t c) { return (*this)[c] * term(c); });
    return if_it_counts([&] { return whole; });
  }
};

// gx = scale y - factor a, of one line.
template <typename T>
struct LineGradient {
  using A = opmath_t<T>;
  LineTarget<T> target;
  A scale = A(0), factor = A(0);

  LineGradient() = default;

  // beta_g: beta times the gradient of the line's loss; sum as above.
  template <typename Sum>
  MNIST_OPS_HD LineGradient(const LineTarget<T>& line, A beta_g, const Sum& sum) : target(line) {
    const bool one = target.all.one_class();
    const A whole = one ? A(0) : sum([&](int64_t c) { return target[c]; });
    factor = target.if_it_counts([&] { return beta_g; });
    scale = target.if_it_counts(
        [&] { return beta_g * (one ? target.all.weight_of(target.chosen) : whole); });
  }

  MNIST_OPS_HD A operator()(A y, int64_t c) const {
    const A value = scale * y;
    if (target.all.one_class()) return c == target.chosen ? value - scale : value;
    return value - factor * target[c];
  }
};

// ------------------------------------------------------------------------- what kernels are given

// kAny stands for one of the others in a CUDA kernel that is told which one it is.
enum class SoftmaxKind { kSoftmax, kLogSoftmax, kNll, kNllGradient, kAny };

MNIST_OPS_HD constexpr bool has_target(SoftmaxKind kind) {
  return kind == SoftmaxKind::kNll || kind == SoftmaxKind::kNllGradient;
}
// Whether a kind keeps the exponentials.
MNIST_OPS_HD constexpr bool keeps_powers(SoftmaxKind kind) {
  return kind == SoftmaxKind::kSoftmax || kind == SoftmaxKind::kNllGradient;
}

struct LossSum {
  double losses, divisor;

  // NaN over a divisor of 0, also where smoothed losses have a sum, as in PyTorch.
  MNIST_OPS_HD double mean() const {
    return divisor == 0 ? std::numeric_limits<double>::quiet_NaN() : losses / divisor;
  }
};

template <typename T>
struct SoftmaxForward {
  static constexpr bool kIsForward = true;
  using Element = T;
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  Differences<A> differences;
  const T* in;
  T* out;  // every element's result, or every line's loss
  // softmax_nll and its gradient
  Targets<T> targets = {};
  LossGradient<T> grad = {};

  LossSum* sums = nullptr;  // of each of so many blocks, where a kernel adds up its losses itself
  int64_t blocks = 0;

  MNIST_OPS_HD int64_t class_of(int64_t line) const {
    return targets.classes ? targets.classes[line] : 0;
  }
  MNIST_OPS_HD LineTarget<T> target_of(int64_t line, int64_t offset) const {
    return {targets, g, class_of(line), offset};
  }
  template <typename Sum>
  MNIST_OPS_HD LineGradient<T> gradient_of(int64_t line, int64_t offset, const Sum& sum) const {
    return {target_of(line, offset), differences.beta * grad[line], sum};
  }
};

template <typename T>
struct SoftmaxBackward {
  static constexpr bool kIsForward = false;
  using Element = T;
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  A beta;
  const T *grad, *y;
  T* out;
};

// The arguments that softmax_nll and its backward share. Classes are dimension 1, or 0 of a vector;
// the other dimensions are those of the lines.
struct NllArguments {
  const char* op;
  Tensor x, target;  // as given; after check() dense, in one order
  std::optional<Tensor> weight;
  double beta;
  Reduction reduction;
  int64_t ignored;
  double smoothing;
  std::vector<int64_t> lines = {};
  SoftmaxGeometry g = {};

  void check() {
    using torch::headeronly::toString;
    MNIST_OPS_CHECK(x.dim() >= 1, op,
                    ": input must be (C), (N, C) or (N, C, d1, ...), got a scalar");
    const int64_t class_dim = x.dim() == 1 ? 0 : 1, classes = x.size(class_dim);
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (d != class_dim) lines.push_back(x.size(d));
    }
    if (are_classes()) {
      MNIST_OPS_CHECK(target.sizes().equals(lines), op,
                      ": target must have the shape of input without its class dimension, got ",
                      shape_string(target), " for an input of ", shape_string(x));
      MNIST_OPS_CHECK(target.device() == x.device(), op,
                      ": target and input are on different devices");
    } else {
      MNIST_OPS_CHECK(target.scalar_type() == x.scalar_type(), op,
                      ": target must be int64 class indices or have the dtype of input, ",
                      toString(x.scalar_type()), ", got ", toString(target.scalar_type()));
      check_like(op, "target", target, "input", x);
      MNIST_OPS_CHECK(ignored < 0, op,
                      ": ignore_index must be negative where target has probabilities, got ",
                      ignored);
    }
    MNIST_OPS_CHECK(classes > 0, op, ": input has no classes, its shape is ", shape_string(x));
    if (weight) {
      MNIST_OPS_CHECK(weight->dim() == 1 && weight->size(0) == classes, op,
                      ": weight must have the shape (", classes, "), got ", shape_string(*weight));
      check_is_wide("weight", *weight);
      MNIST_OPS_CHECK(weight->device() == x.device(), op,
                      ": weight and input are on different devices");
      weight = contiguous_of(*weight);
    }
    MNIST_OPS_CHECK(smoothing >= 0 && smoothing <= 1, op,
                    ": label_smoothing must be in [0, 1], got ", smoothing);
    check_beta(op, x, beta);
    x = dense(x, is_channels_last(x));
    target = are_classes() ? contiguous_of(target) : in_memory_order_of(x, target);
    g = softmax_geometry(x, class_dim);
  }

  void check_is_wide(const char* name, const Tensor& tensor) const {
    using torch::headeronly::toString;
    const ScalarType wide = type_to_compute_in(x);
    MNIST_OPS_CHECK(tensor.scalar_type() == wide, op, ": ", name, " must be ", toString(wide),
                    ", got ", toString(tensor.scalar_type()));
  }

  void check_gradient(const Tensor& grad_loss, const Tensor& total) const {
    using torch::headeronly::toString;
    const auto shape = reduction == Reduction::kNone ? lines : std::vector<int64_t>{};
    MNIST_OPS_CHECK(grad_loss.sizes().equals(shape), op,
                    ": grad_loss must have the shape of the loss, got ", shape_string(grad_loss));
    MNIST_OPS_CHECK(grad_loss.scalar_type() == x.scalar_type(), op,
                    ": grad_loss must have the dtype of input, ", toString(x.scalar_type()),
                    ", got ", toString(grad_loss.scalar_type()));
    MNIST_OPS_CHECK(grad_loss.device() == x.device() && total.device() == x.device(), op,
                    ": grad_loss, total and input are on different devices");
    if (reduction != Reduction::kMean) return;
    MNIST_OPS_CHECK(total.dim() == 0, op, ": total must be a scalar, got the shape ",
                    shape_string(total));
    check_is_wide("total", total);
  }

  bool are_classes() const { return target.scalar_type() == ScalarType::Long; }

  template <typename T>
  SoftmaxForward<T> kernel_arguments(Tensor& out) const {
    using A = opmath_t<T>;
    SoftmaxForward<T> f{g, Differences<A>(beta), x.const_data_ptr<T>(), out.mutable_data_ptr<T>()};
    f.targets = {are_classes() ? target.const_data_ptr<int64_t>() : nullptr,
                 are_classes() ? nullptr : target.const_data_ptr<T>(),
                 weight ? weight->const_data_ptr<A>() : nullptr,
                 ignored,
                 static_cast<A>(1 - smoothing),
                 static_cast<A>(smoothing / static_cast<double>(std::max<int64_t>(g.size, 1)))};
    return f;
  }
};

// The operators of one backend. Kernels has static functions, of which each but check_targets is
// also told a tensor on whose device it is to work:
//   run<kind>(tensor, arguments), which are SoftmaxForward<T> or SoftmaxBackward<T>,
//   check_targets(NllArguments), which may leave it to the kernels to make NaN,
//   nll<T>(losses, SoftmaxForward<T>, loss, total): the losses of softmax_nll, or where loss is not
//     null their sum, or where total is not null their mean and what that is divided by
template <typename Kernels>
struct SoftmaxOperators {
  using Kind = SoftmaxKind;

  template <Kind kind>
  static Tensor forward(const Tensor& input, int64_t dim, double beta) {
    const char* op = kind == Kind::kSoftmax ? "softmax" : "log_softmax";
    dim = checked_dim(op, input, dim);
    check_beta(op, input, beta);
    Tensor output = new_like(input);
    const Tensor x = in_memory_order_of(output, input);
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::template run<kind>(
          output, SoftmaxForward<T>{softmax_geometry(output, dim), Differences<opmath_t<T>>(beta),
                                    x.const_data_ptr<T>(), output.mutable_data_ptr<T>()});
    });
    return output;
  }

  template <Kind kind>
  static Tensor backward(const Tensor& grad_output, const Tensor& output, int64_t dim,
                         double beta) {
    const char* op = kind == Kind::kSoftmax ? "softmax_backward" : "log_softmax_backward";
    dim = checked_dim(op, output, dim);
    check_like(op, "grad_output", grad_output, "output", output);
    check_beta(op, output, beta);
    Tensor grad_input = new_like(output);
    const Tensor y = in_memory_order_of(grad_input, output);
    const Tensor grad = in_memory_order_of(grad_input, grad_output);
    dispatch_floating(op, output.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::template run<kind>(
          grad_input, SoftmaxBackward<T>{softmax_geometry(grad_input, dim),
                                         static_cast<opmath_t<T>>(beta), grad.const_data_ptr<T>(),
                                         y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>()});
    });
    return grad_input;
  }

  static std::tuple<Tensor, Tensor> softmax_nll(const Tensor& input, const Tensor& target,
                                                std::optional<Tensor> weight, double beta,
                                                std::string reduction, int64_t ignore_index,
                                                double label_smoothing) {
    const char* op = "softmax_nll";
    NllArguments a{op,           input,          target,
                   weight,       beta,           reduction_named(op, reduction),
                   ignore_index, label_smoothing};
    a.check();
    Kernels::check_targets(a);
    const bool mean = a.reduction == Reduction::kMean;
    Tensor losses = new_tensor(a.x, a.lines), loss = losses;
    // A scalar where it is needed, else without elements.
    const auto shape = mean ? std::vector<int64_t>{} : std::vector<int64_t>{0};
    Tensor total = new_tensor(a.x, shape, type_to_compute_in(a.x));
    if (a.reduction != Reduction::kNone) loss = new_tensor(a.x, std::vector<int64_t>{});
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Kernels::template nll<T>(losses, a.kernel_arguments<T>(losses),
                               a.reduction == Reduction::kNone ? nullptr : &loss,
                               mean ? &total : nullptr);
    });
    return {loss, total};
  }

  static Tensor softmax_nll_backward(const Tensor& grad_loss, const Tensor& input,
                                     const Tensor& target, const Tensor& total,
                                     std::optional<Tensor> weight, double beta,
                                     std::string reduction, int64_t ignore_index,
                                     double label_smoothing) {
    const char* op = "softmax_nll_backward";
    NllArguments a{op,           input,          target,
                   weight,       beta,           reduction_named(op, reduction),
                   ignore_index, label_smoothing};
    a.check();
    a.check_gradient(grad_loss, total);
    Kernels::check_targets(a);
    const Tensor grad = contiguous_of(grad_loss);
    Tensor grad_input = new_like(a.x);
    dispatch_floating(op, input.scalar_type(), [&](auto element) {
      using T = decltype(element);
      SoftmaxForward<T> f = a.kernel_arguments<T>(grad_input);
      const auto* divisor = a.reduction == Reduction::kMean
                                ? in_storage(total).const_data_ptr<opmath_t<T>>()
                                : nullptr;
      f.grad = {grad.const_data_ptr<T>(), a.reduction == Reduction::kNone ? 1 : 0, divisor};
      Kernels::template run<Kind::kNllGradient>(grad_input, f);
    });
    return grad_input;
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("softmax", TORCH_BOX(&SoftmaxOperators::forward<Kind::kSoftmax>));
    m.impl("softmax_backward", TORCH_BOX(&SoftmaxOperators::backward<Kind::kSoftmax>));
    m.impl("log_softmax", TORCH_BOX(&SoftmaxOperators::forward<Kind::kLogSoftmax>));
    m.impl("log_softmax_backward", TORCH_BOX(&SoftmaxOperators::backward<Kind::kLogSoftmax>));
    m.impl("softmax_nll", TORCH_BOX(&SoftmaxOperators::softmax_nll));
    m.impl("softmax_nll_backward", TORCH_BOX(&SoftmaxOperators::softmax_nll_backward));
  }
};

}  // namespace mnist_ops
