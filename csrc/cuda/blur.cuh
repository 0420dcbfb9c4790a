// The blur of a plane: its geometry, the kernel, one pixel.
#pragma once

#include "../local_norm.h"

#include "memory.cuh"
#include "reduce.cuh"

namespace mnist_ops::cuda {

// Sizes of a kernel and of the planes it blurs. A separable kernel has taps_h == taps_w.
struct BlurGeometry {
  int64_t H, W, taps_h, taps_w;
  bool separable;
};

// The taps [first, last) that meet the image when centred on index i of `size`.
struct Taps {
  int64_t first, last;
};

__device__ __forceinline__ Taps taps_inside(int64_t i, int64_t size, int64_t taps) {
  const int64_t radius = taps / 2;
  return {i < radius ? radius - i : 0, i + radius < size ? taps : size + radius - i};
}

// The kernel divided by its sum, and the same flipped: lines of `taps`, `pitch` elements apart, by
// all threads of a block in a row. Each warp adds up for itself, in the same order.
template <typename A>
__device__ __forceinline__ void normalize_kernel(const double* kernel, int lines, int taps,
                                                 int pitch, A* weight, A* flipped) {
  const int thread = static_cast<int>(threadIdx.x), count = lines * taps;
  double sum = 0;
  for (int i = thread % kWarp; i < count; i += kWarp) sum += kernel[i];
  sum = lane_sum(sum, kWarp);
  for (int i = thread; i < count; i += static_cast<int>(blockDim.x)) {
    const int line = i / taps, k = i % taps;
    const A normalized = static_cast<A>(kernel[i] / sum);
    weight[line * pitch + k] = normalized;
    flipped[(lines - 1 - line) * pitch + taps - 1 - k] = normalized;
  }
}

// What the taps inside the image sum to when centred on a pixel: the blur of a plane of ones. The
// kernel's lines are `pitch` elements apart.
template <typename A>
__device__ __forceinline__ A coefficient_at(const BlurGeometry& g, const A* weight, int64_t pitch,
                                            int64_t pixel) {
  const int64_t h = quotient(pixel, g.W), w = pixel - h * g.W;
  const Taps rows = taps_inside(h, g.H, g.taps_h), columns = taps_inside(w, g.W, g.taps_w);
  A sum = A(0), row = A(0);
#pragma unroll 1
  for (int64_t i = rows.first; i < rows.last; ++i) {
    if (!g.separable || i == rows.first) {
      row = A(0);
#pragma unroll 1
      for (int64_t k = columns.first; k < columns.last; ++k) {
        row += weight[(g.separable ? 0 : i * pitch) + k];
      }
    }
    sum += g.separable ? row * weight[i] : row;
  }
  return sum;
}

// One pixel of the correlation of a plane with taps_h x taps_w weights.
template <typename A>
__device__ __forceinline__ A correlated(const A* plane, const BlurGeometry& g, const A* weight,
                                        int64_t taps_h, int64_t taps_w, int64_t pixel) {
  const int64_t h = quotient(pixel, g.W), w = pixel - h * g.W;
  const Taps rows = taps_inside(h, g.H, taps_h), columns = taps_inside(w, g.W, taps_w);
  A sum = A(0);
#pragma unroll 1
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const A* row = plane + (h + i - taps_h / 2) * g.W + w - taps_w / 2;
#pragma unroll 1
    for (int64_t k = columns.first; k < columns.last; ++k) sum += row[k] * weight[i * taps_w + k];
  }
  return sum;
}

// The sum over k of x[k step] taps[k]; four loads at a time are under way. `taps` are read in packs
// of four. Unrolled further, a loop over fewer than 16 taps runs in the remainder of it.
template <typename A>
__device__ __forceinline__ A correlated(const A* x, int step, const A* taps, int count) {
  A sum = A(0);
#pragma unroll 1
  for (int k = 0; k < count; k += 4, x += 4 * step) {
    const Pack<A, 4> weight = load_pack<4>(taps + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (k + i < count) sum += x[i * step] * weight.values[i];
    }
  }
  return sum;
}

}  // namespace mnist_ops::cuda
