// A stage (activation, LP pooling, subtractive normalization) in one block of threads: the
// normalization of a pooled map that waits in shared memory.
#pragma once

#include "../stage.h"

#include "memory.cuh"
#include "reduce.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {

// Neighbours that one thread takes at once: 16 bytes, or 8 in half types, where more of them would
// seldom divide the width of a map.
template <typename T>
constexpr int kNeighbours = kPackSize<T> < 4 ? kPackSize<T> : 4;

template <typename T>
struct Fused {
  using A = opmath_t<T>;
  int64_t N;
  PoolGeometryOf<int32_t> g;  // of one image
  ActivationKind activation;
  bool channels_last;
  const double* kernel;
  int32_t taps;       // of a separable kernel
  bool map_pack;      // whether tensors of the output's shape are read and written in packs
  bool sum_pack;      // whether the channels of the map in shared memory are
  int32_t groups;     // of channels that are added up at once
  uint32_t units;     // tiles of an image
  uint32_t unit_row;  // tiles of a row of windows, or, in NHWC, of a pixel
  Divider by_unit_row, by_width, by_inner, by_sums;  // by_inner: pixels, or, in NHWC, C

  static constexpr int kNear = kNeighbours<T>;

  MNIST_OPS_HD int32_t pixels() const { return g.OH * g.OW; }
  MNIST_OPS_HD int32_t map_size() const { return g.C * pixels(); }
  // The map in shared memory. In NHWC an odd distance between pixels, in packs where channels come
  // in packs, keeps the threads that add up their channels in different banks.
  MNIST_OPS_HD int32_t step_pixel() const {
    return !channels_last ? 1 : sum_pack ? kNear * ((g.C / kNear) | 1) : g.C | 1;
  }
  MNIST_OPS_HD int32_t step_c() const { return channels_last ? 1 : pixels(); }
  // Rounded up to whole packs, like all that lies in front of what is accessed in packs.
  MNIST_OPS_HD int32_t shared_map_size() const {
    return ((channels_last ? pixels() * step_pixel() : map_size()) + 3) / 4 * 4;
  }
  // Sums over channels: of how many pixels, or packs of them; of how many channels, or packs.
  MNIST_OPS_HD int32_t sum_units() const {
    return sum_pack && !channels_last ? pixels() / kNear : pixels();
  }
  MNIST_OPS_HD int32_t sum_parts() const { return sum_pack && channels_last ? g.C / kNear : g.C; }
  // The mean with its first pixels once more behind the last, for packs that begin near the end;
  // before it, the sums of the groups.
  MNIST_OPS_HD int32_t mean_size() const {
    const int32_t mean = pixels() + kNear - 1, sums = groups * pixels();
    return ((mean > sums ? mean : sums) + 3) / 4 * 4;
  }
  // A plane with zeros left and right of it; with zeros above and below, of what its rows gave; the
  // shares of its rows and columns in coef.
  MNIST_OPS_HD int32_t padded_w() const { return g.OW + taps - 1; }
  MNIST_OPS_HD int32_t padded_size() const { return g.OH * padded_w(); }
  MNIST_OPS_HD int32_t rows_size() const { return (g.OH + taps - 1) * g.OW; }
  MNIST_OPS_HD int32_t coef_size() const { return g.OH + g.OW; }
  int64_t shared_bytes() const {
    const int64_t size = int64_t{shared_map_size()} + mean_size() + padded_size() + rows_size() +
                         coef_size() + 2 * taps;
    return size * static_cast<int64_t>(sizeof(A));
  }
};

template <typename A>
struct SharedMemory {
  A* map;        // pooled, or the gradient with respect to that
  A* mean;       // what is subtracted; before it is known, sums over groups of channels
  A* padded;     // the sum over channels, zeros left and right
  A* rows;       // blurred along the rows, zeros above and below
  A* coef;       // the kernel's share of each row, then of each column
  A* weight[2];  // normalised, [adjoint]
};

template <typename T, typename A = opmath_t<T>>
__device__ SharedMemory<A> shared_memory(const Fused<T>& s) {
  SharedMemory<A> m;
  m.map = reinterpret_cast<A*>(dynamic_shared_memory());
  m.mean = m.map + s.shared_map_size();
  m.padded = m.mean + s.mean_size();
  m.rows = m.padded + s.padded_size();
  m.coef = m.rows + s.rows_size();
  m.weight[0] = m.coef + s.coef_size();
  m.weight[1] = m.weight[0] + s.taps;
  return m;
}

__device__ __forceinline__ int32_t this_thread() {
  return static_cast<int32_t>(threadIdx.x);
}
__device__ __forceinline__ int32_t block_threads() {
  return static_cast<int32_t>(blockDim.x);
}

// Zeros around the planes, by all threads, and the weights, by one warp, while the others are busy
// with the image. A barrier must follow.
template <typename T, typename A>
__device__ void prepare(const Fused<T>& s, const SharedMemory<A>& m) {
  for (int32_t i = this_thread(); i < s.padded_size() + s.rows_size(); i += block_threads()) {
    m.padded[i] = A(0);
  }
  if (threadIdx.x >= kWarp) return;
  const int32_t lane = this_thread();
  double sum = 0;
  for (int32_t i = lane; i < s.taps; i += kWarp) sum += s.kernel[i];
  const double total = lane_sum(sum, kWarp);
  for (int32_t i = lane; i < s.taps; i += kWarp) {
    const A weight = static_cast<A>(s.kernel[i] / total);
    m.weight[0][i] = weight;
    m.weight[1][s.taps - 1 - i] = weight;
  }
}

// The sum of the weights inside the image, along one dimension, for its index-th pixel.
template <typename A>
__device__ A weight_inside(const A* weight, int32_t taps, int32_t index, int32_t size) {
  A sum = A(0);
  for (int32_t k = 0; k < taps; ++k) {
    const int32_t i = index + k - taps / 2;
    if (i >= 0 && i < size) sum += weight[k];
  }
  return sum;
}

template <typename T, typename A>
__device__ void prepare_coefficients(const Fused<T>& s, const SharedMemory<A>& m) {
  const int32_t OH = s.g.OH, OW = s.g.OW;
  for (int32_t i = this_thread(); i < s.coef_size(); i += block_threads()) {
    m.coef[i] = weight_inside(m.weight[0], s.taps, i < OH ? i : i - OH, i < OH ? OH : OW);
  }
}

// sum over k of in[k step] weight[k].
template <typename A>
__device__ __forceinline__ A correlate(const A* in, int32_t step, const A* weight, int32_t taps) {
  A sum = A(0);
#pragma unroll 4
  for (int32_t k = 0; k < taps; ++k) sum += in[k * step] * weight[k];
  return sum;
}

// From the map to the plane that is subtracted: the mean or, adjoint, the share of its gradient.
// Begins and ends with a barrier. first: of the images that this block takes.
template <bool adjoint, typename T, typename A>
__device__ void blur_map(const Fused<T>& s, const SharedMemory<A>& m, bool first) {
  constexpr int n = kNeighbours<T>;
  const int32_t pixels = s.pixels(), OH = s.g.OH, OW = s.g.OW;
  const int32_t radius = s.taps / 2;
  const A* weight = m.weight[adjoint];
  const auto each_pixel = [&](const auto& body) {
    for (int32_t pixel = this_thread(); pixel < pixels; pixel += block_threads()) {
      const auto h = static_cast<int32_t>(s.by_width.quotient(static_cast<uint32_t>(pixel)));
      body(pixel, h, pixel - h * OW);
    }
  };
  const auto coefficient = [&](int32_t h, int32_t w) { return m.coef[h] * m.coef[OH + w]; };
  __syncthreads();
  if (first) prepare_coefficients(s, m);
  // Several threads share the channels of a pixel; their sums are added in a fixed order.
  const int32_t units = s.sum_units(), parts = s.sum_parts();
  for (int32_t i = this_thread(); i < s.groups * units; i += block_threads()) {
    const auto group = static_cast<int32_t>(s.by_sums.quotient(static_cast<uint32_t>(i)));
    const int32_t unit = i - group * units;
    if (!s.sum_pack) {
      const A* from = m.map + unit * s.step_pixel();
      A sum = A(0);
#pragma unroll 4
      for (int32_t c = group; c < parts; c += s.groups) sum += from[c * s.step_c()];
      m.mean[i] = sum;
    } else if (s.channels_last) {
      const A* from = m.map + unit * s.step_pixel();
      A sum = A(0);
#pragma unroll 4
      for (int32_t c = group; c < parts; c += s.groups) {
        const Pack<A, n> pack = load_pack<n>(from + c * n);
#pragma unroll
        for (int j = 0; j < n; ++j) sum += pack.values[j];
      }
      m.mean[i] = sum;
    } else {
      const A* from = m.map + unit * n;
      Pack<A, n> sum{};
#pragma unroll 4
      for (int32_t c = group; c < parts; c += s.groups) {
        const Pack<A, n> pack = load_pack<n>(from + c * pixels);
#pragma unroll
        for (int j = 0; j < n; ++j) sum.values[j] += pack.values[j];
      }
      store_pack(m.mean + i * n, sum);
    }
  }
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    A sum = m.mean[pixel];
    for (int32_t k = 1; k < s.groups; ++k) sum += m.mean[k * pixels + pixel];
    m.padded[h * s.padded_w() + w + radius] = adjoint ? sum / coefficient(h, w) : sum;
  });
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    m.rows[pixel + radius * OW] = correlate(m.padded + h * s.padded_w() + w, 1, weight, s.taps);
  });
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    const A blurred = correlate(m.rows + pixel, OW, weight, s.taps);
    const A channels = static_cast<A>(s.g.C);
    const A mean = adjoint ? blurred / channels : local_mean(blurred, channels, coefficient(h, w));
    for (int32_t i = pixel; i < pixels + n - 1; i += pixels) m.mean[i] = mean;
  });
  __syncthreads();
}

// Where an element of a map lies: in the map in shared memory, and its pixel.
struct MapPlace {
  int32_t at, pixel;
};

template <typename T>
__device__ __forceinline__ MapPlace map_place(const Fused<T>& s, int32_t i) {
  const auto outer = static_cast<int32_t>(s.by_inner.quotient(static_cast<uint32_t>(i)));
  const int32_t rest = i - outer * (s.channels_last ? s.g.C : s.pixels());
  if (s.channels_last) return {outer * s.step_pixel() + rest, outer};
  return {i, rest};
}

// Calls body with how many neighbours of a tensor of the map's shape are read or written at once.
template <typename T, typename F>
__device__ __forceinline__ void with_map_pack(const Fused<T>& s, const F& body) {
  if (s.map_pack) {
    body(Number<kNeighbours<T>>{});
  } else {
    body(Number<1>{});
  }
}

template <typename T, typename A>
__device__ __forceinline__ void write_map(const Fused<T>& s, const SharedMemory<A>& m, T* output) {
  with_map_pack(s, [&](auto pack) {
    constexpr int n = decltype(pack)::value;
    for (int32_t i = this_thread() * n; i < s.map_size(); i += block_threads() * n) {
      const MapPlace place = map_place(s, i);
      const Pack<A, n> from = load_pack<n>(m.map + place.at);
      Pack<T, n> to;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A mean = m.mean[s.channels_last ? place.pixel : place.pixel + j];
        to.values[j] = static_cast<T>(from.values[j] - mean);
      }
      store_pack(output + i, to);
    }
  });
}

// Several packs are read before the first of them is written: all of a store waits for it.
template <typename T, typename A>
__device__ __forceinline__ void read_map(const Fused<T>& s, const SharedMemory<A>& m,
                                         const T* input) {
  with_map_pack(s, [&](auto pack) {
    constexpr int n = decltype(pack)::value, kAtOnce = 4;
    const int32_t size = s.map_size(), step = block_threads() * n;
    for (int32_t first = this_thread() * n; first < size; first += kAtOnce * step) {
      Pack<T, n> from[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t i = first + k * step;
        from[k] = load_pack<n>(input + (i < size ? i : first));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k * step >= size) continue;
        Pack<A, n> to;
#pragma unroll
        for (int j = 0; j < n; ++j) to.values[j] = static_cast<A>(from[k].values[j]);
        store_pack(m.map + map_place(s, first + k * step).at, to);
      }
    }
  });
}

}  // namespace mnist_ops::cuda
