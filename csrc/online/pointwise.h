// Activations and dropout: in place, element by element.
#pragma once

#include "layer.h"

namespace mnist_ops::online {

template <typename T, ActivationKind kind>
class Activation final : public Layer<T> {
 public:
  using Layer<T>::Layer;

  bool local() const override { return true; }
  bool needs_output() const override { return true; }

  void forward(int64_t b) override {
    const int64_t n = this->in.block();
    const T* x = this->in.value + b * n;
    T* y = this->out.value + b * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = activation_value<kind>(x[i]);
  }

  void backward(int64_t b) override {
    const int64_t n = this->in.block();
    const T* y = this->out.value + b * n;
    const T* dy = this->out.grad + b * n;
    T* dx = this->in.grad + b * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = activation_gradient<kind>(dy[i], y[i]);
  }
};

// The random numbers come drawn, one for each element in the order (c, h, w).
template <typename T>
class Dropout final : public Layer<T> {
 public:
  Dropout(const Map<T>& input, const Map<T>& output, double p, int64_t first)
      : Layer<T>(input, output),
        keep_(1.0 - p),
        first_(first),
        factor_(input.blocks() * input.block()) {}

  bool local() const override { return true; }

  void prepare_forward(const Step<T>& step, const Workers&) override {
    const double* uniform = step.uniform + first_;
    this->in.each_element(
        [&](int64_t at, int64_t i) { factor_.data()[at] = dropout_factor<T>(uniform[i], keep_); });
  }

  void forward(int64_t b) override { multiply(this->in.value, this->out.value, b); }
  void backward(int64_t b) override { multiply(this->out.grad, this->in.grad, b); }

 private:
  void multiply(const T* from, T* to, int64_t b) {
    const int64_t n = this->in.block();
    const T* factor = factor_.data() + b * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[b * n + i] = from[b * n + i] * factor[i];
  }

  double keep_;
  int64_t first_;
  Buffer<T> factor_;
};

}  // namespace mnist_ops::online
