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

  void rows(const A* in, A* out, const A* taps, int64_t begin, int64_t end) const {
    const int64_t radius = taps_w / 2;
    std::vector<A> padded(W + 2 * radius);
    for (int64_t h = begin; h < end; ++h) {
      std::copy(in + h * W, in + (h + 1) * W, padded.begin() + radius);
      A* sum = out + h * W;
      std::fill(sum, sum + W, A(0));
      for (int64_t k = 0; k < taps_w; ++k) {
        const A weight_k = taps[k];
        const A* x = padded.data() + k;
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) sum[w] += x[w] * weight_k;
      }
    }
  }

  void columns(const A* in, A* out, const A* taps, int64_t begin, int64_t end) const {
    for (int64_t h = begin; h < end; ++h) {
      A* sum = out + h * W;
      std::fill(sum, sum + W, A(0));
      for (int64_t k = 0; k < taps_h; ++k) {
        const int64_t row = h + k - taps_h / 2;
        if (row < 0 || row >= H) continue;
        const A weight_k = taps[k];
        const A* x = in + row * W;
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) sum[w] = fused_fmadd(x[w], weight_k, sum[w]);
      }
    }
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
