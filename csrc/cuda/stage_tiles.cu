// Stages whose windows of 2 x 2 with p = 2 tile the image.

#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

// How exact an activation is to be.
enum class Precision {
  kFull,    // as in activation.h
  kSingle,  // 3 units in the last place of float32
  kHalf,    // 2^-14 of the value: a quarter of float16's last place
  kCoarse,  // 2^-11: a quarter of bfloat16's
};

// What the forward pass computes its activations to.
template <typename T>
constexpr Precision kPrecision = std::is_same_v<T, double>  ? Precision::kFull
                                 : std::is_same_v<T, float> ? Precision::kSingle
                                 : std::is_same_v<T, Half>  ? Precision::kHalf
                                                            : Precision::kCoarse;

// tanh(x), given |tanh(x)|, or, where that cancelled, by a polynomial.
__device__ __forceinline__ float tanh_of_parts(float x, float far) {
  const float s = x * x;
  float p = 0.016010596f;
  p = elementary::fmadd(p, s, -0.0524437247f);
  p = elementary::fmadd(p, s, 0.133171178f);
  p = elementary::fmadd(p, s, -0.333327887f);
  const float near = elementary::fmadd(x * s, p, x);
  return std::fabs(x) < 0.575f ? near : std::copysign(far, x);
}

template <Precision precision>
__device__ __forceinline__ float fast_tanh(float x) {
  if constexpr (precision == Precision::kCoarse) {
    return approximate_tanh(x);
  } else if constexpr (precision == Precision::kHalf) {
    // x P(x^2) / Q(x^2), 4e-6 from tanh up to 5.5, where tanh is 1 - 3.3e-5.
    x = clamped(x, 5.5f);
    const float s = x * x;
    float p = 1.575995e-3f;
    p = elementary::fmadd(p, s, 0.115749445f);
    p = elementary::fmadd(p, s, 0.999995946f);
    float q = 6.02852609e-5f;
    q = elementary::fmadd(q, s, 1.79639782e-2f);
    q = elementary::fmadd(q, s, 0.449053077f);
    q = elementary::fmadd(q, s, 1.0f);
    return x * p * reciprocal(q);
  } else {
    // 1 - 2 / (exp(2 |x|) + 1).
    const float size = std::fabs(x);
    return tanh_of_parts(
        x, elementary::fmadd(-2.0f, reciprocal(two_to_the(size * 2.88539008f) + 1.0f), 1.0f));
  }
}

// act(x) and act'(x) for the gradients of half types, by way of e = exp(-2 |x|), or of exp(-|x|):
// the slope of a saturated unit keeps its digits, where 1 - tanh^2 would have none.
struct Activated {
  float value, slope;
};

template <ActivationKind kind>
__device__ __forceinline__ Activated activated(float x) {
  const float size = std::fabs(x);
  if constexpr (kind == ActivationKind::kTanh) {
    const float e = two_to_the(size * -2.88539008f), r = reciprocal(1.0f + e);
    return {tanh_of_parts(x, elementary::fmadd(-2.0f * e, r, 1.0f)), 4.0f * e * r * r};
  } else {
    static_assert(kind == ActivationKind::kSigmoid);
    const float e = two_to_the(size * -1.44269504f), r = reciprocal(1.0f + e);
    return {x < 0.0f ? e * r : r, e * r * r};
  }
}

template <ActivationKind kind, Precision precision, typename A>
__device__ __forceinline__ A fast_activation(A x) {
  if constexpr (precision == Precision::kFull) {
    return activation_value<kind>(x);
  } else if constexpr (kind == ActivationKind::kTanh) {
    return fast_tanh<precision>(x);
  } else if constexpr (kind == ActivationKind::kSigmoid && precision != Precision::kSingle) {
    return reciprocal(two_to_the(x * -1.44269504f) + 1.0f);
  } else {
    return activation_value<kind>(x);
  }
}

// The sum of squares of a window. Where that is beyond the range of A, or has lost digits, all
// elements are multiplied by a power of two first, which is returned: what their norm is larger by.
template <typename A>
__device__ __forceinline__ A scaled_square_sum(A (&a)[4], A& sum) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(0x1p100) : A(0x1p600);
  sum = a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
  if (is_safe_square_sum(sum)) return A(1);
  const A scale = sum > A(1) ? A(1) / kLarge : kLarge;
#pragma unroll
  for (int k = 0; k < 4; ++k) a[k] *= scale;
  sum = a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
  return scale;
}

template <Precision precision, typename A>
__device__ __forceinline__ A tile_norm(A (&a)[4]) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(0x1p100) : A(0x1p600);
  A sum;
  const A scale = scaled_square_sum(a, sum);
  A norm;
  if constexpr (precision == Precision::kHalf || precision == Precision::kCoarse) {
    norm = approximate_root(sum);
  } else {
    norm = std::sqrt(sum);
  }
  return scale == A(1) ? norm : scale < A(1) ? norm * kLarge : norm * (A(1) / kLarge);
}

// What one thread takes at once. NCHW: n neighbours of two rows. NHWC: n channels of four pixels.
template <bool channels_last, int n, typename T>
struct Tile {
  using A = opmath_t<T>;
  static constexpr int kPacks = channels_last ? 4 : 2;
  static constexpr int kWindows = channels_last ? n : n / 2;
  // So many are read before the first of them is used: 32 bytes.
  static constexpr int kAtOnce = 32 / (kPacks * n * static_cast<int>(sizeof(T))) > 1
                                     ? 32 / (kPacks * n * static_cast<int>(sizeof(T)))
                                     : 1;

  Pack<T, n> packs[kPacks];

  // Element k, 0 to 3, of window j.
  __device__ __forceinline__ T& at(int j, int k) {
    return channels_last ? packs[k].values[j] : packs[k / 2].values[2 * j + k % 2];
  }

  // Where in the image the pack-th one lies, from the first.
  static __device__ __forceinline__ int32_t offset(const Fused<T>& s, int pack) {
    if (!channels_last) return pack * s.g.W;
    return (pack / 2 * s.g.W + pack % 2) * s.g.C;
  }

  __device__ __forceinline__ void load(const Fused<T>& s, const T* x) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) packs[k] = load_pack<n>(x + offset(s, k));
  }

  __device__ __forceinline__ void store(const Fused<T>& s, T* x) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) store_pack(x + offset(s, k), packs[k]);
  }
};

// Where a tile lies: in the image, in the map in shared memory, the pixel of its first window.
struct TilePlace {
  int32_t in, map, pixel;
};

template <bool channels_last, int n, typename T>
__device__ __forceinline__ TilePlace tile_place(const Fused<T>& s, uint32_t unit) {
  const uint32_t row = s.by_unit_row.quotient(unit);
  if constexpr (channels_last) {
    const uint32_t pixel = row, c = (unit - pixel * s.unit_row) * n;
    const uint32_t h = s.by_rows.quotient(pixel), w = pixel - h * static_cast<uint32_t>(s.g.OW);
    const uint32_t first = 2 * (h * static_cast<uint32_t>(s.g.W) + w);
    return {static_cast<int32_t>(first * static_cast<uint32_t>(s.g.C) + c),
            static_cast<int32_t>(pixel * static_cast<uint32_t>(s.step_pixel()) + c),
            static_cast<int32_t>(pixel)};
  } else {
    // The rows of windows before this one have two rows of the image each, and with an odd height
    // the last row of each plane is in no window.
    uint32_t in = row * static_cast<uint32_t>(s.g.W) + unit * n;
    if (s.g.H % 2 != 0) in += s.by_rows.quotient(row) * static_cast<uint32_t>(s.g.W);
    const uint32_t map = unit * (n / 2);
    const uint32_t pixel = map - s.by_inner.quotient(map) * static_cast<uint32_t>(s.pixels());
    return {static_cast<int32_t>(in), static_cast<int32_t>(map), static_cast<int32_t>(pixel)};
  }
}

// Calls body(tile, place) for this thread's tiles, several of which are read at a time.
template <bool channels_last, int n, typename T, typename F>
__device__ __forceinline__ void each_tile(const Fused<T>& s, const T* __restrict__ x,
                                          const F& body) {
  using Tile = Tile<channels_last, n, T>;
  for (uint32_t first = threadIdx.x; first < s.units; first += Tile::kAtOnce * blockDim.x) {
    Tile tiles[Tile::kAtOnce];
    TilePlace places[Tile::kAtOnce];
#pragma unroll
    for (int k = 0; k < Tile::kAtOnce; ++k) {
      const uint32_t unit = first + static_cast<uint32_t>(k) * blockDim.x;
      places[k] = tile_place<channels_last, n>(s, unit < s.units ? unit : first);
      tiles[k].load(s, x + places[k].in);
    }
#pragma unroll
    for (int k = 0; k < Tile::kAtOnce; ++k) {
      if (first + static_cast<uint32_t>(k) * blockDim.x < s.units) body(tiles[k], places[k]);
    }
  }
}

template <bool channels_last, int n, typename T, typename A>
__device__ __forceinline__ void pool_tiles(const Fused<T>& s, const SharedMemory<A>& m,
                                           const T* __restrict__ x) {
  constexpr Precision precision = kPrecision<T>;
  dispatch_activation(s.activation, [&](auto tag) {
    each_tile<channels_last, n>(s, x, [&](auto& tile, const TilePlace& place) {
      Pack<A, std::remove_reference_t<decltype(tile)>::kWindows> norms;
#pragma unroll
      for (int j = 0; j < tile.kWindows; ++j) {
        A a[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[k] = fast_activation<decltype(tag)::value, precision>(static_cast<A>(tile.at(j, k)));
        }
        norms.values[j] = tile_norm<precision>(a);
      }
      store_pack(m.map + place.map, norms);
    });
  });
}

template <bool channels_last, int n, typename T, typename A>
__device__ __forceinline__ void unpool_tiles(const Fused<T>& s, const SharedMemory<A>& m,
                                             const T* __restrict__ x, T* __restrict__ gx) {
  dispatch_activation(s.activation, [&](auto tag) {
    constexpr ActivationKind kind = decltype(tag)::value;
    constexpr bool by_slope =
        sizeof(T) == 2 && (kind == ActivationKind::kTanh || kind == ActivationKind::kSigmoid);
    each_tile<channels_last, n>(s, x, [&](auto& tile, const TilePlace& place) {
      constexpr int kWindows = std::remove_reference_t<decltype(tile)>::kWindows;
      const Pack<A, kWindows> grads = load_pack<kWindows>(m.map + place.map);
#pragma unroll
      for (int j = 0; j < kWindows; ++j) {
        A a[4], scaled[4], sum;
        [[maybe_unused]] A slopes[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A value = static_cast<A>(tile.at(j, k));
          if constexpr (by_slope) {
            const Activated both = activated<kind>(value);
            a[k] = both.value, slopes[k] = both.slope;
          } else {
            a[k] = fast_activation<kind, kPrecision<T>>(value);
          }
          scaled[k] = a[k];
        }
        const A scale = scaled_square_sum(scaled, sum);
        const A inverse = sum == A(0) ? A(0) : reciprocal_root(sum);
        const A grad = grads.values[j] - m.mean[channels_last ? place.pixel : place.pixel + j];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // a[k] * scale once more takes no registers, and is exact.
          const A grad_a = grad * (a[k] * scale * inverse);
          if constexpr (by_slope) {
            tile.at(j, k) = static_cast<T>(grad_a * slopes[k]);
          } else {
            tile.at(j, k) = static_cast<T>(activation_gradient<kind>(grad_a, a[k]));
          }
        }
      }
      tile.store(s, gx + place.in);
    });
  });
}

// The gradient of the last row and column of an image with odd sizes, which are in no window.
template <typename T>
__device__ void unpool_edges(const Fused<T>& s, const T* x, T* gx) {
  using A = opmath_t<T>;
  const int32_t H = s.g.H, W = s.g.W, C = s.g.C;
  const int32_t below = (H - 2 * s.g.OH) * W;
  const int32_t edge = below + (W - 2 * s.g.OW) * 2 * s.g.OH;
  for (int32_t i = this_thread(); i < edge * C; i += block_threads()) {
    const int32_t c = s.channels_last ? i % C : i / edge, at = s.channels_last ? i / C : i % edge;
    const int32_t pixel = at < below ? 2 * s.g.OH * W + at : (at - below) * W + W - 1;
    const int32_t to = s.channels_last ? pixel * C + c : c * H * W + pixel;
    // Nothing but a NaN makes anything of it.
    const A a = ActivatedPlane<T>{x, s.activation}[to];
    gx[to] = static_cast<T>(activation_gradient(s.activation, A(0), a));
  }
}

// Two blocks of 512 threads, or four of 256, on a multiprocessor: 64 registers a thread. In 40, of
// 1536 threads, the kernels do not fit.
constexpr int kMostTileThreads = 512, kTileThreads = 1024, kLeastTileThreads = 128;
template <typename T>
constexpr int kTileBlocks = std::is_same_v<T, double> ? 1 : kTileThreads / kMostTileThreads;

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads, kTileBlocks<T>)
    tile_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s, 1);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    pool_tiles<channels_last, n>(s, m, input + image * s.g.in_n);
    blur_map<false>(s, m, image == blockIdx.x);
    write_map(s, m, output + image * s.g.out_n);
    __syncthreads();  // before the next image takes the map's place
  }
}

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads, kTileBlocks<T>)
    tile_backward_kernel(Fused<T> s, const T* __restrict__ grad_output, const T* __restrict__ input,
                         T* __restrict__ grad_input) {
  const auto m = shared_memory(s, 1);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    read_map(s, m, grad_output + image * s.g.out_n);
    blur_map<true>(s, m, image == blockIdx.x);
    const T* x = input + image * s.g.in_n;
    T* gx = grad_input + image * s.g.in_n;
    unpool_tiles<channels_last, n>(s, m, x, gx);
    unpool_edges(s, x, gx);
    __syncthreads();
  }
}

// Calls body with a kernel's tag: its layout and pack.
template <bool layout, int n>
struct TileTag {
  static constexpr bool channels_last = layout;
  static constexpr int pack = n;
};

template <typename T, typename F>
void dispatch_tiles(bool channels_last, int pack, const F& body) {
  if (channels_last) return body(TileTag<true, kNeighbours<T>>{});
  if constexpr (kNeighbours<T> == 4) {
    if (pack == 4) return body(TileTag<false, 4>{});
  }
  body(TileTag<false, 2>{});
}

// Threads of a block, so that the blocks that a multiprocessor holds fill it: few blocks of many
// threads where an image takes much of its memory, or where there are few images.
template <typename T>
int tile_threads(const Fused<T>& s) {
  const int64_t bytes = s.shared_bytes(1) + 1024;  // which the system takes of each block's
  const int64_t resident =
      std::min({(shared_memory_limit() + 1024) / bytes, ceil_div(s.N, multiprocessor_count()),
                int64_t{kTileThreads / kLeastTileThreads}});
  const int64_t threads = kTileThreads / std::max<int64_t>(resident, 1) / kWarp * kWarp;
  const int64_t needed = ceil_div(s.units, kWarp) * kWarp;
  return static_cast<int>(
      std::max<int64_t>(kLeastTileThreads, std::min<int64_t>({threads, needed, kMostTileThreads})));
}

}  // namespace

}  // namespace mnist_ops::cuda
