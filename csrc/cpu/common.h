// What the CPU kernels share: parallel loops, conversion of half types, a vectorisable exponential.
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

// ------------------------------------------------------------------------ exponential and powers
//
// No branch, no call, no integer operation that AVX2 lacks for 64 bits: a loop around these
// functions is vectorised, in float32 and in float64.

template <typename To, typename From>
MNIST_OPS_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Adding kRound rounds to an integer, which is then in the low bits.
template <typename A>
struct Rounding;
template <>
struct Rounding<float> {
  using Bits = uint32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kBias = 127;
};
template <>
struct Rounding<double> {
  using Bits = uint64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023;
};

// 2^n of a whole number n that has an exponent.
template <typename A>
MNIST_OPS_HD A power_of_two(A n) {
  using R = Rounding<A>;
  const auto bits = bits_as<typename R::Bits>(n + R::kRound);
  return bits_as<A>((bits + R::kBias) << R::kMantissa);  // what is above the exponent falls off
}

// x 2^n for whole n beyond what one exponent holds: n runs from -150 to 128, or -1076 to 1024.
template <typename A>
MNIST_OPS_HD A times_power_of_two(A x, A n) {
  const A half = (n * A(0.5) + Rounding<A>::kRound) - Rounding<A>::kRound;
  return x * power_of_two(half) * power_of_two(n - half);
}

// exp(r) for |r| <= 0.35, by a polynomial.
MNIST_OPS_HD float exp_near_zero(float r) {
  float p = 1.9875691500e-4f;
  p = fmadd(p, r, 1.3981999507e-3f);
  p = fmadd(p, r, 8.3334519073e-3f);
  p = fmadd(p, r, 4.1665795894e-2f);
  p = fmadd(p, r, 1.6666665459e-1f);
  p = fmadd(p, r, 5.0000001201e-1f);
  return fmadd(p * r, r, r) + 1.0f;
}

MNIST_OPS_HD double exp_near_zero(double r) {
  double p = 1.0 / 6227020800.0;  // Taylor to degree 13: the remainder is below 5e-18
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
  return fmadd(p * r, r, r) + 1.0;
}

// exp(x) = 2^k exp(r), k the integer nearest to x / ln 2, r = x - k ln 2 in two parts. Within 2
// units in the last place of the true value; 0 and infinity beyond the range; NaN stays NaN.
MNIST_OPS_HD float exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float k = fmadd(x, 1.44269504088896341f, Rounding<float>::kRound) - Rounding<float>::kRound;
  float r = fmadd(k, -0.693359375f, x);
  r = fmadd(k, 2.12194440e-4f, r);
  return times_power_of_two(exp_near_zero(r), k);
}

MNIST_OPS_HD double exp(double x) {
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double k =
      fmadd(x, 1.4426950408889634, Rounding<double>::kRound) - Rounding<double>::kRound;
  double r = fmadd(k, -0.693147180369123816490, x);
  r = fmadd(k, -1.90821492927058770002e-10, r);
  return times_power_of_two(exp_near_zero(r), k);
}

// The logarithm to base 2 of a positive, finite number: its whole part, and the fraction, in
// [-1/2, 1/2], to full relative precision. With m in [sqrt(1/2), sqrt(2)] and s = (m - 1) / (m + 1)
// it is 2 / ln 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| <= 0.172.
template <typename A>
struct Log2 {
  A whole, fraction;
};

MNIST_OPS_HD Log2<float> log2_of(float x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3;
  const bool subnormal = x < 1.17549435e-38f;
  x = subnormal ? x * 16777216.0f : x;
  const uint32_t bits = bits_as<uint32_t>(x) + (0x3f800000 - kRootHalf);
  const float whole = static_cast<float>(static_cast<int32_t>(bits >> 23)) - 127.0f;
  const float m = bits_as<float>((bits & 0x007fffff) + kRootHalf);
  const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
  float p = 3.2059890e-1f;  // 2 / (9 ln 2)
  p = fmadd(p, t, 4.1219858e-1f);
  p = fmadd(p, t, 5.7707802e-1f);
  p = fmadd(p, t, 9.6179669e-1f);
  p = fmadd(p, t, 2.8853901e+0f);
  return {subnormal ? whole - 24.0f : whole, p * s};
}

MNIST_OPS_HD Log2<double> log2_of(double x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  constexpr double kTwoOverLn2 = 2.885390081777926814720;
  const bool subnormal = x < 2.2250738585072014e-308;
  x = subnormal ? x * 18014398509481984.0 : x;  // 2^54
  const uint64_t bits = bits_as<uint64_t>(x) + (0x3ff0000000000000 - kRootHalf);
  // From an integer to float64 by way of the mantissa: AVX2 has no such conversion.
  const double whole =
      bits_as<double>((bits >> 52) + 0x4338000000000000) - (Rounding<double>::kRound + 1023.0);
  const double m = bits_as<double>((bits & 0x000fffffffffffff) + kRootHalf);
  const double s = (m - 1.0) / (m + 1.0), t = s * s;
  double p = kTwoOverLn2 / 21;
  p = fmadd(p, t, kTwoOverLn2 / 19);
  p = fmadd(p, t, kTwoOverLn2 / 17);
  p = fmadd(p, t, kTwoOverLn2 / 15);
  p = fmadd(p, t, kTwoOverLn2 / 13);
  p = fmadd(p, t, kTwoOverLn2 / 11);
  p = fmadd(p, t, kTwoOverLn2 / 9);
  p = fmadd(p, t, kTwoOverLn2 / 7);
  p = fmadd(p, t, kTwoOverLn2 / 5);
  p = fmadd(p, t, kTwoOverLn2 / 3);
  p = fmadd(p, t, kTwoOverLn2);
  return {subnormal ? whole - 54.0 : whole, p * s};
}

// The natural logarithm of a positive number; infinity and NaN stay.
template <typename A>
MNIST_OPS_HD A log(A x) {
  constexpr A kLn2 = A(0.693147180559945309417);
  constexpr A kLn2High = std::is_same_v<A, float> ? A(0.693359375) : A(0.693147180369123816490);
  constexpr A kLn2Low =
      std::is_same_v<A, float> ? A(-2.12194440e-4) : A(1.90821492927058770002e-10);
  const Log2<A> parts = log2_of(x);
  const A value = fmadd(parts.whole, kLn2High, fmadd(parts.fraction, kLn2, parts.whole * kLn2Low));
  return x <= std::numeric_limits<A>::max() ? value : x;
}

// x^p for finite x >= 0, and 0 for x = 0 whatever p is. The logarithm's whole part is multiplied by
// p without rounding, so the error does not grow with its size: p + 2 units in the last place.
template <typename A>
MNIST_OPS_HD A power(A x, A p) {
  constexpr A kLowest = std::is_same_v<A, float> ? A(-150) : A(-1076);
  constexpr A kHighest = std::is_same_v<A, float> ? A(128) : A(1024);
  const Log2<A> log = log2_of(x);
  const A product = p * log.whole;
  const A rest = fmadd(p, log.fraction, fmadd(p, log.whole, -product));
  A n = product + rest;
  n = n < kLowest ? kLowest : n;
  n = n > kHighest ? kHighest : n;
  n = (n + Rounding<A>::kRound) - Rounding<A>::kRound;
  A f = (product - n) + rest;
  f = f < A(-1) ? A(-1) : f;  // beyond the range, where n stopped
  f = f > A(1) ? A(1) : f;
  const A value = times_power_of_two(exp_near_zero(f * A(0.693147180559945309417)), n);
  return x == A(0) ? A(0) : value;
}

}  // namespace mnist_ops::cpu
