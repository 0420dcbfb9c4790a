// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Where the networks' windows, 2 x 2 with p = 2, make up the image, its pooled map fits into the
// shared memory of a block, and the kernel is separable, one kernel does it all. It is bound by
// memory: the forward pass reads the input and writes the output, the backward pass reads input and
// gradient and writes a gradient, each of them once.
//
// As many blocks as fit share the images. A block takes one after the other; weights and coef it
// makes once. The pooled map, in the type to compute in, waits in shared memory for its mean: sums
// over channels, the blur of that one plane and the subtraction are between barriers of the block,
// not between kernels. All of a window is in the registers of one thread: in NCHW two rows of
// neighbours, in NHWC a pack of channels of four pixels. A thread reads its next 32 bytes (NHWC in
// float32: 64) before it computes with those at hand, also across the end of an image, so that 20
// KiB and more of a multiprocessor are on their way; 10 KiB are what 13 bytes a clock need at 800
// clocks of latency. The activation is cheaper than that of ../activation.h: a few units in the
// last place off, of the type of the tensor.
//
// Instructions a thread and element of the loop over tiles with tanh, in the code for sm_90 (those
// of all branches, also of windows that are scaled, which are few); about 3 for the map come on
// top. They were counted before the addresses of tiles became simpler. Budget: what a
// multiprocessor of an H100 issues, 128 a clock, while it moves an element at 13 bytes a clock.
// NOTHING OF THIS WAS TIMED ON A GPU YET: kernels before these, a block for an image and nothing
// read ahead, ran at 68 and 86 % of a copy's bandwidth in float32 and at 71 and 57 % in bfloat16,
// forward and backward.
//
//                      float32   bfloat16   float16
//   forward,  NCHW        30         14        26
//             NHWC        28         14        25
//             budget      49         25        25
//   backward, NCHW        34         28        37
//             NHWC        31         26        35
//             budget      88         44        44
//
// Elsewhere the three operators do (../stage.h). They move three to four times as much, and nothing
// measured asks for more than the networks' windows. No atomics either way.

#include "fast_math.cuh"
#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

// How exact an activation is to be.
enum class Precision {
  kFull,    // as in activation.h
  kSingle,  // 3 units in the last place of float32
  kCoarse,  // 2^-11 of the value: a quarter of bfloat16's last place
};

// What activations are computed to.
template <typename T>
constexpr Precision kPrecision = std::is_same_v<T, double>     ? Precision::kFull
                                 : std::is_same_v<T, BFloat16> ? Precision::kCoarse
                                                               : Precision::kSingle;

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

template <ActivationKind kind, Precision precision>
__device__ __forceinline__ Activated activated(float x) {
  const float size = std::fabs(x);
  if constexpr (kind == ActivationKind::kTanh) {
    const float e = two_to_the(size * -2.88539008f), r = reciprocal(1.0f + e);
    const float slope = 4.0f * e * r * r;
    if constexpr (precision == Precision::kCoarse) return {approximate_tanh(x), slope};
    return {tanh_of_parts(x, elementary::fmadd(-2.0f * e, r, 1.0f)), slope};
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
  } else if constexpr (kind == ActivationKind::kSigmoid && precision == Precision::kCoarse) {
    return reciprocal(two_to_the(x * -1.44269504f) + 1.0f);
  } else {
    return activation_value<kind>(x);
  }
}

// The sum of squares of a window. Where that is beyond the range of A, or has lost digits, that of
// the elements times a power of two, which is returned: what their norm is larger by.
template <typename A>
__device__ __forceinline__ A scaled_square_sum(const A (&a)[4], A& sum) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(0x1p100) : A(0x1p600);
  sum = a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
  if (is_safe_square_sum(sum)) return A(1);
  const A scale = sum > A(1) ? A(1) / kLarge : kLarge;
  sum = A(0);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A scaled = a[k] * scale;
    sum += scaled * scaled;
  }
  return scale;
}

template <typename T, typename A>
__device__ __forceinline__ A tile_norm(const A (&a)[4]) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(0x1p100) : A(0x1p600);
  A sum;
  const A scale = scaled_square_sum(a, sum);
  A norm;
  if constexpr (sizeof(T) == 2) {
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
  // So many are read before the first of them is used: 32 bytes in half types, too.
  static constexpr int kAtOnce = sizeof(T) == 2 && !channels_last ? 2 : 1;

  // A pack as it was read. Of elements of 16 bits nvcc would unpack what it has read at once, and
  // wait for it, where it is to be read ahead.
  using Words = Pack<uint32_t, static_cast<int>(sizeof(Pack<T, n>) / 4)>;
  struct Raw {
    Words words[kPacks];
  };

  Pack<T, n> packs[kPacks];

  __device__ __forceinline__ explicit Tile(const Raw& raw) {
    static_assert(sizeof(raw.words) == sizeof(packs));
    std::memcpy(packs, raw.words, sizeof(packs));
  }

  // Element k, 0 to 3, of window j.
  __device__ __forceinline__ T& at(int j, int k) {
    return channels_last ? packs[k].values[j] : packs[k / 2].values[2 * j + k % 2];
  }

  // Where in the image the pack-th one lies, from the first.
  static __device__ __forceinline__ int32_t offset(const Fused<T>& s, int pack) {
    if (!channels_last) return pack * s.g.W;
    return (pack / 2 * s.g.W + pack % 2) * s.g.C;
  }

  static __device__ __forceinline__ Raw read(const Fused<T>& s, const T* x) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      raw.words[k] = *reinterpret_cast<const Words*>(x + offset(s, k));
    }
    return raw;
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
    // Each row of windows before this one has a second row of the image, 2 OW pixels.
    const uint32_t first = 2 * (pixel + s.by_width.quotient(pixel) * static_cast<uint32_t>(s.g.OW));
    return {static_cast<int32_t>(first * static_cast<uint32_t>(s.g.C) + c),
            static_cast<int32_t>(pixel * static_cast<uint32_t>(s.step_pixel()) + c),
            static_cast<int32_t>(pixel)};
  } else {
    // The rows of windows before this one have two rows of the image each.
    const uint32_t in = row * static_cast<uint32_t>(s.g.W) + unit * n;
    const uint32_t map = unit * (n / 2);
    const uint32_t pixel = map - s.by_inner.quotient(map) * static_cast<uint32_t>(s.pixels());
    return {static_cast<int32_t>(in), static_cast<int32_t>(map), static_cast<int32_t>(pixel)};
  }
}

// This thread's tiles of one image after the other. The next ones are read before those at hand are
// worked on, also those of the next image: loads are in flight while the block computes, blurs and
// waits at its barriers.
template <bool channels_last, int n, typename T>
struct Tiles {
  using Tile = cuda::Tile<channels_last, n, T>;
  static constexpr uint32_t kAtOnce = Tile::kAtOnce;

  typename Tile::Raw tiles[kAtOnce];
  TilePlace places[kAtOnce];

  // From the unit first on; beyond the last one there is that one again.
  __device__ __forceinline__ void read(const Fused<T>& s, const T* x, uint32_t first) {
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t unit = first + k * blockDim.x;
      places[k] = tile_place<channels_last, n>(s, unit < s.units ? unit : s.units - 1);
      tiles[k] = Tile::read(s, x + places[k].in);
    }
  }

  // Calls body(tile, place) for the tiles of x, whose first ones were read, and reads the first
  // ones of following, which is nullptr behind the last image.
  template <typename F>
  __device__ __forceinline__ void each(const Fused<T>& s, const T* x, const T* following,
                                       const F& body) {
    for (uint32_t first = threadIdx.x, next; first < s.units; first = next) {
      next = first + kAtOnce * blockDim.x;
      const Tiles now = *this;
      const bool last = next >= s.units;
      if (!last || following != nullptr) read(s, last ? following : x, last ? threadIdx.x : next);
#pragma unroll
      for (uint32_t k = 0; k < kAtOnce; ++k) {
        if (first + k * blockDim.x >= s.units) continue;
        Tile tile(now.tiles[k]);
        body(tile, now.places[k]);
      }
    }
  }
};

template <bool channels_last, int n, typename T, typename A>
__device__ __forceinline__ void pool_tiles(const Fused<T>& s, const SharedMemory<A>& m,
                                           Tiles<channels_last, n, T>& tiles, const T* x,
                                           const T* following) {
  constexpr Precision precision = kPrecision<T>;
  dispatch_activation(s.activation, [&](auto tag) {
    tiles.each(s, x, following, [&](auto& tile, const TilePlace& place) {
      Pack<A, std::remove_reference_t<decltype(tile)>::kWindows> norms;
#pragma unroll
      for (int j = 0; j < tile.kWindows; ++j) {
        A a[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[k] = fast_activation<decltype(tag)::value, precision>(static_cast<A>(tile.at(j, k)));
        }
        norms.values[j] = tile_norm<T>(a);
      }
      store_pack(m.map + place.map, norms);
    });
  });
}

template <bool channels_last, int n, typename T, typename A>
__device__ __forceinline__ void unpool_tiles(const Fused<T>& s, const SharedMemory<A>& m,
                                             Tiles<channels_last, n, T>& tiles, const T* x,
                                             const T* following, T* gx) {
  dispatch_activation(s.activation, [&](auto tag) {
    constexpr ActivationKind kind = decltype(tag)::value;
    constexpr bool by_slope =
        sizeof(T) == 2 && (kind == ActivationKind::kTanh || kind == ActivationKind::kSigmoid);
    tiles.each(s, x, following, [&](auto& tile, const TilePlace& place) {
      constexpr int kWindows = std::remove_reference_t<decltype(tile)>::kWindows;
      const Pack<A, kWindows> grads = load_pack<kWindows>(m.map + place.map);
#pragma unroll
      for (int j = 0; j < kWindows; ++j) {
        A a[4], sum;
        [[maybe_unused]] A slopes[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A value = static_cast<A>(tile.at(j, k));
          if constexpr (by_slope) {
            const Activated both = activated<kind, kPrecision<T>>(value);
            a[k] = both.value, slopes[k] = both.slope;
          } else {
            a[k] = fast_activation<kind, kPrecision<T>>(value);
          }
        }
        const A scale = scaled_square_sum(a, sum);
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

// Threads of a block, and blocks of so many on a multiprocessor: 80 registers a thread, and 96
// where the tile at hand and the one that is read ahead take 64 bytes each.
constexpr int kLeastTileThreads = 128;
template <bool channels_last, typename T>
constexpr int kMostTileThreads = channels_last && sizeof(T) == 4 ? 320 : 384;
template <typename T>
constexpr int kTileBlocks = std::is_same_v<T, double> ? 1 : 2;

// Where the image lies that a block takes after this one, at x; nullptr behind the last.
template <typename T>
__device__ __forceinline__ const T* following_image(const Fused<T>& s, const T* x, int64_t image) {
  return image + gridDim.x < s.N ? x + gridDim.x * int64_t{s.g.in_n} : nullptr;
}

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads<channels_last, T>, kTileBlocks<T>)
    tile_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s);
  Tiles<channels_last, n, T> tiles;
  tiles.read(s, input + blockIdx.x * int64_t{s.g.in_n}, threadIdx.x);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T *x = input + image * s.g.in_n, *following = following_image(s, x, image);
    pool_tiles(s, m, tiles, x, following);
    blur_map<false>(s, m, image == blockIdx.x);
    write_map(s, m, output + image * s.g.out_n);
    __syncthreads();  // before the next image takes the map's place
  }
}

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads<channels_last, T>, kTileBlocks<T>)
    tile_backward_kernel(Fused<T> s, const T* __restrict__ grad_output, const T* __restrict__ input,
                         T* __restrict__ grad_input) {
  const auto m = shared_memory(s);
  Tiles<channels_last, n, T> tiles;
  tiles.read(s, input + blockIdx.x * int64_t{s.g.in_n}, threadIdx.x);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    read_map(s, m, grad_output + image * s.g.out_n);
    blur_map<true>(s, m, image == blockIdx.x);
    const T *x = input + image * s.g.in_n, *following = following_image(s, x, image);
    T* gx = grad_input + image * s.g.in_n;
    unpool_tiles(s, m, tiles, x, following, gx);
    __syncthreads();
  }
}

// How many elements, neighbours of a row or channels, a thread takes at once; 0 where windows of
// 2 x 2 with p = 2, the networks', do not make up the image, or packs its rows or pixels.
template <typename T>
int tile_pack(const StageArguments& arguments, bool channels_last, const T* image) {
  const PoolGeometry& g = arguments.geometry;
  if (arguments.p != 2.0 || g.kernel_h != 2 || g.kernel_w != 2 || g.stride_h != 2 ||
      g.stride_w != 2 || g.padding_h != 0 || g.padding_w != 0 || g.H != 2 * g.OH ||
      g.W != 2 * g.OW) {
    return 0;
  }
  for (int n = kNeighbours<T>; n >= (channels_last ? kNeighbours<T> : 2); n /= 2) {
    const bool aligned = reinterpret_cast<uintptr_t>(image) % (n * sizeof(T)) == 0;
    if (aligned && (channels_last ? g.C : g.W) % n == 0) return n;
  }
  return 0;
}

// The stage for one kernel, a block for each image; where the weights are is left to be said. map:
// a tensor of the output's shape; pack: what tile_pack said. The geometry must fit into 32 bits.
template <typename T>
Fused<T> fused_of(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
                  const T* map, int pack) {
  constexpr int n = kNeighbours<T>;
  const PoolGeometry& g = arguments.geometry;
  Fused<T> s{};
  s.N = g.N;
  s.g = narrow(g);
  s.activation = arguments.activation;
  s.channels_last = channels_last;
  s.taps = static_cast<int32_t>(kernel.numel());
  s.sum_pack = (channels_last ? s.g.C : s.pixels()) % n == 0;
  s.map_pack = (channels_last ? s.g.C : s.map_size()) % n == 0 &&
               reinterpret_cast<uintptr_t>(map) % (n * sizeof(T)) == 0;
  s.groups = std::min(s.sum_parts(), std::max(4, 128 / s.sum_units()));
  if (pack > 0) {
    s.unit_row = static_cast<uint32_t>((channels_last ? s.g.C : s.g.W) / pack);
    s.units = s.unit_row * static_cast<uint32_t>(channels_last ? s.pixels() : s.g.C * s.g.OH);
    s.by_unit_row = Divider(s.unit_row);
  }
  s.by_width = Divider(g.OW);
  s.by_inner = Divider(channels_last ? g.C : g.OH * g.OW);
  s.by_sums = Divider(s.sum_units());
  return s;
}

// Whether a block can hold an image; every size that Fused has is then far below 2^31, and the
// divisions are exact.
template <typename T>
bool fits_block(const StageArguments& arguments, bool channels_last, const Tensor& kernel) {
  const PoolGeometry& g = arguments.geometry;
  constexpr int64_t kMost = 65535;
  const auto product = [](int64_t a, int64_t b) {
    return a > kMost || b > kMost ? kMost + 1 : a * b;
  };
  const int64_t pixels = product(g.OH, g.OW);
  if (kernel.dim() != 1 || !fits_narrow(g, 1) || kernel.numel() > kMost ||
      product(g.C + 1, pixels) > kMost ||
      product(g.OH + kernel.numel(), g.OW + kernel.numel()) > kMost) {
    return false;
  }
  const Fused<T> s =
      fused_of<T>(arguments, channels_last, kernel, static_cast<const T*>(nullptr), 0);
  return s.shared_bytes() <= shared_memory_limit();
}

// Threads of a block, so that the blocks that a multiprocessor holds fill it: few blocks of many
// threads where an image takes much of its memory, or where there are few images.
template <typename T>
int tile_threads(const Fused<T>& s) {
  const int64_t most = s.channels_last ? kMostTileThreads<true, T> : kMostTileThreads<false, T>;
  const int64_t bytes = s.shared_bytes() + 1024;  // which the system takes of each block's
  const int64_t resident =
      std::min({(shared_memory_limit() + 1024) / bytes, ceil_div(s.N, multiprocessor_count()),
                2 * most / kLeastTileThreads});
  const int64_t threads = 2 * most / std::max<int64_t>(resident, 1) / kWarp * kWarp;
  const int64_t needed = ceil_div(s.units, kWarp) * kWarp;
  return static_cast<int>(std::max<int64_t>(kLeastTileThreads, std::min({threads, needed, most})));
}

// Calls body with the layout and the pack of a kernel, as Numbers.
template <typename T, typename F>
void dispatch_tiles(bool channels_last, int pack, const F& body) {
  if (channels_last) return body(Number<1>{}, Number<kNeighbours<T>>{});
  if constexpr (kNeighbours<T> == 4) {
    if (pack == 4) return body(Number<0>{}, Number<4>{});
  }
  body(Number<0>{}, Number<2>{});
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

struct Backend {
  static std::optional<Tensor> fused(const char* op, const Images& x, const Tensor& kernel,
                                     const StageArguments& arguments) {
    std::optional<Tensor> output;
    dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T* in = x.data.const_data_ptr<T>();
      const int pack = tile_pack<T>(arguments, x.channels_last, in);
      if (pack == 0 || !fits_block<T>(arguments, x.channels_last, kernel)) return;
      const Launcher launcher(x.data);
      const Tensor weights = kernel_in_double(kernel);
      output = new_pooled(x, arguments.geometry);
      T* out = output->mutable_data_ptr<T>();
      Fused<T> s = fused_of<T>(arguments, x.channels_last, kernel, out, pack);
      s.kernel = weights.const_data_ptr<double>();
      dispatch_tiles<T>(x.channels_last, pack, [&](auto layout, auto n) {
        launcher.run_clusters_with_shared(
            tile_forward_kernel<decltype(layout)::value != 0, decltype(n)::value, T>, s.N, 1,
            tile_threads(s), s.shared_bytes(), s, in, out);
      });
    });
    return output;
  }

  static std::optional<Tensor> fused_backward(const char* op, const Tensor& grad_output,
                                              const Images& x, const Tensor& kernel,
                                              const StageArguments& arguments) {
    std::optional<Tensor> grad_input;
    dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T *in = x.data.const_data_ptr<T>(), *grad = grad_output.const_data_ptr<T>();
      const int pack = tile_pack<T>(arguments, x.channels_last, in);  // new tensors are aligned
      if (pack == 0 || !fits_block<T>(arguments, x.channels_last, kernel)) return;
      const Launcher launcher(x.data);
      const Tensor weights = kernel_in_double(kernel);
      grad_input = empty_images(x, x.H, x.W);
      T* to = grad_input->mutable_data_ptr<T>();
      Fused<T> s = fused_of<T>(arguments, x.channels_last, kernel, grad, pack);
      s.kernel = weights.const_data_ptr<double>();
      dispatch_tiles<T>(x.channels_last, pack, [&](auto layout, auto n) {
        launcher.run_clusters_with_shared(
            tile_backward_kernel<decltype(layout)::value != 0, decltype(n)::value, T>, s.N, 1,
            tile_threads(s), s.shared_bytes(), s, grad, in, to);
      });
    });
    return grad_input;
  }

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
