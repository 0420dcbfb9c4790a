// The blur of a plane: its geometry, one pixel, four neighbouring results at a time.
#pragma once

#include "../local_norm.h"

#include "memory.cuh"

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

// Four values, by instructions of 16 bytes.
template <typename A>
struct Four {
  A values[4];
};

template <typename A>
__device__ __forceinline__ Four<A> load_four(const A* from) {
  Four<A> four;
  constexpr int n = sizeof(A) == 8 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < 4; i += n) {
    const Pack<A, n> pack = load_pack<n>(from + i);
#pragma unroll
    for (int j = 0; j < n; ++j) four.values[i + j] = pack.values[j];
  }
  return four;
}

template <typename A>
__device__ __forceinline__ void store_four(A* to, const A (&values)[4]) {
  constexpr int n = sizeof(A) == 8 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < 4; i += n) {
    Pack<A, n> pack;
#pragma unroll
    for (int j = 0; j < n; ++j) pack.values[j] = values[i + j];
    store_pack(to + i, pack);
  }
}

// sums[j] += sum over k of x[j + k] * taps[k] for an odd number of taps; x(k) are four values from
// index k on. No tap is padded with zero, which an infinite value would make NaN.
template <typename A, typename Load>
__device__ __forceinline__ void correlate_four(const Load& x, const A* taps, int count,
                                               A (&sums)[4]) {
  Four<A> here = x(0);
  int k = 0;
#pragma unroll 1
  for (; k + 4 <= count; k += 4) {
    const Four<A> next = x(k + 4), weight = load_four(taps + k);
    const A window[8] = {here.values[0], here.values[1], here.values[2], here.values[3],
                         next.values[0], next.values[1], next.values[2], next.values[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += window[i + j] * weight.values[i];
    }
    here = next;
  }
  // One or three are left.
  const Four<A> weight = load_four(taps + k);
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] += here.values[j] * weight.values[0];
  if (count - k == 1) return;
  const Four<A> next = x(k + 4);
  const A window[6] = {here.values[0], here.values[1], here.values[2],
                       here.values[3], next.values[0], next.values[1]};
#pragma unroll
  for (int i = 1; i < 3; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += window[i + j] * weight.values[i];
  }
}

// The sum over k of x[k step] taps[k]; four loads at a time are under way.
template <typename A>
__device__ __forceinline__ A correlated(const A* x, int step, const A* taps, int count) {
  A sum = A(0);
  for (int k = 0; k < count; k += 4, x += 4 * step) {
    const Four<A> weight = load_four(taps + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (k + i < count) sum += x[i * step] * weight.values[i];
    }
  }
  return sum;
}

}  // namespace mnist_ops::cuda
