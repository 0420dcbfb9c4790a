// Functions of float32 by the device's approximations, which are within 2 units in the last place
// but for approximate_tanh; denormals are zero. On the CPU, where the tests run this, they are
// exact.
#pragma once

#include "../elementary.h"

#include "launch.cuh"

#include <cmath>

namespace mnist_ops::cuda {

// float name(float x): one instruction of PTX, and what it stands for.
#if defined(__CUDA_ARCH__)
#define MNIST_OPS_APPROXIMATE(name, instruction, exact) \
  __device__ __forceinline__ float name(float x) {      \
    float y;                                            \
    asm(instruction ".f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                           \
  }
#else
#define MNIST_OPS_APPROXIMATE(name, instruction, exact) \
  __device__ __forceinline__ float name(float x) {      \
    return exact;                                       \
  }
#endif

MNIST_OPS_APPROXIMATE(two_to_the, "ex2.approx.ftz", std::exp2(x))
MNIST_OPS_APPROXIMATE(log2_of, "lg2.approx.ftz", std::log2(x))
MNIST_OPS_APPROXIMATE(reciprocal, "rcp.approx.ftz", 1.0f / x)
MNIST_OPS_APPROXIMATE(reciprocal_root, "rsqrt.approx.ftz", 1.0f / std::sqrt(x))
MNIST_OPS_APPROXIMATE(approximate_root, "sqrt.approx.ftz", std::sqrt(x))
MNIST_OPS_APPROXIMATE(approximate_tanh, "tanh.approx", elementary::tanh(x))  // within 2^-11
#undef MNIST_OPS_APPROXIMATE

}  // namespace mnist_ops::cuda
