// Norms of windows and their gradients on the CPU: loops over a batch of windows that were
// gathered, and the reports' windows (2 x 2, p = 2, float32) in the registers of a processor with
// AVX2.
#pragma once

#include "../lp_pool.h"

#include "common.h"

namespace mnist_ops::cpu {

// The windows [first, last) of a row whose tap at column offset kw lies inside the image.
struct Range {
  int64_t first, last;
};

inline Range windows_with_tap(const PoolGeometry& g, int64_t kw) {
  const int64_t lead = g.padding_w - kw;  // ow * stride >= lead
  const int64_t first = lead > 0 ? (lead + g.stride_w - 1) / g.stride_w : 0;
  const int64_t limit = g.W - 1 + lead;  // ow * stride <= limit
  return {first, limit < 0 ? 0 : std::min(g.OW, limit / g.stride_w + 1)};
}

// ------------------------------------------------------------------------------ powers and roots

// Norms that have loops of their own.
enum class Power { kOne, kTwo, kThree, kFour, kInf, kGeneral };

template <Power power>
constexpr bool kSumsPlainly = power != Power::kInf && power != Power::kGeneral;

// |x|^p, of a norm that sums plainly.
template <Power power, typename A>
MNIST_OPS_HD A term(A x) {
  if constexpr (power == Power::kOne) return magnitude(x);
  if constexpr (power == Power::kTwo) return x * x;
  if constexpr (power == Power::kThree) return magnitude(x) * (x * x);
  if constexpr (power == Power::kFour) return (x * x) * (x * x);
  return A(0);
}

// (|x| / largest)^p.
template <Power power, typename A>
MNIST_OPS_HD A scaled_term(A x, A largest, A p) {
  if constexpr (power == Power::kGeneral) return cpu::power(Quotient<A>(magnitude(x), largest), p);
  return term<power>(x / largest);
}

template <Power power, typename A>
MNIST_OPS_HD A root(A sum, A p) {
  if constexpr (power == Power::kTwo) return std::sqrt(sum);
  if constexpr (power == Power::kThree) {
    // 1 / 3 is rounded, which a step of Newton's mends.
    const A y = cpu::power(sum, A(1) / A(3));
    return y - (y * y * y - sum) / (A(3) * y * y);
  }
  if constexpr (power == Power::kFour) return std::sqrt(std::sqrt(sum));
  if constexpr (power == Power::kGeneral) return cpu::power(sum, A(1) / p);
  return sum;
}

// dy/dx; for p = inf without the division by the ties, for a y that is above 0 or NaN.
template <Power power, typename A>
MNIST_OPS_HD A slope(A x, A y, A p) {
  if constexpr (power == Power::kOne) return sign_of(x);
  if constexpr (power == Power::kInf) {
    const A s = x == -y ? A(-1) : A(0);
    return x == y ? A(1) : s;
  }
  if constexpr (power == Power::kGeneral) {
    const Quotient<A> ratio(magnitude(x), y);
    A s = cpu::power(ratio, p - A(1));
    // Where y overflowed.
    s = ratio.value == A(0) && p < A(1) ? std::numeric_limits<A>::infinity() : s;
    s = ratio.value != ratio.value ? ratio.value : x < A(0) ? -s : s;
    return x == A(0) || y == A(0) ? A(0) : s;
  } else {
    const A ratio = x / y;
    A s = ratio;
    if constexpr (power == Power::kThree) s = ratio * magnitude(ratio);
    if constexpr (power == Power::kFour) s = ratio * (ratio * ratio);
    return y == A(0) ? A(0) : s;
  }
}

// ----------------------------------------------------------------------------- loops over a batch
//
// taps[k][j] is the k-th element of window j, taps `pitch` apart; count and pitch are multiples of
// kStep. A kernel size known to the compiler, kTaps, keeps a window in registers; it is 0
// elsewhere.

constexpr int64_t kStep = 16;

template <typename A>
struct Batch {
  A* taps;
  int64_t pitch, count, runtime_taps;

  // out[j] = combine over the window of add(so far, x, j), beginning with start.
  template <int kTaps, typename F>
  void fold(A* out, A start, const F& add) const {
    const int64_t stride = pitch;
    if constexpr (kTaps > 0) {
      const A* const x = taps;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        A result = start;
#pragma GCC unroll 16
        for (int k = 0; k < kTaps; ++k) result = add(result, x[k * stride + j], j);
        out[j] = result;
      }
    } else {
      std::fill(out, out + count, start);
      for (int64_t k = 0; k < runtime_taps; ++k) {
        const A* const x = taps + k * stride;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) out[j] = add(out[j], x[j], j);
      }
    }
  }

  // out[j] = the sum over the window of term(x, j), as BlockSum adds it.
  template <int kTaps, typename F>
  void sum(A* out, const F& term) const {
    if (kTaps > 0 || runtime_taps <= kBlockTerms) {
      return fold<kTaps>(out, A(0), [&](A sum, A x, int64_t j) { return sum + term(x, j); });
    }
    std::vector<double> totals(count);
    for (int64_t first = 0; first < runtime_taps; first += kBlockTerms) {
      const Batch block{taps + first * pitch, pitch, count,
                        std::min(kBlockTerms, runtime_taps - first)};
      block.template sum<0>(out, term);
      for (int64_t j = 0; j < count; ++j) totals[j] += static_cast<double>(out[j]);
    }
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<A>(totals[j]);
  }

  // Every element in place.
  template <int kTaps, typename F>
  void map(const F& value) const {
    const int64_t n = kTaps > 0 ? kTaps : runtime_taps;
    for (int64_t k = 0; k < n; ++k) {
      A* const x = taps + k * pitch;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) x[j] = value(x[j], j);
    }
  }
};

// Beyond this the rounding of y, in half types, would count too much in r^(p-1).
constexpr int kSharpBatchPower = 32;

// The largest magnitude of each window; NaN if there is one in it.
template <int kTaps, typename A>
void batch_largest(const Batch<A>& batch, A* largest) {
  batch.template fold<kTaps>(largest, A(0), [](A m, A x, int64_t) {
    const A size = magnitude(x);
    return size > m || size != size ? size : m;
  });
}

// The p-norms of a batch of windows. scratch has room for a number each.
template <Power power, int kTaps, typename A>
void batch_norms(const Batch<A>& batch, int64_t exact_count, A p, A* y, A* scratch) {
  const int64_t n = batch.count;
  if constexpr (kSumsPlainly<power>) {
    batch.template sum<kTaps>(y, [](A x, int64_t) { return term<power>(x); });
    if constexpr (power == Power::kOne) return;
    A unsafe = A(0);
#pragma omp simd reduction(+ : unsafe)
    for (int64_t j = 0; j < exact_count; ++j) unsafe += unsafety_of_square_sum(y[j]);
    if (unsafe == A(0)) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) y[j] = root<power>(y[j], p);
      return;
    }
  }
  // By way of the largest element, which stands as it is where it is 0, infinite or NaN.
  A* const largest = scratch;
  batch_largest<kTaps>(batch, largest);
  if constexpr (power == Power::kInf) {
    std::copy(largest, largest + n, y);
  } else {
    batch.template sum<kTaps>(y,
                              [=](A x, int64_t j) { return scaled_term<power>(x, largest[j], p); });
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A m = largest[j];
      const A norm = m * root<power>(y[j], p);
      y[j] = m > A(0) && m <= std::numeric_limits<A>::max() ? norm : m;
    }
  }
}

// The gradients of a batch of windows, in place of their elements; grad and y are overwritten.
template <Power power, int kTaps, typename A>
void batch_gradients(const Batch<A>& batch, A p, A* grad, A* y, A* scratch) {
  if constexpr (power == Power::kGeneral) {
    if (p > kSharpBatchPower) {  // sharp_gradient of lp_pool.h
      A* const largest = scratch;
      batch_largest<kTaps>(batch, largest);
      batch.template sum<kTaps>(
          y, [=](A x, int64_t j) { return scaled_term<power>(x, largest[j], p); });
      const int64_t n = batch.count;
      for (int64_t j = 0; j < n; ++j) {
        const A m = largest[j];
        const bool is_number = m > A(0) && m <= std::numeric_limits<A>::max();
        grad[j] *= is_number ? cpu::power(y[j], A(1) / p - A(1)) : A(1);
        y[j] = m;
      }
    }
  }
  if constexpr (power == Power::kInf) {
    A* const ties = scratch;
    batch.template fold<kTaps>(ties, A(0), [=](A sum, A x, int64_t j) {
      return sum + (std::fabs(x) == y[j] ? A(1) : A(0));
    });
    const int64_t n = batch.count;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A share = ties[j] > A(0) ? grad[j] / ties[j] : grad[j];
      grad[j] = y[j] != y[j] ? y[j] : share;
      y[j] = y[j] > A(0) ? y[j] : std::numeric_limits<A>::quiet_NaN();  // no element is equal
    }
  }
  batch.template map<kTaps>([=](A x, int64_t j) { return grad[j] * slope<power>(x, y[j], p); });
}

// The loops for one norm and window size. The dtypes that are computed in A share them.
template <typename A>
struct BatchLoops {
  void (*norms)(const Batch<A>& batch, int64_t exact_count, A p, A* y, A* scratch);
  void (*gradients)(const Batch<A>& batch, A p, A* grad, A* y, A* scratch);
};

template <Power power, typename A>
BatchLoops<A> loops_of_size(int64_t taps) {
  if constexpr (power == Power::kOne || power == Power::kTwo || power == Power::kInf) {
    if (taps == 4) return {batch_norms<power, 4, A>, batch_gradients<power, 4, A>};
    if (taps == 9) return {batch_norms<power, 9, A>, batch_gradients<power, 9, A>};
  }
  return {batch_norms<power, 0, A>, batch_gradients<power, 0, A>};
}

template <typename A>
BatchLoops<A> loops_of(double p, int64_t taps) {
  switch (norm_of(p)) {
    case Norm::kOne:
      return loops_of_size<Power::kOne, A>(taps);
    case Norm::kTwo:
      return loops_of_size<Power::kTwo, A>(taps);
    case Norm::kInf:
      return loops_of_size<Power::kInf, A>(taps);
    case Norm::kGeneral:
      break;
  }
  return p == 3   ? loops_of_size<Power::kThree, A>(taps)
         : p == 4 ? loops_of_size<Power::kFour, A>(taps)
                  : loops_of_size<Power::kGeneral, A>(taps);
}

// -------------------------------------------------------------------- 2 x 2 windows, not gathered
//
// The reports' pooling, p = 2 with disjoint windows of 2 x 2 in float32, in NHWC: four pixels make
// one, channel by channel. Where numbers would have to be scaled these say so, and nothing that
// they wrote counts.

// Norms and gradients of which the quotient, times an element of the window, is sure to be a
// number.
constexpr float kSmallNorm = 1e-18f, kLargeNumber = 1e18f;

inline bool pixel_norms(const float* upper, const float* lower, float* y, int64_t channels) {
  const float *a = upper, *b = upper + channels, *c = lower, *d = lower + channels;
  float unsafe = 0;
#pragma omp simd reduction(+ : unsafe)
  for (int64_t j = 0; j < channels; ++j) {
    const float sum = a[j] * a[j] + b[j] * b[j] + c[j] * c[j] + d[j] * d[j];
    unsafe += unsafety_of_square_sum(sum);
    y[j] = std::sqrt(sum);
  }
  return unsafe == 0;
}

inline bool pixel_gradients(const float* upper, const float* lower, const float* y,
                            const float* grad, float* to_upper, float* to_lower, int64_t channels) {
  const float *a = upper, *b = upper + channels, *c = lower, *d = lower + channels;
  float *ga = to_upper, *gb = to_upper + channels, *gc = to_lower, *gd = to_lower + channels;
  float unsafe = 0;
#pragma omp simd reduction(+ : unsafe)
  for (int64_t j = 0; j < channels; ++j) {
    const float small = y[j] >= kSmallNorm ? 0.0f : 1.0f;
    const float large = y[j] <= kLargeNumber ? 0.0f : 1.0f;
    const float large_gradient = std::fabs(grad[j]) <= kLargeNumber ? 0.0f : 1.0f;
    unsafe += small + large + large_gradient;
    const float ratio = grad[j] / y[j];
    ga[j] = a[j] * ratio;
    gb[j] = b[j] * ratio;
    gc[j] = c[j] * ratio;
    gd[j] = d[j] * ratio;
  }
  return unsafe == 0;
}

// ------------------------------------------------------------------- 2 x 2 windows in registers
//
// The same windows in NCHW: two rows of pixels make a row of windows. In a register the numbers of
// eight windows stand in the order 0 1 4 5 2 3 6 7, as one shuffle of two vectors leaves them.
// Portable vectors, with the roots of a row in a loop of their own, took 1.6 to 2.6 times as long
// forward in rows of 14 windows.

#if defined(__AVX2__)
constexpr bool kHasPairs = true;

inline __m256 every_other(const float* x, bool odd) {
  const __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
  return odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
}

// From that order to 0 to 7, and back: it is its own inverse.
inline __m256 swap_middle(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

inline bool all_between(__m256 v, float lower, float upper) {
  const __m256 above = _mm256_cmp_ps(v, _mm256_set1_ps(lower), _CMP_GE_OQ);
  const __m256 below = _mm256_cmp_ps(v, _mm256_set1_ps(upper), _CMP_LE_OQ);
  return _mm256_movemask_ps(_mm256_and_ps(above, below)) == 0xff;
}

// Eight windows, or fewer, gathered for the loops over a batch, which know every number.
struct EightWindows {
  float taps[4 * kStep] = {};

  EightWindows(const float* upper, const float* lower, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      taps[j] = upper[2 * j], taps[kStep + j] = upper[2 * j + 1];
      taps[2 * kStep + j] = lower[2 * j], taps[3 * kStep + j] = lower[2 * j + 1];
    }
  }
  Batch<float> batch() { return {taps, kStep, kStep, 4}; }
};

inline void norms_of_few(const float* upper, const float* lower, float* y, int64_t count) {
  EightWindows windows(upper, lower, count);
  float norms[kStep], scratch[kStep];
  batch_norms<Power::kTwo, 4>(windows.batch(), count, 2.0f, norms, scratch);
  std::copy(norms, norms + count, y);
}

inline void gradients_of_few(const float* upper, const float* lower, const float* y,
                             const float* grad, float* to_upper, float* to_lower, int64_t count) {
  EightWindows windows(upper, lower, count);
  float norms[kStep] = {}, grads[kStep] = {}, scratch[kStep];
  std::copy(y, y + count, norms);
  std::copy(grad, grad + count, grads);
  batch_gradients<Power::kTwo, 4>(windows.batch(), 2.0f, grads, norms, scratch);
  for (int64_t j = 0; j < count; ++j) {
    to_upper[2 * j] = windows.taps[j], to_upper[2 * j + 1] = windows.taps[kStep + j];
    to_lower[2 * j] = windows.taps[2 * kStep + j];
    to_lower[2 * j + 1] = windows.taps[3 * kStep + j];
  }
}

// Calls eight(j) for eight windows from j on, some of them twice if count is no multiple of eight,
// or few() if there are not so many.
template <typename Eight, typename Few>
[[gnu::always_inline]] inline void by_eights(int64_t count, const Eight& eight, const Few& few) {
  if (count < 8) return few();
  for (int64_t j = 0; j + 8 <= count; j += 8) eight(j);
  if (count % 8 != 0) eight(count - 8);
}

// The norms of `count` windows of two rows.
inline void pair_norms(const float* upper, const float* lower, float* y, int64_t count) {
  const auto eight = [&](int64_t j) {
    const float *u = upper + 2 * j, *l = lower + 2 * j;
    const auto square = [](__m256 v) { return _mm256_mul_ps(v, v); };
    __m256 sum = _mm256_add_ps(square(every_other(u, false)), square(every_other(u, true)));
    sum = _mm256_add_ps(sum, square(every_other(l, false)));
    sum = _mm256_add_ps(sum, square(every_other(l, true)));
    if (all_between(sum, SafeSquares<float>::lower, SafeSquares<float>::upper)) {
      _mm256_storeu_ps(y + j, _mm256_sqrt_ps(swap_middle(sum)));
    } else {
      norms_of_few(u, l, y + j, 8);
    }
  };
  by_eights(count, eight, [&] { norms_of_few(upper, lower, y, count); });
}

// Their gradients. One division a window.
inline void pair_gradients(const float* upper, const float* lower, const float* y,
                           const float* grad, float* to_upper, float* to_lower, int64_t count) {
  const auto eight = [&](int64_t j) {
    const float *u = upper + 2 * j, *l = lower + 2 * j;
    float *gu = to_upper + 2 * j, *gl = to_lower + 2 * j;
    const __m256 norms = _mm256_loadu_ps(y + j), grads = _mm256_loadu_ps(grad + j);
    const __m256 sizes = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), grads);
    if (!all_between(norms, kSmallNorm, kLargeNumber) || !all_between(sizes, 0.0f, kLargeNumber)) {
      return gradients_of_few(u, l, y + j, grad + j, gu, gl, 8);
    }
    const __m256 ratio = swap_middle(_mm256_div_ps(grads, norms));
    const auto row = [ratio](const float* x, float* to) {
      const __m256 even = _mm256_mul_ps(every_other(x, false), ratio);
      const __m256 odd = _mm256_mul_ps(every_other(x, true), ratio);
      _mm256_storeu_ps(to, _mm256_unpacklo_ps(even, odd));
      _mm256_storeu_ps(to + 8, _mm256_unpackhi_ps(even, odd));
    };
    row(u, gu);
    row(l, gl);
  };
  by_eights(count, eight,
            [&] { gradients_of_few(upper, lower, y, grad, to_upper, to_lower, count); });
}
#else
constexpr bool kHasPairs = false;
inline void pair_norms(const float*, const float*, float*, int64_t) {}
inline void pair_gradients(const float*, const float*, const float*, const float*, float*, float*,
                           int64_t) {}
#endif

}  // namespace mnist_ops::cpu
