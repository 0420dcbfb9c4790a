// Reductions within a warp and a block.
//
// `lanes`, a power of two up to 32, neighbouring threads of a warp reduce together. Every thread of
// the warp must take part. All of them get the same bits: the butterfly adds the same pairs for
// each, only swapped.
#pragma once

#include "launch.cuh"

#include <cmath>

namespace mnist_ops::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename A>
__device__ __forceinline__ A lane_sum(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// The larger one; a where b is NaN. In float32 that is one instruction.
__device__ __forceinline__ float larger(float a, float b) {
  return std::fmax(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return b > a ? b : a;
}

// Of values that are no NaN.
template <typename A>
__device__ __forceinline__ A lane_max(A value, int lanes) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < lanes) {
      value = larger(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
  }
  return value;
}

// The sum over a block of kBlock threads in a row, for all of them. shared has a value for each
// warp; what was in it before the call may be lost. All threads of the block must take part.
template <int kBlock, typename A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
  constexpr int kWarps = kBlock / kWarp;
  const A of_warp = lane_sum(value, kWarp);
  __syncthreads();  // whoever read shared before is done
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  A sum = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

// How many lanes share `size` items: all of them for large sizes, no more than needed for small.
inline int lanes_for(int64_t size) {
  int lanes = 1;
  while (lanes < kWarp && lanes < size) lanes *= 2;
  return lanes;
}

}  // namespace mnist_ops::cuda
