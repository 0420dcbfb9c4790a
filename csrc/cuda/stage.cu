// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Where the networks' windows, 2 x 2 with p = 2, make up the image, its pooled map fits into the
// shared memory of a block, and the kernel is separable, one kernel does it all. It is bound by
// memory: the forward pass reads the input and writes the output, the backward pass reads input and
// gradient and writes a gradient, each of them once.
//
// As many blocks as fit share the images. A block takes one after the other; weights and what means
// are multiplied by it makes once. All of a window is in the registers of one thread: in NCHW two
// rows of neighbours, in NHWC a pack of channels of four pixels. A thread stays with its pixels (in
// NHWC its channels) and walks over channels (pixels): their places take no divisions, and in NCHW
// the sum over its channels, and the mean that the backward pass subtracts, are in registers. The
// pooled map, in the type to compute in, waits in shared memory for its mean: sums over channels,
// the blur of that one plane and the subtraction are between barriers of the block, not between
// kernels. In the backward pass it is the gradient that waits there, in its own type: the next
// image's comes, without a register, while this one is at work.
//
// A thread reads its next 32 bytes (NHWC in float32: 64) before it computes with those at hand,
// also across the end of an image, so that 25 KiB and more of a multiprocessor are on their way;
// more were no gain in forms that were tried. The activation is cheaper than that of
// ../activation.h: a few units in the last place off, of the type of the tensor.
//
// NOT TIMED ON A GPU YET. Percent of a copy's bandwidth of the kernels before these (7f1ed9f) on an
// H200, 5349 x 64 x 28 x 28, tanh and 7 taps:
//
//                      float32   bfloat16
//   forward,  NCHW        74        65
//             NHWC        75        67
//   backward, NCHW        77        67
//             NHWC        84        67
//
// Elsewhere, and in float64, the three operators do (../stage.h). They move three to four times as
// much, and nothing measured asks for more than the networks' windows. No atomics either way.

#include "fast_math.cuh"
#include "stage.cuh"

#include <numeric>

namespace mnist_ops::cuda {
namespace {

// Activations are within 3 units in the last place of float32, or, for bfloat16, 2^-11 of the
// value: a quarter of its last place.
template <typename T>
constexpr bool kCoarse = std::is_same_v<T, BFloat16>;

// tanh(x), given |tanh(x)|, or, where that cancelled, by a polynomial. Without its sign, maybe.
template <bool with_sign>
__device__ __forceinline__ float tanh_of_parts(float x, float far) {
  const float s = x * x;
  float p = 0.016010596f;
  p = elementary::fmadd(p, s, -0.0524437247f);
  p = elementary::fmadd(p, s, 0.133171178f);
  p = elementary::fmadd(p, s, -0.333327887f);
  const float near = elementary::fmadd(x * s, p, x);
  return std::fabs(x) < 0.575f ? near : with_sign ? std::copysign(far, x) : far;
}

struct Activated {
  float value, slope;
};

// act(x) and act'(x) for the gradients of half types, by way of e = exp(-2 |x|), or of exp(-|x|):
// the slope of a saturated unit keeps its digits, where 1 - tanh^2 would have none.
template <ActivationKind kind, bool coarse>
__device__ __forceinline__ Activated activated(float x) {
  const float size = std::fabs(x);
  if constexpr (kind == ActivationKind::kTanh) {
    // 4 e, r = 1 / (1 + e), 4 e r.
    const float e = two_to_the(elementary::fmadd(size, -2.88539008f, 2.0f));
    const float r = reciprocal(elementary::fmadd(e, 0.25f, 1.0f)), er = e * r, slope = er * r;
    if constexpr (coarse) {
      const float far = elementary::fmadd(er, -0.5f, 1.0f);
      return {size < 0x1p-6f ? x : std::copysign(far, x), slope};
    }
    return {tanh_of_parts<true>(x, elementary::fmadd(er, -0.5f, 1.0f)), slope};
  } else {
    static_assert(kind == ActivationKind::kSigmoid);
    const float e = two_to_the(size * -1.44269504f), r = reciprocal(1.0f + e);
    return {x < 0.0f ? e * r : r, e * r * r};
  }
}

// act(x). with_sign: or else the sign may be any, for who takes squares.
template <ActivationKind kind, typename T, bool with_sign>
__device__ __forceinline__ float fast_activation(float x) {
  if constexpr (kind == ActivationKind::kTanh) {
    if constexpr (kCoarse<T>) return approximate_tanh(x);
    // 1 - 2 / (exp(2 |x|) + 1).
    const float inverse = reciprocal(two_to_the(std::fabs(x) * 2.88539008f) + 1.0f);
    return tanh_of_parts<with_sign>(x, elementary::fmadd(-2.0f, inverse, 1.0f));
  } else if constexpr (kind == ActivationKind::kSigmoid && kCoarse<T>) {
    return reciprocal(two_to_the(x * -1.44269504f) + 1.0f);
  } else {
    return activation_value<kind>(x);
  }
}

// For windows whose sum of squares is out of range, or has lost digits: the sum of squares of the
// elements times a power of two, which is returned: what their norm is larger by.
constexpr float kLarge = 0x1p100f;
__device__ __forceinline__ float scaled_square_sum(const float (&a)[4], float& sum) {
  const float scale = is_safe_square_sum(sum) ? 1.0f : sum > 1.0f ? 1.0f / kLarge : kLarge;
  sum = 0.0f;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float scaled = a[k] * scale;
    sum += scaled * scaled;
  }
  return scale;
}

// The sums of squares of windows, and whether all of them are as they should be.
template <int kWindows>
__device__ __forceinline__ bool square_sums(const float (&a)[kWindows][4],
                                            float (&sums)[kWindows]) {
  bool safe = true;
#pragma unroll
  for (int j = 0; j < kWindows; ++j) {
    sums[j] = a[j][0] * a[j][0] + a[j][1] * a[j][1] + a[j][2] * a[j][2] + a[j][3] * a[j][3];
    safe = safe & is_safe_square_sum(sums[j]);
  }
  return safe;
}

// What one thread takes at once. NCHW: n neighbours of two rows. NHWC: n channels of four pixels.
template <bool channels_last, int n, typename T>
struct Tile {
  static constexpr int kPacks = channels_last ? 4 : 2;
  static constexpr int kWindows = channels_last ? n : n / 2;
  // So many are read before the first of them is used: 32 bytes in half types, too.
  static constexpr int kAtOnce = sizeof(T) == 2 && !channels_last ? 2 : 1;

  RawPack<T, n> packs[kPacks];

  // Element k, 0 to 3, of window j.
  __device__ __forceinline__ float at(int j, int k) const {
    return channels_last ? packs[k][j] : packs[k / 2][2 * j + k % 2];
  }

  // Where in the image the pack-th one lies, from the first.
  static __device__ __forceinline__ int32_t offset(const Fused<T>& s, int pack) {
    return channels_last ? (pack / 2 * s.g.W + pack % 2) * s.g.C : pack * s.g.W;
  }

  __device__ __forceinline__ void read(const Fused<T>& s, const T* x) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) packs[k].load(x + offset(s, k));
  }

  // Windows of numbers in its place.
  static __device__ __forceinline__ void store(const Fused<T>& s, T* x,
                                               const float (&values)[kWindows][4]) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float pack[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        pack[i] = channels_last ? values[i][k] : values[i / 2][2 * k + i % 2];
      }
      store_pack(x + offset(s, k), rounded<T>(pack));
    }
  }
};

// This thread's tiles of one image after the other. The next ones are read before those at hand are
// worked on, also those of the next image: loads are in flight while the block computes, blurs and
// waits at its barriers.
template <bool channels_last, int n, typename T>
struct Tiles {
  using Tile = cuda::Tile<channels_last, n, T>;
  static constexpr int kAtOnce = Tile::kAtOnce;

  const Share share;
  Tile tiles[kAtOnce];

  // Of the first image.
  __device__ __forceinline__ Tiles(const Fused<T>& s, const T* x) : share(s.tiles) {
    if (share.column < s.tiles.columns) read(s, x, share.column, share.group);
  }

  // Where in the image a column lies, and where a tile of it.
  static __device__ __forceinline__ int32_t column_place(const Fused<T>& s, int32_t column) {
    if (channels_last) return column * n;
    // The rows of windows before this one have two rows of the image each.
    const uint32_t row = s.by_unit_row.quotient(static_cast<uint32_t>(column));
    return column * n + static_cast<int32_t>(row) * s.g.W;
  }
  static __device__ __forceinline__ int32_t place(const Fused<T>& s, int32_t base, int32_t entry) {
    if (!channels_last) return base + entry * s.g.in_c;
    // Each row of windows before this one has a second row of the image, 2 OW pixels.
    const auto row = static_cast<int32_t>(s.by_width.quotient(static_cast<uint32_t>(entry)));
    return base + 2 * (entry + row * s.g.OW) * s.g.C;
  }

  // From an entry of a column on; beyond the last one there is the first of them again.
  __device__ __forceinline__ void read(const Fused<T>& s, const T* x, int32_t column,
                                       int32_t first) {
    const int32_t base = column_place(s, column);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int32_t entry = first + k * share.entry_step;
      tiles[k].read(s, x + place(s, base, entry < s.tiles.entries ? entry : first));
    }
  }

  template <typename F>
  __device__ __forceinline__ void each_column(const Fused<T>& s, const F& body) const {
    for (int32_t column = share.column; column < s.tiles.columns; column += share.column_step) {
      body(column);
    }
  }

  // Calls body(tile, entry) for the tiles of a column of x, whose first ones were read, and reads
  // the first ones of the next column, or of the following image, which is nullptr behind the last.
  template <typename F>
  __device__ __forceinline__ void each(const Fused<T>& s, const T* x, const T* following,
                                       int32_t column, const F& body) {
    const int32_t step = share.entry_step;
#pragma unroll 1
    for (int32_t first = share.group, next; first < s.tiles.entries; first = next) {
      next = first + kAtOnce * step;
      Tile now[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) now[k] = tiles[k];
      if (next < s.tiles.entries) {
        read(s, x, column, next);
      } else if (column + share.column_step < s.tiles.columns) {
        read(s, x, column + share.column_step, share.group);
      } else if (following != nullptr) {
        read(s, following, share.column, share.group);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k * step < s.tiles.entries) body(now[k], first + k * step);
      }
    }
  }
};

// Where in a map in shared memory the windows of a tile lie.
template <bool channels_last, int kWindows, typename T>
__device__ __forceinline__ int32_t map_place(const Fused<T>& s, int32_t column, int32_t entry) {
  return column * kWindows + entry * (channels_last ? s.step_pixel() : s.pixels());
}

template <bool channels_last, int n, typename T>
__device__ __forceinline__ void pool_tiles(const Fused<T>& s, const SharedMemory<float>& m,
                                           Tiles<channels_last, n, T>& tiles, const T* x,
                                           const T* following) {
  constexpr int kWindows = Tile<channels_last, n, T>::kWindows;
  dispatch_activation(s.activation, [&](auto tag) {
    tiles.each_column(s, [&](int32_t column) {
      [[maybe_unused]] Pack<float, kWindows> sum{};
      tiles.each(s, x, following, column, [&](const auto& tile, int32_t entry) {
        float a[kWindows][4], sums[kWindows];
#pragma unroll
        for (int j = 0; j < kWindows; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            a[j][k] = fast_activation<decltype(tag)::value, T, false>(tile.at(j, k));
          }
        }
        Pack<float, kWindows> norms;
        if (square_sums(a, sums)) [[likely]] {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) norms.values[j] = approximate_root(sums[j]);
        } else {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) {
            const float scale = scaled_square_sum(a[j], sums[j]);
            const float inverse = scale < 1.0f ? kLarge : 1.0f / kLarge;
            norms.values[j] = approximate_root(sums[j]) * (scale == 1.0f ? scale : inverse);
          }
        }
        store_pack(m.map[0] + map_place<channels_last, kWindows>(s, column, entry), norms);
        if constexpr (!channels_last) {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) sum.values[j] += norms.values[j];
        }
      });
      if constexpr (!channels_last) {
        store_pack(m.mean + tiles.share.group * s.pixels() + column * kWindows, sum);
      }
    });
  });
}

template <bool channels_last, int n, typename T>
__device__ __forceinline__ void unpool_tiles(const Fused<T>& s, const SharedMemory<T>& m,
                                             const T* map, Tiles<channels_last, n, T>& tiles,
                                             const T* x, const T* following, T* gx) {
  constexpr int kWindows = Tile<channels_last, n, T>::kWindows;
  dispatch_activation(s.activation, [&](auto tag) {
    constexpr ActivationKind kind = decltype(tag)::value;
    constexpr bool bounded = kind == ActivationKind::kTanh || kind == ActivationKind::kSigmoid;
    constexpr bool by_slope = bounded && sizeof(T) == 2;
    tiles.each_column(s, [&](int32_t column) {
      const int32_t from = tiles.column_place(s, column);
      [[maybe_unused]] float means[kWindows] = {};
      if constexpr (!channels_last) {
#pragma unroll
        for (int j = 0; j < kWindows; ++j) means[j] = m.mean[column * kWindows + j];
      }
      tiles.each(s, x, following, column, [&](const auto& tile, int32_t entry) {
        const auto grads =
            load_pack<kWindows>(map + map_place<channels_last, kWindows>(s, column, entry));
        float a[kWindows][4], sums[kWindows];
        float slopes[kWindows][4] = {};
#pragma unroll
        for (int j = 0; j < kWindows; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float value = tile.at(j, k);
            if constexpr (by_slope) {
              const Activated both = activated<kind, kCoarse<T>>(value);
              a[j][k] = both.value, slopes[j][k] = both.slope;
            } else {
              a[j][k] = fast_activation<kind, T, true>(value);
            }
          }
        }
        const auto unpool = [&](int j, const auto& times) {
          const float grad =
              static_cast<float>(grads.values[j]) - (channels_last ? m.mean[entry] : means[j]);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float grad_a = times(grad, a[j][k]);
            a[j][k] = by_slope ? grad_a * slopes[j][k] : activation_gradient<kind>(grad_a, a[j][k]);
          }
        };
        if (square_sums(a, sums)) [[likely]] {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) {
            const float inverse = reciprocal_root(sums[j]);
            // |a| <= 1, and no gradient is so large that 1e15 times it overflows: see SafeNorm.
            unpool(j, [&](float grad, float value) {
              return bounded ? value * (grad * inverse) : grad * (value * inverse);
            });
          }
        } else {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) {
            const float scale = scaled_square_sum(a[j], sums[j]);
            const float inverse = sums[j] == 0.0f ? 0.0f : reciprocal_root(sums[j]);
            unpool(j, [&](float grad, float value) { return grad * (value * scale * inverse); });
          }
        }
        tile.store(s, gx + tiles.place(s, from, entry), a);
      });
    });
  });
}

// Threads of a block at most, and blocks of so many for which a multiprocessor has registers: 64 or
// 72 a thread, 96 where the tile at hand and the one that is read ahead take 64 bytes each.
template <bool backward, bool channels_last, typename T>
constexpr int kMostTileThreads = backward && !(channels_last && sizeof(T) == 4) ? 448 : 320;
template <bool backward, bool channels_last, typename T>
constexpr int kTileBlocks = backward || (channels_last && sizeof(T) == 4) ? 2 : 3;

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads<false, channels_last, T>,
                                  kTileBlocks<false, channels_last, T>)
    tile_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory<float>(s);
  Tiles<channels_last, n, T> tiles(s, input + blockIdx.x * int64_t{s.g.in_n});
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T* const x = input + image * s.g.in_n;
    const T* const following =
        image + gridDim.x < s.N ? x + gridDim.x * int64_t{s.g.in_n} : nullptr;
    pool_tiles(s, m, tiles, x, following);
    if constexpr (channels_last) {
      __syncthreads();
      sum_channels<channels_last>(s, m, m.map[0]);
    }
    blur_sums<false>(s, m);
    write_map<channels_last>(s, m, m.map[0], output + image * s.g.out_n);
    __syncthreads();  // before the next image takes the map's place
  }
}

// The gradients of the next image come to the other map while this one's are at work, where there
// is room for two.
template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads<true, channels_last, T>,
                                  kTileBlocks<true, channels_last, T>)
    tile_backward_kernel(Fused<T> s, const T* __restrict__ grad_output, const T* __restrict__ input,
                         T* __restrict__ grad_input) {
  const auto m = shared_memory<T>(s);
  Tiles<channels_last, n, T> tiles(s, input + blockIdx.x * int64_t{s.g.in_n});
  copy_map<channels_last>(s, m.map[0], grad_output + blockIdx.x * int64_t{s.g.out_n});
  prepare(s, m);
  int turn = 0;
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x, turn ^= 1) {
    const T* const x = input + image * s.g.in_n;
    const T* const following =
        image + gridDim.x < s.N ? x + gridDim.x * int64_t{s.g.in_n} : nullptr;
    const T* map = turn != 0 ? m.map[1] : m.map[0];
    wait_for_copies();
    __syncthreads();
    const auto copy_next = [&] {
      if (following == nullptr) return;
      copy_map<channels_last>(s, turn != 0 ? m.map[0] : m.map[1],
                              grad_output + (image + gridDim.x) * int64_t{s.g.out_n});
    };
    if (s.maps > 1) copy_next();
    sum_channels<channels_last>(s, m, map);
    blur_sums<true>(s, m);
    unpool_tiles(s, m, map, tiles, x, following, grad_input + image * s.g.in_n);
    if (s.maps == 1) {
      __syncthreads();
      copy_next();
    }
  }
}

// The stage for one kernel, but for the weights; nothing where it is none of 2 x 2 windows with
// p = 2, the networks', that make up the image, where packs do not make up the image's rows or
// pixels, and where a block cannot hold a map. grad: of the backward pass, whose maps are its
// images; forward nullptr, which is aligned, as a new output is.
template <bool backward, typename T>
std::optional<Fused<T>> fused_of(const StageArguments& arguments, bool channels_last,
                                 const Tensor& kernel, const T* image, const T* grad) {
  constexpr int n = kShortPack<T>;
  const PoolGeometry& g = arguments.geometry;
  const int64_t taps = kernel.numel();
  if (arguments.p != 2.0 || g.kernel_h != 2 || g.kernel_w != 2 || g.stride_h != 2 ||
      g.stride_w != 2 || g.padding_h != 0 || g.padding_w != 0 || g.H != 2 * g.OH ||
      g.W != 2 * g.OW || kernel.dim() != 1) {
    return std::nullopt;
  }
  // Or else every size of Fused is far below 2^31, and the divisions are exact.
  const auto too_many = [](int64_t a, int64_t b) {
    constexpr int64_t kMost = 65535;
    return a > kMost || b > kMost || a * b > kMost;
  };
  if (!fits_narrow(g, 1) || too_many(g.OH, g.OW) || too_many(g.C + n, g.OH * g.OW) ||
      too_many(g.OH + taps, g.OW + taps)) {
    return std::nullopt;
  }
  const auto begins_with_pack = [](const T* tensor, int pack) {
    return reinterpret_cast<uintptr_t>(tensor) % (pack * sizeof(T)) == 0;
  };
  Fused<T> s{};
  s.pack = n;
  while (!begins_with_pack(image, s.pack) || (channels_last ? g.C : g.W) % s.pack != 0) {
    s.pack /= 2;
    if (channels_last || s.pack < 2) return std::nullopt;
  }
  s.N = g.N;
  s.g = narrow(g);
  s.activation = arguments.activation;
  s.taps = static_cast<int32_t>(taps);
  const int32_t pixels = s.pixels();
  s.tiles = channels_last ? Table{s.g.C / s.pack, pixels} : Table{s.g.OH * (s.g.W / s.pack), s.g.C};
  s.threads =
      channels_last ? kMostTileThreads<backward, true, T> : kMostTileThreads<backward, false, T>;
  if (s.tiles.columns < s.threads) {  // none that would find nothing to do
    const int64_t each = ceil_div(s.tiles.entries, s.tiles.groups(s.threads));
    s.threads =
        static_cast<int32_t>(round_up(ceil_div(s.tiles.entries, each) * s.tiles.columns, kWarp));
  }
  // The smallest number of channels that are packs, in NCHW.
  const int32_t whole = channels_last ? 1 : std::lcm(pixels, n) / pixels;
  s.map_pack = s.g.C % whole == 0 && begins_with_pack(grad, n);
  const int32_t map_pack = s.map_pack ? n : 1;
  if (channels_last) {
    s.packs = {s.g.C / map_pack, pixels};
    s.sums = std::max(1, std::min(s.g.C / n, s.threads / pixels));
  } else {
    const int32_t channels = s.map_pack ? whole : 1;
    s.packs = {channels * pixels / map_pack, s.g.C / channels};
    s.sums = backward ? s.packs.groups(s.threads) * channels : s.tiles.groups(s.threads);
  }
  const int64_t map_size = int64_t{pixels} * (channels_last ? s.step_pixel() : s.g.C);
  constexpr auto kSize = static_cast<int64_t>(backward ? sizeof(T) : sizeof(float));
  s.map_bytes = static_cast<int32_t>(round_up(map_size * kSize, 16));
  s.by_unit_row = Divider(s.g.W / s.pack);
  s.by_width = Divider(g.OW);
  s.by_pixels = Divider(pixels);
  s.maps = backward ? 2 : 1;
  if (s.shared_bytes() > shared_memory_limit()) s.maps = 1;
  if (s.shared_bytes() > shared_memory_limit()) return std::nullopt;
  return s;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(int64_t count, ActivationKind activation, const T* __restrict__ x,
                    opmath_t<T>* __restrict__ a) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    a[i] = activation_value(activation, static_cast<opmath_t<T>>(x[i]));
  }
}

// From the gradient of a = act(x), in the type to compute in, to that of x.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_gradient_kernel(int64_t count, ActivationKind activation,
                               const opmath_t<T>* __restrict__ grad,
                               const opmath_t<T>* __restrict__ a, T* __restrict__ grad_x) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    grad_x[i] = static_cast<T>(activation_gradient(activation, grad[i], a[i]));
  }
}

template <bool backward, typename T>
std::optional<Tensor> run_fused(const Tensor* grad_output, const Images& x, const Tensor& kernel,
                                const StageArguments& arguments) {
  const T* in = x.data.const_data_ptr<T>();
  const T* grad = backward ? grad_output->const_data_ptr<T>() : nullptr;
  auto s = fused_of<backward>(arguments, x.channels_last, kernel, in, grad);
  if (!s) return std::nullopt;
  const Launcher launcher(x.data);
  const Tensor weights = kernel_in_double(kernel);
  s->kernel = weights.const_data_ptr<double>();
  Tensor result = backward ? empty_images(x, x.H, x.W) : new_pooled(x, arguments.geometry);
  T* out = result.mutable_data_ptr<T>();
  const auto launch = [&](auto* kernel_of_images, const auto&... inputs) {
    launcher.run_clusters_with_shared(kernel_of_images, s->N, 1, s->threads, s->shared_bytes(), *s,
                                      inputs..., out);
  };
  const auto launch_for = [&](auto layout, auto number) {
    constexpr bool kLast = decltype(layout)::value != 0;
    constexpr int n = decltype(number)::value;
    if constexpr (backward) {
      launch(tile_backward_kernel<kLast, n, T>, grad, in);
    } else {
      launch(tile_forward_kernel<kLast, n, T>, in);
    }
  };
  if (x.channels_last) {
    launch_for(Number<1>{}, Number<kShortPack<T>>{});
  } else if (s->pack != 2) {
    launch_for(Number<0>{}, Number<kShortPack<T>>{});
  } else {
    launch_for(Number<0>{}, Number<2>{});
  }
  return result;
}

// The whole stage, or nothing where there is no kernel for it. grad_output: of the backward pass.
template <bool backward>
std::optional<Tensor> run_fused(const char* op, const Tensor* grad_output, const Images& x,
                                const Tensor& kernel, const StageArguments& arguments) {
  std::optional<Tensor> result;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      result = run_fused<backward, T>(grad_output, x, kernel, arguments);
    }
  });
  return result;
}

struct Backend {
  static constexpr auto fused = &run_fused<false>;
  static constexpr auto fused_backward = &run_fused<true>;

  static int64_t images_at_once(const Images& x) { return x.N; }

  static void activate(ActivationKind activation, const Tensor& x, Tensor& a) {
    dispatch_floating("stage2d", x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      Launcher(x).run_over(activate_kernel<T>, x.numel(), x.numel(), activation,
                           x.const_data_ptr<T>(), a.mutable_data_ptr<opmath_t<T>>());
    });
  }

  static void activate_backward(ActivationKind activation, const Tensor& a, const Tensor& grad_a,
                                Tensor& grad_x) {
    dispatch_floating("stage2d", grad_x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = opmath_t<T>;
      Launcher(a).run_over(activation_gradient_kernel<T>, a.numel(), a.numel(), activation,
                           grad_a.const_data_ptr<A>(), a.const_data_ptr<A>(),
                           grad_x.mutable_data_ptr<T>());
    });
  }

  static constexpr auto lp_pool2d = &cuda::lp_pool2d;
  static constexpr auto lp_pool2d_backward = &cuda::lp_pool2d_backward;
  static constexpr auto subtractive_norm2d = &cuda::subtractive_norm2d;
  static constexpr auto subtractive_norm2d_backward = &cuda::subtractive_norm2d_backward;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  StageOperators<Backend>::register_all(m);
}

}  // namespace mnist_ops::cuda
