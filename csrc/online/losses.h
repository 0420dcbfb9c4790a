// Log-softmax, exact and as Torch7 approximated it. Ten numbers or so: plain loops.
#pragma once

#include "../softmax.h"  // Differences
#include "layer.h"

namespace mnist_ops::online {

// l = d - log sum exp(d), d = beta x - max beta x.
template <typename T>
class LogSoftmax final : public Layer<T> {
 public:
  LogSoftmax(const Map<T>& input, const Map<T>& output, double beta)
      : Layer<T>(input, output), difference_(beta) {}

  bool needs_output() const override { return true; }

  void prepare_forward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T* x = this->in.value;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, difference_.scaled(x[i]));
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) sum += cpu::exp(difference_(x[i], largest));
    const T log_sum = std::log(sum);
    for (int64_t i = 0; i < n; ++i) this->out.value[i] = difference_(x[i], largest) - log_sum;
  }

  void prepare_backward(const Step<T>&, const Workers&) override {
    const int64_t n = this->in.shape.C;
    const T *l = this->out.value, *g = this->out.grad;
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) sum += g[i];
    for (int64_t i = 0; i < n; ++i) {
      this->in.grad[i] = log_softmax_gradient(g[i], l[i], sum, difference_.beta);
    }
  }

 private:
  Differences<T> difference_;
};

// Torch7's: an approximate exponential in the sum forward, the exact one backward; sums in double.
template <typename T>
class Torch7LogSoftmax final : public Layer<T> {
 public:
  using Layer<T>::Layer;

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
      this->in.grad[i] = torch7_log_softmax_gradient(g[i], l[i], sum);
    }
  }
};

}  // namespace mnist_ops::online
