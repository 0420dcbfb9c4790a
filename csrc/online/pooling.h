// LP, maximum and average pooling of one block of channels at a time.
//
// Bound by reading the map from the first- or second-level cache; windows are taken one after the
// other, all lanes of the block at once.
#pragma once

#include "../lp_pool.h"
#include "layer.h"

namespace mnist_ops::online {

// A block of channels as the images of lp_pool.h, its lanes innermost.
template <typename T>
PoolGeometry geometry_of(const Map<T>& in, const Map<T>& out, const Window& w) {
  PoolGeometry g{};
  g.H = in.shape.H, g.W = in.shape.W, g.OH = out.shape.H, g.OW = out.shape.W;
  g.kernel_h = w.kernel_h, g.kernel_w = w.kernel_w;
  g.stride_h = w.stride_h, g.stride_w = w.stride_w;
  g.padding_h = w.padding_h, g.padding_w = w.padding_w;
  g.N = 1, g.C = kLanes<T>;
  g.in_n = g.H * g.W * g.C, g.in_c = 1, g.in_h = g.W * g.C, g.in_w = g.C;
  g.out_n = g.OH * g.OW * g.C, g.out_c = 1, g.out_h = g.OW * g.C, g.out_w = g.C;
  return g;
}

template <typename T>
class Pooling : public Layer<T> {
 public:
  Pooling(const Map<T>& input, const Map<T>& output, const LayerSpec& layer)
      : Layer<T>(input, output),
        g_(geometry_of(input, output, layer.window)),
        disjoint_(g_.stride_h == g_.kernel_h && g_.stride_w == g_.kernel_w && g_.padding_h == 0 &&
                  g_.padding_w == 0 && g_.OH * g_.kernel_h == g_.H && g_.OW * g_.kernel_w == g_.W) {
  }

  bool local() const override { return true; }

 protected:
  // A window's elements [top, bottom) x [left, right).
  struct Clipped {
    int64_t oh, ow, top, bottom, left, right;
  };

  // body(window, output offset) for every window.
  template <typename F>
  void each_window(const F& body) const {
    int64_t o = 0;
    for (int64_t oh = 0; oh < g_.OH; ++oh) {
      Clipped w{oh, 0, g_.first_row(oh), g_.last_row(oh), 0, 0};
      for (; w.ow < g_.OW; ++w.ow, o += kLanes<T>) {
        w.left = g_.first_column(w.ow), w.right = g_.last_column(w.ow);
        body(w, o);
      }
    }
  }

  // body(input offset) for every element of a window, in order.
  template <typename F>
  MNIST_OPS_HD void each_element(const Clipped& w, const F& body) const {
    for (int64_t ih = w.top; ih < w.bottom; ++ih) {
      int64_t i = (ih * g_.W + w.left) * kLanes<T>;
      for (int64_t iw = w.left; iw < w.right; ++iw, i += kLanes<T>) body(i);
    }
  }

  void clear_gradient(T* dx) const { std::fill_n(dx, this->in.block(), T(0)); }

  PoolGeometry g_;
  bool disjoint_;  // every input element lies in exactly one window
};

template <typename T, Norm norm>
class LpPooling final : public Pooling<T> {
 public:
  LpPooling(const Map<T>& input, const Map<T>& output, const LayerSpec& layer)
      : Pooling<T>(input, output, layer), p_(static_cast<T>(layer.number)) {}

  bool needs_output() const override { return true; }

  void forward(int64_t b) override {
    const T* x = this->in.value_of(b);
    T* y = this->out.value_of(b);
    if constexpr (norm == Norm::kOne || norm == Norm::kTwo) {
      this->each_window([&](const auto& window, int64_t o) {
        Vector<T> sum[kVectorsPerLine] = {};
        this->each_element(window, [&](int64_t i) {
          for (int v = 0; v < kVectorsPerLine; ++v) {
            const Vector<T> a = load(x + i + v * kWidth<T>);
            sum[v] += norm == Norm::kTwo ? a * a : a < T(0) ? -a : a;
          }
        });
        for (int v = 0; v < kVectorsPerLine; ++v) online::store(y + o + v * kWidth<T>, sum[v]);
      });
    }
    if constexpr (norm == Norm::kOne) return;
    const bool safe = norm == Norm::kTwo && all_of(y, this->out.block(), [](Vector<T> sum) {
                        return (sum >= SafeSquares<T>::lower) & (sum <= SafeSquares<T>::upper);
                      });
    if (safe) {
#pragma omp simd
      for (int64_t i = 0; i < this->out.block(); ++i) y[i] = std::sqrt(y[i]);
      return;
    }
    this->each_window([&](const auto& window, int64_t o) {
      for (int64_t l = 0; l < kLanes<T>; ++l) {
        const bool done = norm == Norm::kTwo && is_safe_square_sum(y[o + l]);
        y[o + l] = done ? std::sqrt(y[o + l])
                        : scaled_window_norm<norm>(x + l, this->g_, p_, window.oh, window.ow);
      }
    });
  }

  void backward(int64_t b) override {
    const T *x = this->in.value_of(b), *y = this->out.value_of(b);
    T *dy = this->out.grad_of(b), *dx = this->in.grad_of(b);
    if constexpr (norm == Norm::kTwo) {
      // g / y once for each window; where y is so small that it could overflow, x / y first.
      const int64_t n = this->out.block();
      const bool safe = all_of(
          y, n, [](Vector<T> norms) { return (norms == T(0)) | (norms > SafeNorm<T>::lower); });
      if (safe) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) dy[i] = y[i] == T(0) ? T(0) : dy[i] / y[i];
        if (!this->disjoint_) this->clear_gradient(dx);
        this->each_window([&](const auto& window, int64_t o) {
          Vector<T> ratio[kVectorsPerLine];
          for (int v = 0; v < kVectorsPerLine; ++v) ratio[v] = load(dy + o + v * kWidth<T>);
          this->each_element(window, [&](int64_t i) {
            for (int v = 0; v < kVectorsPerLine; ++v) {
              const int64_t at = i + v * kWidth<T>;
              const Vector<T> slope = ratio[v] * load(x + at);
              online::store(dx + at, this->disjoint_ ? slope : slope + load(dx + at));
            }
          });
        });
        return;
      }
    }
    for (int64_t ih = 0; ih < this->g_.H; ++ih) {
      for (int64_t iw = 0; iw < this->g_.W; ++iw) {
        for (int64_t l = 0; l < kLanes<T>; ++l) {
          dx[(ih * this->g_.W + iw) * kLanes<T> + l] =
              input_gradient<norm>(dy + l, x + l, y + l, this->g_, p_, ih, iw);
        }
      }
    }
  }

 private:
  T p_;
};

// The gradient goes to the first of equal maxima, as in PyTorch.
template <typename T>
class MaxPooling final : public Pooling<T> {
 public:
  using Pooling<T>::Pooling;

  bool needs_output() const override { return true; }

  void forward(int64_t b) override {
    const T* x = this->in.value_of(b);
    T* y = this->out.value_of(b);
    this->each_window([&](const auto& window, int64_t o) {
      Vector<T> best[kVectorsPerLine];
      for (auto& vector : best) vector = splat(-std::numeric_limits<T>::infinity());
      this->each_element(window, [&](int64_t i) {
        for (int v = 0; v < kVectorsPerLine; ++v) {
          const Vector<T> a = load(x + i + v * kWidth<T>);
          best[v] = (a > best[v]) | (a != a) ? a : best[v];
        }
      });
      for (int v = 0; v < kVectorsPerLine; ++v) store(y + o + v * kWidth<T>, best[v]);
    });
  }

  void backward(int64_t b) override {
    const T *x = this->in.value_of(b), *y = this->out.value_of(b);
    T *dy = this->out.grad_of(b), *dx = this->in.grad_of(b);
    this->clear_gradient(dx);
    this->each_window([&](const auto& window, int64_t o) {
      Vector<T> left[kVectorsPerLine];  // the gradient until its element is found
      for (int v = 0; v < kVectorsPerLine; ++v) left[v] = load(dy + o + v * kWidth<T>);
      this->each_element(window, [&](int64_t i) {
        for (int v = 0; v < kVectorsPerLine; ++v) {
          T* to = dx + i + v * kWidth<T>;
          const Vector<T> a = load(x + i + v * kWidth<T>);
          const auto found = (a == load(y + o + v * kWidth<T>)) | (a != a);
          store(to, load(to) + (found ? left[v] : Vector<T>{}));
          left[v] = found ? Vector<T>{} : left[v];
        }
      });
    });
  }
};

template <typename T>
class AveragePooling final : public Pooling<T> {
 public:
  AveragePooling(const Map<T>& input, const Map<T>& output, const LayerSpec& layer)
      : Pooling<T>(input, output, layer),
        count_padding_(layer.count_padding),
        divisor_(layer.divisor) {}

  void forward(int64_t b) override {
    const T* x = this->in.value_of(b);
    T* y = this->out.value_of(b);
    this->each_window([&](const auto& window, int64_t o) {
      T sum[kLanes<T>] = {};
      this->each_element(window, [&](int64_t i) {
        for (int64_t l = 0; l < kLanes<T>; ++l) sum[l] += x[i + l];
      });
      const T divisor = window_divisor<T>(this->g_, window.oh, window.ow, count_padding_, divisor_);
      for (int64_t l = 0; l < kLanes<T>; ++l) y[o + l] = sum[l] / divisor;
    });
  }

  void backward(int64_t b) override {
    const T* dy = this->out.grad_of(b);
    T* dx = this->in.grad_of(b);
    this->clear_gradient(dx);
    this->each_window([&](const auto& window, int64_t o) {
      const T divisor = window_divisor<T>(this->g_, window.oh, window.ow, count_padding_, divisor_);
      T share[kLanes<T>];
      for (int64_t l = 0; l < kLanes<T>; ++l) share[l] = dy[o + l] / divisor;
      this->each_element(window, [&](int64_t i) {
        for (int64_t l = 0; l < kLanes<T>; ++l) dx[i + l] += share[l];
      });
    });
  }

 private:
  bool count_padding_;
  int64_t divisor_;
};

}  // namespace mnist_ops::online
