// What the CPU kernels share: parallel loops, conversion of half types, exp and tanh that
// vectorise.
//
// These sources are compiled once for the baseline and once for AVX2 + FMA (setup.py); loops are
// plain C++ that the compiler vectorises for either. Everything is inline or in an anonymous
// namespace, and only one of the two libraries is ever loaded.
#pragma once

#include "../common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mnist_ops::cpu {

// Elements one thread should have before a second one is worth waking (about 10 us of work).
constexpr int64_t kGrain = 16384;

// Runs body(begin, end) over [0, count), each item costing about cost elements.
template <typename F>
void parallel_for(int64_t count, int64_t cost, const F& body) {
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  if (count <= grain) {
    body(int64_t{0}, count);  // small work skips the dispatch altogether
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// a * b + c, rounded once where the processor can: the source decides, not the compiler
// (-ffp-contract=off).
#if defined(__FMA__) || defined(__aarch64__)
inline float fmadd(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline double fmadd(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
#else
inline float fmadd(float a, float b, float c) {
  return a * b + c;
}
inline double fmadd(double a, double b, double c) {
  return a * b + c;
}
#endif

// The same for sums whose float32 bits count on every processor: the product of two floats is exact
// in float64.
inline double fused_fmadd(double a, double b, double c) {
  return fmadd(a, b, c);
}
inline float fused_fmadd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fmadd(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

// ---------------------------------------------------------------- half types: rows of them at once

inline void convert(const float* from, float* to, int64_t n) {
  std::copy(from, from + n, to);
}
inline void convert(const double* from, double* to, int64_t n) {
  std::copy(from, from + n, to);
}

inline void convert(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

inline void convert(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    to[i].x = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0u : rounded);
  }
}

inline void convert(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void convert(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), h);
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<Half>(from[i]);
}

// n elements in the type to compute in: the elements themselves, or a converted copy in scratch.
template <typename T>
const opmath_t<T>* load(const T* from, opmath_t<T>* scratch, int64_t n) {
  if constexpr (std::is_same_v<T, opmath_t<T>>) {
    return from;
  } else {
    convert(from, scratch, n);
    return scratch;
  }
}

// Where a row of results is computed: the destination itself, or scratch for store() to convert.
template <typename T>
opmath_t<T>* stage(T* to, opmath_t<T>* scratch) {
  if constexpr (std::is_same_v<T, opmath_t<T>>) {
    return to;
  } else {
    return scratch;
  }
}

template <typename T>
void store(const opmath_t<T>* staged, T* to, int64_t n) {
  if constexpr (!std::is_same_v<T, opmath_t<T>>) convert(staged, to, n);
}

// ---------------------------------------------------------------------------------- exponential
//
// exp(x) = 2^k exp(r), k the integer nearest to x / ln 2, r = x - k ln 2 in two parts, so that
// |r| <= 0.35, exp(r) by a polynomial. Within 2 units in the last place of the true value; 0 and
// infinity beyond the range; NaN stays NaN. No branch, and always inlined: a call would end the
// vectorisation of the loop around it.

MNIST_OPS_HD float exp(float x) {
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = fmadd(x, 1.44269504088896341f, kRound);
  const float k = shifted - kRound;
  float r = fmadd(k, -0.693359375f, x);
  r = fmadd(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmadd(p, r, 1.3981999507e-3f);
  p = fmadd(p, r, 8.3334519073e-3f);
  p = fmadd(p, r, 4.1665795894e-2f);
  p = fmadd(p, r, 1.6666665459e-1f);
  p = fmadd(p, r, 5.0000001201e-1f);
  p = fmadd(p * r, r, r) + 1.0f;
  int32_t n;
  std::memcpy(&n, &shifted, sizeof n);
  n -= 0x4b400000;  // the bits of kRound
  // 2^n in two factors: n runs from -150 to 128, beyond what one exponent field holds.
  const int32_t half = n >> 1;
  const int32_t bits0 = (half + 127) << 23, bits1 = (n - half + 127) << 23;
  float s0, s1;
  std::memcpy(&s0, &bits0, sizeof s0);
  std::memcpy(&s1, &bits1, sizeof s1);
  return p * s0 * s1;
}

MNIST_OPS_HD double exp(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double shifted = fmadd(x, 1.4426950408889634, kRound);
  const double k = shifted - kRound;
  double r = fmadd(k, -0.693147180369123816490, x);
  r = fmadd(k, -1.90821492927058770002e-10, r);
  double p =
      1.0 / 6227020800.0;  // Taylor to degree 13: the remainder is below 5e-18 for |r| <= 0.35
  p = fmadd(p, r, 1.0 / 479001600.0);
  p = fmadd(p, r, 1.0 / 39916800.0);
  p = fmadd(p, r, 1.0 / 3628800.0);
  p = fmadd(p, r, 1.0 / 362880.0);
  p = fmadd(p, r, 1.0 / 40320.0);
  p = fmadd(p, r, 1.0 / 5040.0);
  p = fmadd(p, r, 1.0 / 720.0);
  p = fmadd(p, r, 1.0 / 120.0);
  p = fmadd(p, r, 1.0 / 24.0);
  p = fmadd(p, r, 1.0 / 6.0);
  p = fmadd(p, r, 0.5);
  p = fmadd(p * r, r, r) + 1.0;
  int64_t n;
  std::memcpy(&n, &shifted, sizeof n);
  n -= 0x4338000000000000;
  const int64_t half = n / 2;
  const int64_t bits0 = (half + 1023) << 52, bits1 = (n - half + 1023) << 52;
  double s0, s1;
  std::memcpy(&s0, &bits0, sizeof s0);
  std::memcpy(&s1, &bits1, sizeof s1);
  return p * s0 * s1;
}

// -------------------------------------------------------------------------------------------- tanh
//
// tanh|x| = -t / (t + 2) with t = expm1(-2|x|) = 2^k p + (2^k - 1), where p = expm1(r) is a
// polynomial in r = -2|x| - k ln 2. Nothing cancels: t keeps its relative precision down to the
// smallest x, so the result is within 3 units in the last place everywhere. No branch and no call,
// so loops over it vectorise. NaN stays NaN.

MNIST_OPS_HD float tanh(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float a = std::fabs(x);
  a = a > 10.0f ? 10.0f : a;  // tanh is 1 there already
  const float y = -2.0f * a;
  const float shifted = fmadd(y, 1.44269504088896341f, kRound);
  const float k = shifted - kRound;
  float r = fmadd(k, -0.693359375f, y);
  r = fmadd(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmadd(p, r, 1.3981999507e-3f);
  p = fmadd(p, r, 8.3334519073e-3f);
  p = fmadd(p, r, 4.1665795894e-2f);
  p = fmadd(p, r, 1.6666665459e-1f);
  p = fmadd(p, r, 5.0000001201e-1f);
  p = fmadd(p * r, r, r);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // the exponent of 2^k; all above k's own bits is shifted out
  float power;
  std::memcpy(&power, &bits, sizeof power);
  const float t = fmadd(power, p, power - 1.0f);
  return std::copysign(t / (t + 2.0f), x);
}

MNIST_OPS_HD double tanh(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  double a = std::fabs(x);
  a = a > 22.0 ? 22.0 : a;
  const double y = -2.0 * a;
  const double shifted = fmadd(y, 1.4426950408889634, kRound);
  const double k = shifted - kRound;
  double r = fmadd(k, -0.693147180369123816490, y);
  r = fmadd(k, -1.90821492927058770002e-10, r);
  double p = 1.0 / 6227020800.0;  // Taylor to degree 13, as in exp
  p = fmadd(p, r, 1.0 / 479001600.0);
  p = fmadd(p, r, 1.0 / 39916800.0);
  p = fmadd(p, r, 1.0 / 3628800.0);
  p = fmadd(p, r, 1.0 / 362880.0);
  p = fmadd(p, r, 1.0 / 40320.0);
  p = fmadd(p, r, 1.0 / 5040.0);
  p = fmadd(p, r, 1.0 / 720.0);
  p = fmadd(p, r, 1.0 / 120.0);
  p = fmadd(p, r, 1.0 / 24.0);
  p = fmadd(p, r, 1.0 / 6.0);
  p = fmadd(p, r, 0.5);
  p = fmadd(p * r, r, r);
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  const double t = fmadd(power, p, power - 1.0);
  return std::copysign(t / (t + 2.0), x);
}

// Both, for what is written once for all backends.
struct Functions {
  template <typename A>
  MNIST_OPS_HD static A exp(A x) {
    return cpu::exp(x);
  }
  template <typename A>
  MNIST_OPS_HD static A tanh(A x) {
    return cpu::tanh(x);
  }
};

}  // namespace mnist_ops::cpu
