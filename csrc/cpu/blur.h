// The blur of local normalization on the CPU: one plane, a separable or a whole kernel.
//
// The operators (local_norm.cpp) and the online-SGD engine (../online/norm.h) share it, and with it
// the order of additions that makes float32 images those of the original system bit for bit.
#pragma once

#include "../local_norm.h"

#include "common.h"

namespace mnist_ops::cpu {

inline long double fused_fmadd(long double a, long double b, long double c) {
  return a * b + c;
}

// Correlation of a plane with the normalised kernel, and its adjoint.
template <typename A>
struct Blur {
  int64_t H, W, taps_h, taps_w;
  bool separable;
  std::vector<A> weight[2];  // [adjoint]: taps (separable) or taps_h x taps_w, flipped for [1]
  std::vector<A> coef;

  Blur(const char* op, const Tensor& kernel, int64_t height, int64_t width) : H(height), W(width) {
    const Tensor k = kernel_in_double(kernel);
    separable = k.dim() == 1;
    taps_h = k.size(0);
    taps_w = k.size(k.dim() - 1);
    const double* values = k.const_data_ptr<double>();
    const double sum = kernel_sum(op, k);
    for (int64_t i = 0; i < k.numel(); ++i) weight[0].push_back(static_cast<A>(values[i] / sum));
    weight[1].assign(weight[0].rbegin(), weight[0].rend());
    coef.assign(H * W, A(1));
    const std::vector<A> ones(coef);
    std::vector<A> scratch(H * W);
    apply(ones.data(), coef.data(), scratch.data(), false);
  }

  // Some rows at a time, as if they were one: loops over single rows of 14 pixels are little but
  // ends.
  static constexpr int64_t kPart = 1024;  // pixels
  template <typename F>
  void in_parts(int64_t begin, int64_t end, const F& body) const {
    const int64_t most = std::max<int64_t>(kPart / W, 1);
    for (int64_t h = begin; h < end; h += most) body(h, std::min(most, end - h));
  }

  void rows(const A* in, A* out, const A* taps, int64_t begin, int64_t end) const {
    // The zeros behind a row are those before the next; sums that begin in them do not count.
    const int64_t radius = taps_w / 2, pitch = W + radius;
    std::vector<A> padded(std::max(kPart / W, int64_t{1}) * pitch + 2 * radius),
        sums(padded.size());
    in_parts(begin, end, [&](int64_t h, int64_t n) {
      for (int64_t r = 0; r < n; ++r) {
        std::copy(in + (h + r) * W, in + (h + r + 1) * W, padded.data() + radius + r * pitch);
      }
      A* sum = sums.data();
      std::fill(sum, sum + n * pitch, A(0));
      for (int64_t k = 0; k < taps_w; ++k) {
        const A weight_k = taps[k];
        const A* x = padded.data() + k;
#pragma omp simd
        for (int64_t i = 0; i < n * pitch; ++i) sum[i] += x[i] * weight_k;
      }
      for (int64_t r = 0; r < n; ++r) {
        std::copy(sum + r * pitch, sum + r * pitch + W, out + (h + r) * W);
      }
    });
  }

  void columns(const A* in, A* out, const A* taps, int64_t begin, int64_t end) const {
    in_parts(begin, end, [&](int64_t h, int64_t n) {
      std::fill(out + h * W, out + (h + n) * W, A(0));
      for (int64_t k = 0; k < taps_h; ++k) {
        const int64_t down = k - taps_h / 2;
        const int64_t first = std::max(h, -down), last = std::min(h + n, H - down);
        const A weight_k = taps[k];
        const A* x = in + down * W;
#pragma omp simd
        for (int64_t i = first * W; i < last * W; ++i) out[i] = fused_fmadd(x[i], weight_k, out[i]);
      }
    });
  }

  void whole_kernel(const A* in, A* out, const A* taps, int64_t begin, int64_t end) const {
    const int64_t radius = taps_w / 2;
    std::vector<A> padded(W + 2 * radius);
    for (int64_t h = begin; h < end; ++h) {
      A* sum = out + h * W;
      std::fill(sum, sum + W, A(0));
      for (int64_t kh = 0; kh < taps_h; ++kh) {
        const int64_t row = h + kh - taps_h / 2;
        if (row < 0 || row >= H) continue;
        std::copy(in + row * W, in + (row + 1) * W, padded.begin() + radius);
        for (int64_t kw = 0; kw < taps_w; ++kw) {
          const A weight_k = taps[kh * taps_w + kw];
          const A* x = padded.data() + kw;
#pragma omp simd
          for (int64_t w = 0; w < W; ++w) sum[w] = fused_fmadd(x[w], weight_k, sum[w]);
        }
      }
    }
  }

  // in, out and scratch are planes; in and out must differ.
  void apply(const A* in, A* out, A* scratch, bool adjoint) const {
    const A* taps = weight[adjoint].data();
    const int64_t cost = W * taps_w * (separable ? 1 : taps_h);
    if (separable) {
      parallel_for(H, cost, [=, this](int64_t h0, int64_t h1) { rows(in, scratch, taps, h0, h1); });
      parallel_for(H, cost,
                   [=, this](int64_t h0, int64_t h1) { columns(scratch, out, taps, h0, h1); });
    } else {
      parallel_for(H, cost,
                   [=, this](int64_t h0, int64_t h1) { whole_kernel(in, out, taps, h0, h1); });
    }
  }
};

}  // namespace mnist_ops::cpu
