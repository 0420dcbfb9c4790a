// Exponential and tanh of one number, and the fused multiply-add they are made of: on the CPU the
// loops over them vectorise, and on CUDA the same polynomials give the same bits wherever the
// processor has the fused operation.
#pragma once

#include "common.h"

#include <cmath>
#include <cstring>

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

}  // namespace mnist_ops::elementary
