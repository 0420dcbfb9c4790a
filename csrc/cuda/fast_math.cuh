// Functions of float32 by the device's approximations, which are within 2 units in the last place
// but for approximate_tanh; denormals are zero. On the CPU, where the tests run this, they are
// exact.
#pragma once

#include "../elementary.h"

#include "launch.cuh"

#include <cmath>

namespace mnist_ops::cuda {

// 2^x by one instruction, to a few units in the last place of float32; denormals are zero.
__device__ __forceinline__ float two_to_the(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__device__ __forceinline__ float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / std::sqrt(x);
#endif
}

__device__ __forceinline__ double reciprocal_root(double x) {
  return 1.0 / std::sqrt(x);
}

__device__ __forceinline__ float approximate_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::sqrt(x);
#endif
}

// One instruction, within 2^-11 of the value.
__device__ __forceinline__ float approximate_tanh(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return elementary::tanh(x);
#endif
}

// x within [-bound, bound]; NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("{\n\tmin.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;\n\t}"
      : "+f"(x)
      : "f"(bound), "f"(-bound));
  return x;
#else
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
#endif
}

}  // namespace mnist_ops::cuda
