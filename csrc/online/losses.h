// Log-softmax, exact and as Torch7 approximated it, and the losses. Ten numbers or so: plain loops.
#pragma once

#include "layer.h"

namespace mnist_ops::online {

// l = beta x - log sum exp(beta x).
template <typename T>
class LogSoftmax final : public Layer<T> {
 public:
  LogSoftmax(const Map<T>& input, const Map<T>& output, double beta) : beta_(static_cast<T>(beta)) {
    this->in = input;
    this->out = output;
  }

  bool needs_output() const override { return true; }

  void prepare_forward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T* x = this->in.value;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, beta_ * x[i]);
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) sum += cpu::exp(beta_ * x[i] - largest);
    const T total = largest + std::log(sum);
    for (int64_t i = 0; i < n; ++i) this->out.value[i] = beta_ * x[i] - total;
  }

  void prepare_backward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T *l = this->out.value, *g = this->out.grad;
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) sum += g[i];
    for (int64_t i = 0; i < n; ++i) {
      this->in.grad[i] = beta_ * (g[i] - cpu::exp(l[i]) * sum);
    }
  }

 private:
  T beta_;
};

// Torch7's: an approximate exponential in the sum forward, the exact one backward; sums in double.
template <typename T>
class Torch7LogSoftmax final : public Layer<T> {
 public:
  Torch7LogSoftmax(const Map<T>& input, const Map<T>& output) {
    this->in = input;
    this->out = output;
  }

  bool needs_output() const override { return true; }

  void prepare_forward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T* x = this->in.value;
    const T largest = *std::max_element(x, x + n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += exp_minus(static_cast<double>(largest - x[i]));
    const double total = static_cast<double>(largest) + std::log(sum);
    for (int64_t i = 0; i < n; ++i) this->out.value[i] = static_cast<T>(x[i] - total);
  }

  void prepare_backward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T *l = this->out.value, *g = this->out.grad;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(g[i]);
    for (int64_t i = 0; i < n; ++i) {
      this->in.grad[i] = static_cast<T>(g[i] - std::exp(static_cast<double>(l[i])) * sum);
    }
  }

 private:
  static double exp_minus(double z) {
    if (!(z < 13.0)) return z == z ? 0.0 : z;
    double w = 1.0 + z * (0.125 + z * (0.0078125 + z * (0.00032552083 + z * 1.0172526e-5)));
    w *= w;
    w *= w;
    w *= w;
    return 1.0 / w;
  }
};

enum class Loss { kNll, kMultiMargin, kMse };

// The loss of one sample with scores x of n classes; its gradient goes to g.
template <typename T>
T loss_and_gradient(Loss loss, const T* x, int64_t n, int64_t target, T* g) {
  std::fill_n(g, n, T(0));
  switch (loss) {
    case Loss::kNll:
      g[target] = T(-1);
      return -x[target];
    case Loss::kMultiMargin: {
      T sum = T(0);
      const T share = T(1) / static_cast<T>(n);
      for (int64_t i = 0; i < n; ++i) {
        const T margin = T(1) - x[target] + x[i];
        if (i == target || !(margin > T(0))) {
          if (margin != margin) sum += margin;
          continue;
        }
        sum += margin;
        g[i] += share;
        g[target] -= share;
      }
      return sum / static_cast<T>(n);
    }
    case Loss::kMse: {
      T sum = T(0);
      for (int64_t i = 0; i < n; ++i) {
        const T difference = x[i] - (i == target ? T(1) : T(-1));
        sum += difference * difference;
        g[i] = T(2) * difference;
      }
      return sum;
    }
  }
  return T(0);
}

// The class of the largest score, compared in float32 as Torch7's confusion matrix does; the first
// of equal ones, and NaN above all, as in torch.argmax.
template <typename T>
int64_t predicted_class(const T* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) {
    const float a = static_cast<float>(x[i]), b = static_cast<float>(x[best]);
    if (a > b || (a != a && b == b)) best = i;
  }
  return best;
}

}  // namespace mnist_ops::online
