// Phases of online SGD: subtractive normalization.
#pragma once

#include "online_step.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {

// What a blur reads from the workspace is asked for early: the taps of a short separable kernel go
// into the block's own memory, behind its planes, and each thread gets the coefficient of its first
// pixel. To be followed by a wait_for_copies() of all threads.
template <typename T>
__device__ __forceinline__ T load_blur(const BlurPlan& b, const Step<T>& s, T* shared) {
  if (b.source != MeanSource::kMap && b.source != MeanSource::kSum) return T(1);
  const int32_t pixels = b.H * b.W, i = thread_index();
  if (blurs_by_short_taps(b) && i < b.taps_w) {
    copy_pack<1>(shared + 2 * pixels + (b.adjoint ? b.taps_w - 1 - i : i), s.at(b.taps) + i);
  }
  return i < pixels ? s.at(b.coef)[i] : T(1);
}

template <typename T>
__device__ __forceinline__ T coef_at(const BlurPlan& b, const Step<T>& s, T own, int32_t i) {
  return i == thread_index() ? own : s.at(b.coef)[i];
}

// From the sums over the channels, in `shared`, to the plane, there too. The sums of an adjoint
// blur come divided by the coefficients. All threads of a block come here.
template <typename T>
__device__ const T* finish_mean(const BlurPlan& b, const Step<T>& s, T own_coef, T* shared) {
  const int32_t pixels = b.H * b.W;
  const Divider across(b.W);
  const bool is_short = blurs_by_short_taps(b), flip = b.adjoint && !is_short;
  const T channels = static_cast<T>(b.C);
  T* sum = shared;
  T* mean = shared + pixels;
  const T* taps = is_short ? shared + 2 * pixels : s.at(b.taps);
  wait_for_copies();
  __syncthreads();
  if (b.separable) {
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
      const int32_t h = across.quotient(i), w = i - h * b.W;
      mean[i] = blur_line_at(sum + h * b.W, 1, b.W, taps, b.taps_w, flip, w);
    }
    __syncthreads();
    T* rows = mean;
    mean = sum;
    sum = rows;
  }
  for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
    const int32_t h = across.quotient(i), w = i - h * b.W;
    const T total = b.separable ? blur_line_at(sum + w, b.W, b.H, taps, b.taps_h, flip, h)
                                : blur_at(b, sum, taps, h, w);
    const T blurred = total / channels;
    mean[i] = b.adjoint ? blurred : blurred / coef_at(b, s, own_coef, i);
  }
  __syncthreads();
  return mean;
}

// The plane that a normalization subtracts from every channel of a map, or of a gradient, where the
// whole block can read it: computed in `shared` (mean_numbers() of them), or there already. To be
// called by all threads of a block.
template <typename T>
__device__ const T* prepare_mean(const BlurPlan& b, const Step<T>& s, const T* map, T* shared) {
  if (b.source == MeanSource::kNone) return nullptr;
  if (b.source == MeanSource::kReady) return s.at(b.mean);
  const T own_coef = load_blur(b, s, shared);
  const int32_t pixels = b.H * b.W;
  if (b.source == MeanSource::kMap) {
    constexpr int kAtOnce = 4;
    const int32_t lane = thread_index() % kWarp, warps = thread_count() / kWarp;
    for (int32_t i = thread_index() / kWarp; i < pixels; i += kAtOnce * warps) {
      T total[kAtOnce] = {};
#pragma unroll 2
      for (int32_t c = lane; c < b.C; c += kWarp) {
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          if (i + q * warps < pixels) total[q] += map[(i + q * warps) * b.C + c];
        }
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        total[q] = lane_sum(total[q], kWarp);
        if (lane == 0 && i + q * warps < pixels) shared[i + q * warps] = total[q];
      }
    }
    if (b.adjoint) {
      __syncthreads();
      for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
        shared[i] /= coef_at(b, s, own_coef, i);
      }
    }
  } else {
    const T* sums = s.at(b.sum);
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
      T total = T(0);
#pragma unroll 8
      for (int32_t j = 0; j < b.parts; ++j) total += sums[j * pixels + i];
      shared[i] = b.adjoint ? total / coef_at(b, s, own_coef, i) : total;
    }
  }
  return finish_mean(b, s, own_coef, shared);
}

template <typename T>
__device__ void channel_sums(const Phase& p, const Step<T>& s) {
  const BlurPlan& b = p.blur;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  each_task(p, s, [&](int32_t task) {
    const int32_t i = task * warps + warp;
    if (i >= b.H * b.W) return;
    T total = T(0);
    for (int32_t c = lane; c < b.C; c += kWarp) total += s.map(p.x)[i * b.C + c];
    total = lane_sum(total, kWarp);
    if (lane == 0) s.at(b.sum)[i] = b.adjoint ? total / s.at(b.coef)[i] : total;
  });
}

template <typename T>
__device__ void mean_plane(const Phase& p, const Step<T>& s) {
  const BlurPlan& b = p.blur;
  const T channels = static_cast<T>(b.C);
  each_element(p, s, b.H * b.W, [&](int32_t i) {
    const T blurred = blur_at(b, s.at(b.sum), s.at(b.taps), i / b.W, i % b.W) / channels;
    s.at(b.mean)[i] = b.adjoint ? blurred : blurred / s.at(b.coef)[i];
  });
}

template <typename T>
__device__ void subtract_mean(const Phase& p, const Step<T>& s, T* shared) {
  const T* x = s.map(p.x);
  const T* mean = prepare_mean(p.blur, s, x, shared);
  each_element(p, s, p.C * p.H * p.W, [&](int32_t i) { s.at(p.y)[i] = x[i] - mean[i / p.C]; });
}

}  // namespace mnist_ops::cuda
