// Exponential, logarithm, power, sigmoid and tanh of one number, and the fused multiply-add they
// are made of: on the CPU the loops over them vectorise, and on CUDA the same polynomials give the
// same bits wherever the processor has the fused operation.
#pragma once

#include "common.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace mnist_ops::elementary {

// a * b + c, rounded once where the processor can: the source decides, not the compiler
// (-ffp-contract=off).
MNIST_OPS_HD float fmadd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
MNIST_OPS_HD double fmadd(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
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

// exp(r) - 1 for |r| <= 0.35, by a polynomial.
MNIST_OPS_HD float expm1_near_zero(float r) {
  float p = 1.9875691500e-4f;
  p = fmadd(p, r, 1.3981999507e-3f);
  p = fmadd(p, r, 8.3334519073e-3f);
  p = fmadd(p, r, 4.1665795894e-2f);
  p = fmadd(p, r, 1.6666665459e-1f);
  p = fmadd(p, r, 5.0000001201e-1f);
  return fmadd(p * r, r, r);
}

MNIST_OPS_HD double expm1_near_zero(double r) {
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
  return fmadd(p * r, r, r);
}

template <typename A>
MNIST_OPS_HD A exp_near_zero(A r) {
  return expm1_near_zero(r) + A(1);
}

// exp(x) = 2^k exp(r), k the integer nearest to x / ln 2, r = x - k ln 2 in two parts.
template <typename A>
struct ExpParts {
  A k, r, shifted;

  // k + shift is in the low bits of `shifted`.
  MNIST_OPS_HD explicit ExpParts(A x, int shift = 0) {
    constexpr bool kSingle = std::is_same_v<A, float>;
    constexpr A kLn2High = kSingle ? A(0.693359375) : A(0.693147180369123816490);
    constexpr A kLn2Low = kSingle ? A(-2.12194440e-4) : A(1.90821492927058770002e-10);
    const A round = Rounding<A>::kRound + A(shift);
    shifted = fmadd(x, A(1.44269504088896341), round);
    k = shifted - round;
    r = fmadd(k, -kLn2Low, fmadd(k, -kLn2High, x));
  }
};

// Beyond these exp(x) is 0 and infinity.
template <typename A>
constexpr A kExpLowest = std::is_same_v<A, float> ? A(-104) : A(-746);
template <typename A>
constexpr A kExpHighest = std::is_same_v<A, float> ? A(89) : A(710);

// Within 2 units in the last place of the true value; 0 and infinity beyond the range; NaN stays
// NaN.
template <typename A>
MNIST_OPS_HD A exp(A x) {
  x = x < kExpLowest<A> ? kExpLowest<A> : x;
  x = x > kExpHighest<A> ? kExpHighest<A> : x;
  const ExpParts<A> parts(x);
  return times_power_of_two(exp_near_zero(parts.r), parts.k);
}

// exp(x) 2^shift where that is a normal number, else meaningless: two integer operations in place
// of two scalings, which take a third of the time of exp.
template <int shift, typename A>
MNIST_OPS_HD A exp_shifted(A x) {
  using Bits = typename Rounding<A>::Bits;
  const ExpParts<A> parts(x, shift);
  return bits_as<A>(bits_as<Bits>(exp_near_zero(parts.r)) +
                    (bits_as<Bits>(parts.shifted) << Rounding<A>::kMantissa));
}

// exp(x) of x <= 64, bit for bit.
template <typename A>
MNIST_OPS_HD A exp_of_negative(A x) {
  constexpr int kShift = std::is_same_v<A, float> ? 25 : 55;  // no subnormal number is left
  constexpr A kBack = A(1) / static_cast<A>(int64_t{1} << kShift);
  const A least = x < kExpLowest<A> ? kExpLowest<A> : x;
  return fmadd(exp_shifted<kShift>(least), kBack, least - least);  // the difference is 0, or NaN
}

// 1 / (1 + exp(-x)), numerator and denominator times 2^-30 or 2^-60: both are normal numbers for
// every x whose result is neither 0 nor 1.
template <typename A>
MNIST_OPS_HD A sigmoid(A x) {
  constexpr int kShift = std::is_same_v<A, float> ? 30 : 60;
  constexpr A kOne = A(1) / static_cast<A>(int64_t{1} << kShift);
  A y = -x;
  y = y < A(-50) ? A(-50) : y;  // 1 + exp(-50) is 1 in float64, too
  y = y > -kExpLowest<A> ? -kExpLowest<A> : y;
  const A result = kOne / (kOne + exp_shifted<-kShift>(y));
  return x != x ? x : result;
}

// size / divisor of two sizes as value * down^2: no quotient but 0 underflows. down is 1 where
// nothing does, and up its inverse.
template <typename A>
struct Quotient {
  // For every size and divisor of the type with a quotient below kTiny, size / kScale,
  // divisor * kScale and their quotient are numbers of full precision.
  static constexpr A kTiny = std::is_same_v<A, float> ? A(0x1p-100) : A(0x1p-1000);
  static constexpr A kScale = std::is_same_v<A, float> ? A(0x1p-76) : A(0x1p-538);
  static constexpr A kTwiceItsLog2 = std::is_same_v<A, float> ? A(-152) : A(-1076);

  A value, up, down, log2_of_scale;  // numbers, not a condition: loops over quotients vectorise
  bool is_tiny;

  MNIST_OPS_HD Quotient(A size, A divisor) {
    is_tiny = (size < divisor * kTiny) & (divisor <= std::numeric_limits<A>::max());
    up = is_tiny ? A(1) / kScale : A(1);
    down = is_tiny ? kScale : A(1);
    log2_of_scale = is_tiny ? kTwiceItsLog2 : A(0);
    value = (size * up) / (divisor * down);
  }

  // The quotient, 0 where it underflows; and x factor^2 / quotient, which may be in range where
  // neither the square nor the quotient is.
  MNIST_OPS_HD A plain() const { return value * down * down; }
  MNIST_OPS_HD A divide(A x, A factor) const { return x / value * (factor * up) * (factor * up); }
};

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

// The natural logarithm of a positive number; infinity and NaN stay. With a number added to the
// logarithm to base 2.
template <typename A>
MNIST_OPS_HD A log(A x, A log2_of_factor = A(0)) {
  constexpr A kLn2 = A(0.693147180559945309417);
  constexpr A kLn2High = std::is_same_v<A, float> ? A(0.693359375) : A(0.693147180369123816490);
  constexpr A kLn2Low =
      std::is_same_v<A, float> ? A(-2.12194440e-4) : A(1.90821492927058770002e-10);
  Log2<A> parts = log2_of(x);
  parts.whole += log2_of_factor;
  const A value = fmadd(parts.whole, kLn2High, fmadd(parts.fraction, kLn2, parts.whole * kLn2Low));
  return x <= std::numeric_limits<A>::max() ? value : x;
}
template <typename A>
MNIST_OPS_HD A log(const Quotient<A>& x) {
  return log(x.value, x.log2_of_scale);
}

// x^p for finite x >= 0, and 0 for x = 0 whatever p is. The logarithm's whole part is multiplied by
// p without rounding, so the error does not grow with its size: p + 2 units in the last place.
// With a whole number added to the logarithm to base 2.
template <typename A>
MNIST_OPS_HD A power(A x, A p, A log2_of_factor = A(0)) {
  constexpr A kLowest = std::is_same_v<A, float> ? A(-150) : A(-1076);
  constexpr A kHighest = std::is_same_v<A, float> ? A(128) : A(1024);
  Log2<A> log = log2_of(x);
  log.whole += log2_of_factor;
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
template <typename A>
MNIST_OPS_HD A power(const Quotient<A>& x, A p) {
  return power(x.value, p, x.log2_of_scale);
}

// -------------------------------------------------------------------------------------------- tanh
//
// tanh|x| = -t / (t + 2) with t = expm1(-2|x|) = 2^k p + (2^k - 1), where p = expm1(r) is a
// polynomial in r = -2|x| - k ln 2. Nothing cancels: t keeps its relative precision down to the
// smallest x, so the result is within 3 units in the last place everywhere. No branch and no call,
// so loops over it vectorise. NaN stays NaN.

template <typename A>
MNIST_OPS_HD A tanh(A x) {
  using Bits = typename Rounding<A>::Bits;
  constexpr A kOneFrom = std::is_same_v<A, float> ? A(10) : A(22);  // tanh is 1 there already
  A a = std::fabs(x);
  a = a > kOneFrom ? kOneFrom : a;
  const ExpParts<A> parts(A(-2) * a);
  const A p = expm1_near_zero(parts.r);
  const A power =
      bits_as<A>((bits_as<Bits>(parts.shifted) + Rounding<A>::kBias) << Rounding<A>::kMantissa);
  const A t = fmadd(power, p, power - A(1));
  return std::copysign(t / (t + A(2)), x);
}

}  // namespace mnist_ops::elementary
