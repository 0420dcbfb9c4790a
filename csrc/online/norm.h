// Subtractive normalization of a map: csrc/local_norm.h has the formulas.
//
// One pass over the map for the sum over channels, the blur of one plane, one pass to subtract.
#pragma once

#include "../cpu/blur.h"
#include "layer.h"

namespace mnist_ops::online {

template <typename T>
class SubtractiveNorm final : public Layer<T> {
 public:
  SubtractiveNorm(const Map<T>& input, const Map<T>& output, const Tensor& kernel)
      : Layer<T>(input, output),
        blur_("online_sgd", kernel, input.shape.H, input.shape.W),
        sum_(input.shape.pixels()),
        mean_(input.shape.pixels()),
        scratch_(input.shape.pixels()) {}

  void prepare_forward(const Step<T>&, const Workers&) override {
    add_channels(this->in.value);
    blur_.apply(sum_.data(), mean_.data(), scratch_.data(), false);
    const T channels = static_cast<T>(this->in.shape.C);
    for (int64_t p = 0; p < mean_.size(); ++p) {
      mean_.data()[p] = local_mean(mean_.data()[p], channels, blur_.coef[p]);
    }
  }

  void forward(int64_t b) override { subtract(this->in.value, this->out.value, b); }

  void prepare_backward(const Step<T>&, const Workers&) override {
    add_channels(this->out.grad);
    for (int64_t p = 0; p < sum_.size(); ++p) sum_.data()[p] /= blur_.coef[p];
    blur_.apply(sum_.data(), mean_.data(), scratch_.data(), true);
    const T channels = static_cast<T>(this->in.shape.C);
    for (int64_t p = 0; p < mean_.size(); ++p) mean_.data()[p] /= channels;
  }

  void backward(int64_t b) override { subtract(this->out.grad, this->in.grad, b); }

 private:
  void add_channels(const T* x) {
    const int64_t C = this->in.shape.C, block = this->in.block();
    const int64_t whole = C / kLanes<T>, rest = C % kLanes<T>;
    for (int64_t p = 0; p < sum_.size(); ++p) {
      T lanes[kLanes<T>] = {};
      const T* from = x + p * kLanes<T>;
      for (int64_t b = 0; b < whole; ++b, from += block) {
        for (int64_t l = 0; l < kLanes<T>; ++l) lanes[l] += from[l];
      }
      for (int64_t l = 0; l < rest; ++l) lanes[l] += from[l];
      for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      }
      sum_.data()[p] = lanes[0];
    }
  }

  void subtract(const T* from, T* to, int64_t b) const {
    const int64_t start = b * this->in.block();
    const T* mean = mean_.data();
    for (int64_t p = 0, i = start; p < mean_.size(); ++p, i += kLanes<T>) {
      for (int64_t l = 0; l < kLanes<T>; ++l) to[i + l] = from[i + l] - mean[p];
    }
  }

  cpu::Blur<T> blur_;
  Buffer<T> sum_, mean_, scratch_;
};

}  // namespace mnist_ops::online
