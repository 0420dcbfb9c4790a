// Fully connected layers, and the flattening before them.
//
// Bound by memory: the weights are read once forward, and once more and written backward, where the
// input gradient and the update share one pass. They are used where the module has them.
#pragma once

#include "layer.h"

namespace mnist_ops::online {

template <typename T>
class Linear final : public Layer<T> {
 public:
  Linear(const Map<T>& input, const Map<T>& output, Parameter<T> weight, Parameter<T> bias)
      : Layer<T>(input, output), weight_(weight), bias_(bias), gradient_(input.shape.C) {}

  bool has_parameters() const override { return true; }

  void prepare_forward(const Step<T>&, const Workers& workers) override {
    const int64_t inputs = this->in.shape.C;
    workers.ranges(this->out.shape.C, kRows, [&](int64_t begin, int64_t end) {
      int64_t o = begin;
      for (; o + kRows <= end; o += kRows) dot_rows<kRows>(o, inputs);
      for (; o < end; ++o) dot_rows<1>(o, inputs);
    });
  }

  void prepare_backward(const Step<T>& step, const Workers& workers) override {
    const int64_t outputs = this->out.shape.C;
    workers.ranges(this->in.shape.C, kLanes<T>, [&](int64_t begin, int64_t end) {
      if (this->in.grad != nullptr) std::fill(this->in.grad + begin, this->in.grad + end, T(0));
      // Backwards: the last rows that forward read are still in cache.
      int64_t o = outputs;
      for (; o >= kRows; o -= kRows) backward_rows<kRows>(o - kRows, begin, end, step.update);
      for (; o > 0; --o) backward_rows<1>(o - 1, begin, end, step.update);
    });
    if (bias_.value != nullptr) {
      update_row(step.update, bias_.value, bias_.velocity, this->out.grad, outputs);
    }
  }

 private:
  static constexpr int kRows = 4;

  // Partial sums and their order are the same whatever the width of a vector.
  template <int kCount>
  void dot_rows(int64_t o, int64_t inputs) {
    constexpr int kV = (kCount == 1 ? 2 : 1) * kVectorsPerLine, kNumbers = kV * kWidth<T>;
    constexpr int kHalf = kLanes<T> / 2;
    const T* x = this->in.value;
    const T* w = weight_.value + o * inputs;
    Vector<T> sum[kCount][kV] = {};
    int64_t i = 0;
    for (; i + kNumbers <= inputs; i += kNumbers) {
      for (int v = 0; v < kV; ++v) {
        const Vector<T> a = load(x + i + v * kWidth<T>);
        for (int m = 0; m < kCount; ++m) {
          sum[m][v] = fmadd(a, load(w + m * inputs + i + v * kWidth<T>), sum[m][v]);
        }
      }
    }
    for (int m = 0; m < kCount; ++m) {
      T parts[kNumbers];
      std::memcpy(parts, sum[m], sizeof parts);
      for (int l = kHalf; l < kNumbers; ++l) parts[l % kHalf] += parts[l];
      T total = bias_.value ? bias_.value[o + m] : T(0);
      for (int l = 0; l < kHalf; ++l) total += parts[l];
      for (int64_t j = i; j < inputs; ++j) total += x[j] * w[m * inputs + j];
      this->out.value[o + m] = total;
    }
  }

  // Input gradient and update from kCount rows of weights, columns [begin, end).
  template <int kCount>
  void backward_rows(int64_t o, int64_t begin, int64_t end, const Update<T>& update) {
    const int64_t inputs = this->in.shape.C;
    const T* g = this->out.grad + o;
    const T* x = this->in.value;
    T* w = weight_.value + o * inputs;
    T* dx = this->in.grad;
    if (update.plain() && dx != nullptr) {
      T step[kCount];
      for (int m = 0; m < kCount; ++m) step[m] = -update.rate * g[m];
      int64_t i = begin;
      for (; i + kWidth<T> <= end; i += kWidth<T>) {
        Vector<T> sum = load(dx + i);
        const Vector<T> a = load(x + i);
        for (int m = 0; m < kCount; ++m) {
          const Vector<T> old = load(w + m * inputs + i);
          sum = fmadd(splat(g[m]), old, sum);
          store(w + m * inputs + i, fmadd(splat(step[m]), a, old));
        }
        store(dx + i, sum);
      }
      for (; i < end; ++i) {
        for (int m = 0; m < kCount; ++m) {
          const T old = w[m * inputs + i];
          dx[i] = cpu::fmadd(g[m], old, dx[i]);
          w[m * inputs + i] = cpu::fmadd(step[m], x[i], old);
        }
      }
      return;
    }
    for (int m = 0; m < kCount; ++m) {
      T* row = w + m * inputs;
      T* v = weight_.velocity ? weight_.velocity + (o + m) * inputs + begin : nullptr;
      if (dx != nullptr) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) dx[i] = cpu::fmadd(g[m], row[i], dx[i]);
      }
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) gradient_.data()[i] = g[m] * x[i];
      update_row(update, row + begin, v, gradient_.data() + begin, end - begin);
    }
  }

  Parameter<T> weight_, bias_;
  Buffer<T> gradient_;
};

// From a map to a vector in the order (c, h, w).
template <typename T>
class Flatten final : public Layer<T> {
 public:
  using Layer<T>::Layer;

  void prepare_forward(const Step<T>&, const Workers&) override {
    this->in.each_element([&](int64_t at, int64_t i) { this->out.value[i] = this->in.value[at]; });
  }

  void prepare_backward(const Step<T>&, const Workers&) override {
    this->in.each_element([&](int64_t at, int64_t i) { this->in.grad[at] = this->out.grad[i]; });
  }
};

}  // namespace mnist_ops::online
