// What the CPU kernels share: parallel loops, conversion of half types.
//
// These sources are compiled for the baseline, for AVX2 + FMA and for AVX-512 (setup.py); loops are
// plain C++ that the compiler vectorises for each. Everything is inline or in an anonymous
// namespace, and only one of the libraries is ever loaded.
#pragma once

#include "../common.h"
#include "../elementary.h"

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

using elementary::exp;
using elementary::exp_of_negative;
using elementary::fmadd;
using elementary::log;
using elementary::power;
using elementary::Quotient;
using elementary::tanh;

// fmadd for sums whose float32 bits count on every processor: the product of two floats is exact in
// float64.
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

// A register of numbers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

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

}  // namespace mnist_ops::cpu
