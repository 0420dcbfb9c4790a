// A stage (activation, LP pooling, subtractive normalization) in one block of threads: the
// normalization of a pooled map that waits in shared memory.
#pragma once

#include "../stage.h"

#include "blur.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {

// The packs of an image, or of a map, as a table. In NCHW a column has the same pixels in each of
// its entries, which are channels, or as many channels as it takes for the next entry to begin with
// a pack; in NHWC a column has the same channels, and its entries are pixels. Neighbouring threads
// take neighbouring columns; where there are more threads than columns, groups of them share the
// entries.
struct Table {
  int32_t columns, entries;

  MNIST_OPS_HD int32_t groups(int32_t threads) const {
    const int32_t groups = threads / columns;
    return groups < 1 ? 1 : groups < entries ? groups : entries;
  }
};

__device__ __forceinline__ int32_t this_thread() {
  return static_cast<int32_t>(threadIdx.x);
}
__device__ __forceinline__ int32_t block_threads() {
  return static_cast<int32_t>(blockDim.x);
}

// What this thread takes of a table: from a column, and each column_step-th, the group-th and each
// entry_step-th entry.
struct Share {
  int32_t column, group, column_step, entry_step;

  __device__ __forceinline__ explicit Share(const Table& table) {
    entry_step = table.groups(block_threads());
    group = this_thread() / table.columns, column = this_thread() - group * table.columns;
    column_step = table.columns;
    if (table.columns > block_threads()) column_step = block_threads();
    if (group >= entry_step) column = table.columns;  // nothing
  }
};

// A stage in float32 or a half type, computed in float32.
template <typename T>
struct Fused {
  int64_t N;
  PoolGeometryOf<int32_t> g;  // of one image
  ActivationKind activation;
  int32_t pack;     // elements that a thread takes at once: neighbours of a row, or channels
  int32_t threads;  // of a block
  const double* kernel;
  int32_t taps;        // of a separable kernel
  bool map_pack;       // whether tensors of the output's shape are read and written in packs
  int32_t maps;        // in shared memory
  int32_t map_bytes;   // of one of them: a multiple of 16
  int32_t sums;        // planes of sums over some of the channels
  Table tiles, packs;  // of the image and of a map
  Divider by_unit_row, by_width, by_pixels;  // by_unit_row: tiles of a row in NCHW

  static constexpr int kNear = kShortPack<T>;

  MNIST_OPS_HD int32_t pixels() const { return g.OH * g.OW; }
  // In shared memory. In NHWC an odd distance between pixels, in packs, keeps the threads that add
  // up their channels in different banks.
  MNIST_OPS_HD int32_t step_pixel() const { return kNear * ((g.C / kNear) | 1); }
  // Rounded up to whole packs, like all that lies in front of what is accessed in packs. The mean,
  // or, before it is known, the planes of sums; the weights.
  MNIST_OPS_HD int32_t mean_size() const { return (sums * pixels() + 3) / 4 * 4; }
  MNIST_OPS_HD int32_t weight_size() const { return (taps + 3) / 4 * 4; }
  // A plane with zeros left and right of it; with zeros above and below, of what its rows gave; the
  // shares of its rows and columns in coef.
  MNIST_OPS_HD int32_t padded_w() const { return g.OW + taps - 1; }
  MNIST_OPS_HD int32_t padded_size() const { return g.OH * padded_w(); }
  MNIST_OPS_HD int32_t rows_size() const { return (g.OH + taps - 1) * g.OW; }
  MNIST_OPS_HD int32_t coef_size() const { return g.OH + g.OW; }
  int64_t shared_bytes() const {
    const int64_t size =
        int64_t{mean_size()} + 2 * weight_size() + padded_size() + rows_size() + coef_size();
    return int64_t{maps} * map_bytes + size * int64_t{sizeof(float)};
  }
};

// M: the type of the maps, float of a pooled one, the tensor's of a gradient.
template <typename M>
struct SharedMemory {
  M* map[2];         // pooled, or the gradients with respect to that of this image and the next
  float* mean;       // what is subtracted; before it is known, sums over groups of channels
  float* weight[2];  // normalized, [adjoint]
  float* padded;     // the sum over channels, zeros left and right
  float* rows;       // blurred along the rows, zeros above and below
  float* inverse;    // of the kernel's share of each row, then of each column, times C
};

template <typename M, typename T>
__device__ SharedMemory<M> shared_memory(const Fused<T>& s) {
  SharedMemory<M> m;
  unsigned char* const begin = dynamic_shared_memory();
  m.map[0] = reinterpret_cast<M*>(begin);
  m.map[1] = reinterpret_cast<M*>(begin + (s.maps - 1) * s.map_bytes);
  m.mean = reinterpret_cast<float*>(begin + s.maps * s.map_bytes);
  m.weight[0] = m.mean + s.mean_size();
  m.weight[1] = m.weight[0] + s.weight_size();
  m.padded = m.weight[1] + s.weight_size();
  m.rows = m.padded + s.padded_size();
  m.inverse = m.rows + s.rows_size();
  return m;
}

// The weights, and zeros around the planes; then what a mean is multiplied by, so that no image
// waits for a division. A barrier must follow.
template <typename T, typename M>
__device__ void prepare(const Fused<T>& s, const SharedMemory<M>& m) {
  for (int32_t i = this_thread(); i < s.padded_size() + s.rows_size(); i += block_threads()) {
    m.padded[i] = 0.0f;
  }
  normalize_kernel(s.kernel, 1, s.taps, s.taps, m.weight[0], m.weight[1]);
  __syncthreads();
  const int32_t OH = s.g.OH, OW = s.g.OW;
  for (int32_t i = this_thread(); i < s.coef_size(); i += block_threads()) {
    const Taps taps = taps_inside(i < OH ? i : i - OH, i < OH ? OH : OW, s.taps);
    float inside = 0.0f;
    for (int64_t k = taps.first; k < taps.last; ++k) inside += m.weight[0][k];
    m.inverse[i] = 1.0f / (i < OH ? inside : inside * static_cast<float>(s.g.C));
  }
}

// A pack of numbers in the type of a tensor: half types two by an instruction.
template <typename T, int n>
__device__ __forceinline__ Pack<T, n> rounded(const float (&values)[n]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool in_pairs = sizeof(T) == 2 && n % 2 == 0;
#else
  constexpr bool in_pairs = false;
#endif
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; j += 1 + in_pairs) {
    if constexpr (in_pairs) {
      uint32_t word;
      if constexpr (std::is_same_v<T, BFloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[j + 1]), "f"(values[j]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[j + 1]), "f"(values[j]));
      }
      std::memcpy(pack.values + j, &word, sizeof(word));
    } else {
      pack.values[j] = static_cast<T>(values[j]);
    }
  }
  return pack;
}

// Calls body(number, column, share, each) for this thread's columns of packs of a map: of a number
// of neighbours, by which a tensor of the map's shape is read and written; given by the column's
// first element. each(use) calls use(where in the map in shared memory, where in the tensor, entry)
// for its packs.
template <bool channels_last, typename T, typename F>
__device__ __forceinline__ void each_map_column(const Fused<T>& s, const F& body) {
  const Share share(s.packs);
  const auto columns_of_packs = [&](auto number) {
    constexpr int n = decltype(number)::value;
    const int32_t size = s.packs.columns * n, step = channels_last ? s.step_pixel() : size;
    for (int32_t column = share.column; column < s.packs.columns; column += share.column_step) {
      body(number, column * n, share, [&](const auto& use) {
#pragma unroll 4
        for (int32_t entry = share.group; entry < s.packs.entries; entry += share.entry_step) {
          use(entry * step + column * n, entry * size + column * n, entry);
        }
      });
    }
  };
  if (s.map_pack) {
    columns_of_packs(Number<kShortPack<T>>{});
  } else {
    columns_of_packs(Number<1>{});
  }
}

// From the map to sums over some of its channels. A barrier must be before and after it.
template <bool channels_last, typename T, typename M>
__device__ __forceinline__ void sum_channels(const Fused<T>& s, const SharedMemory<M>& m,
                                             const M* map) {
  const int32_t pixels = s.pixels();
  if constexpr (channels_last) {
    constexpr int n = kShortPack<T>;
    for (int32_t i = this_thread(); i < s.sums * pixels; i += block_threads()) {
      const auto group = static_cast<int32_t>(s.by_pixels.quotient(static_cast<uint32_t>(i)));
      const M* from = map + (i - group * pixels) * s.step_pixel();
      float sum[n] = {};
#pragma unroll 4
      for (int32_t c = group * n; c < s.g.C; c += s.sums * n) {
        const Pack<M, n> pack = load_pack<n>(from + c);
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += static_cast<float>(pack.values[j]);
      }
#pragma unroll
      for (int j = 1; j < n; ++j) sum[0] += sum[j];
      m.mean[i] = sum[0];
    }
  } else {
    each_map_column<channels_last>(
        s, [&](auto number, int32_t column, const Share& share, auto each) {
          constexpr int n = decltype(number)::value;
          Pack<float, n> sum{};
          each([&](int32_t from, int32_t, int32_t) {
            const Pack<M, n> pack = load_pack<n>(map + from);
#pragma unroll
            for (int j = 0; j < n; ++j) sum.values[j] += static_cast<float>(pack.values[j]);
          });
          store_pack(m.mean + share.group * s.packs.columns * n + column, sum);
        });
  }
}

// From the sums to the plane that is subtracted: the mean or, adjoint, the share of its gradient.
// Begins and ends with a barrier.
template <bool adjoint, typename T, typename M>
__device__ __forceinline__ void blur_sums(const Fused<T>& s, const SharedMemory<M>& m) {
  const int32_t pixels = s.pixels(), OH = s.g.OH, OW = s.g.OW;
  const int32_t radius = s.taps / 2;
  const float* weight = m.weight[adjoint];
  const auto each_pixel = [&](const auto& body) {
#pragma unroll 1
    for (int32_t pixel = this_thread(); pixel < pixels; pixel += block_threads()) {
      const auto h = static_cast<int32_t>(s.by_width.quotient(static_cast<uint32_t>(pixel)));
      body(pixel, h, pixel - h * OW);
    }
  };
  const auto inverse = [&](int32_t h, int32_t w) { return m.inverse[h] * m.inverse[OH + w]; };
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    float sum = 0.0f;
#pragma unroll 4
    for (int32_t k = 0; k < s.sums; ++k) sum += m.mean[k * pixels + pixel];
    m.padded[h * s.padded_w() + w + radius] = adjoint ? sum * inverse(h, w) : sum;
  });
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    m.rows[pixel + radius * OW] = correlated(m.padded + h * s.padded_w() + w, 1, weight, s.taps);
  });
  __syncthreads();
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    const float blurred = correlated(m.rows + pixel, OW, weight, s.taps);
    m.mean[pixel] = adjoint ? blurred : blurred * inverse(h, w);
  });
  __syncthreads();
}

template <bool channels_last, typename T>
__device__ __forceinline__ void write_map(const Fused<T>& s, const SharedMemory<float>& m,
                                          const float* map, T* output) {
  each_map_column<channels_last>(s, [&](auto number, int32_t column, const Share&, auto each) {
    constexpr int n = decltype(number)::value;
    float mean[n];
    if constexpr (!channels_last) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        mean[j] = m.mean[s.by_pixels.remainder(static_cast<uint32_t>(column + j))];
      }
    }
    each([&](int32_t from, int32_t to, int32_t entry) {
      const Pack<float, n> pack = load_pack<n>(map + from);
      float result[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        result[j] = pack.values[j] - (channels_last ? m.mean[entry] : mean[j]);
      }
      store_pack(output + to, rounded<T>(result));
    });
  });
}

// Without waiting for it: see copy_pack.
template <bool channels_last, typename T>
__device__ __forceinline__ void copy_map(const Fused<T>& s, T* map, const T* input) {
  each_map_column<channels_last>(s, [&](auto number, int32_t, const Share&, auto each) {
    each([&](int32_t to, int32_t from, int32_t) {
      copy_pack<decltype(number)::value>(map + to, input + from);
    });
  });
}

}  // namespace mnist_ops::cuda
