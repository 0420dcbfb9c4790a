// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Where the networks' windows, 2 x 2 with p = 2, tile the image, and the pooled map of an image
// fits into the shared memory of a block, one kernel does it all. It is bound by memory: the
// forward pass reads the input and writes the output, the backward pass reads input and gradient
// and writes a gradient, each of them once. That leaves some 25 instructions for an element of a
// half type; sigmoid in float16, which is computed as exactly as in float32, takes more.
//
// One block takes one image. The pooled map, in the type to compute in, waits in shared memory for
// its mean: sums over channels, the blur of that one plane and the subtraction are between barriers
// of the block, not between kernels; coef and the normalised weights are made on the way. All of a
// window is in the registers of one thread: in NCHW two rows of neighbours, in NHWC a pack of
// channels of four pixels. The activation is cheaper than that of ../activation.h: a few units in
// the last place off, of the type of the tensor. As many threads make a block as fill a
// multiprocessor together with the other blocks that it holds. On an H100, with more threads than
// now, the forward pass ran at 68 to 71 % of a copy's bandwidth, the backward pass at 86 % in
// float32 and 57 % in bfloat16.
//
// Elsewhere the three operators do, one after the other, between which everything is in the type to
// compute in: half types are rounded once here, too. They move three to four times as much, and
// nothing measured asks for more than the networks' windows. No atomics either way.

#include "fast_math.cuh"
#include "lp_pool.cuh"
#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

// How exact an activation is to be.
enum class Precision {
  kFull,    // as in activation.h
  kSingle,  // 3 units in the last place of float32
  kCoarse,  // 2^-11 of the value: a quarter of bfloat16's last place
};

// What the forward pass computes its activations to.
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

template <Precision precision, typename A>
__device__ __forceinline__ A tile_norm(const A (&a)[4]) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(0x1p100) : A(0x1p600);
  A sum;
  const A scale = scaled_square_sum(a, sum);
  A norm;
  if constexpr (precision == Precision::kCoarse) {
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
        A a[4], sum;
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
    const A a = activation_value(s.activation, static_cast<A>(x[to]));
    gx[to] = static_cast<T>(activation_gradient(s.activation, A(0), a));
  }
}

// Threads of a block at most, and blocks of so many on a multiprocessor. 64 registers a thread, as
// two blocks of 512 threads leave them, are too few where four packs of 16 bytes are in flight.
constexpr int kLeastTileThreads = 128;
template <bool channels_last, typename T>
constexpr int kMostTileThreads = !channels_last || sizeof(T) == 2 ? 512
                                 : sizeof(T) == 4                 ? 448
                                                                  : 384;
template <typename T>
constexpr int kTileBlocks = std::is_same_v<T, double> ? 1 : 2;

template <bool channels_last, int n, typename T>
__global__ void __launch_bounds__(kMostTileThreads<channels_last, T>, kTileBlocks<T>)
    tile_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    pool_tiles<channels_last, n>(s, m, input + image * s.g.in_n);
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

// How many elements, neighbours of a row or channels, a thread takes at once where 2 x 2 windows
// with p = 2 tile the image; 0 where windows are taken one by one.
template <typename T, typename... Pointers>
int tile_pack(const StageArguments& arguments, bool channels_last, const Pointers*... images) {
  const PoolGeometry& g = arguments.geometry;
  const bool tiles = g.kernel_h == 2 && g.kernel_w == 2 && g.stride_h == 2 && g.stride_w == 2 &&
                     g.padding_h == 0 && g.padding_w == 0;
  // With ceil_mode a last row of windows may hang over the image.
  const bool inside = 2 * g.OH <= g.H && 2 * g.OW <= g.W;
  if (arguments.p != 2.0 || !tiles || !inside) return 0;
  for (int n = kNeighbours<T>; n >= (channels_last ? kNeighbours<T> : 2); n /= 2) {
    const auto aligned = [n](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (static_cast<size_t>(n) * sizeof(T)) == 0;
    };
    if ((channels_last ? g.C : g.W) % n == 0 && (aligned(images) && ...)) return n;
  }
  return 0;
}

// The stage for one kernel, a block for each image; where the weights are is left to be said. map:
// a tensor of the output's shape; pack: what tile_pack said. The geometry must fit into 32 bits.
template <typename T>
Fused<T> fused(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
               const T* map, int pack) {
  constexpr int n = kNeighbours<T>;
  const PoolGeometry& g = arguments.geometry;
  Fused<T> s{};
  s.N = g.N;
  s.g = narrow(g);
  s.activation = arguments.activation;
  s.channels_last = channels_last;
  s.taps_h = static_cast<int32_t>(kernel.size(0));
  s.taps_w = static_cast<int32_t>(kernel.size(kernel.dim() - 1));
  s.separable = kernel.dim() == 1;
  s.sum_pack = (channels_last ? s.g.C : s.pixels()) % n == 0;
  s.map_pack = (channels_last ? s.g.C : s.map_size()) % n == 0 &&
               reinterpret_cast<uintptr_t>(map) % (n * sizeof(T)) == 0;
  s.groups = std::min(s.sum_parts(), std::max(4, 128 / s.sum_units()));
  if (pack > 0) {
    s.unit_row = static_cast<uint32_t>((channels_last ? s.g.C : s.g.W) / pack);
    s.units = s.unit_row * static_cast<uint32_t>(channels_last ? s.pixels() : s.g.C * s.g.OH);
    s.by_unit_row = Divider(s.unit_row);
  }
  s.by_rows = Divider(channels_last ? g.OW : g.OH);
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
  if (!fits_narrow(g, 1) || kernel.numel() > kMost || product(g.C + 1, pixels) > kMost ||
      product(g.OH + kernel.size(0), g.OW + kernel.size(kernel.dim() - 1)) > kMost) {
    return false;
  }
  const Fused<T> s = fused<T>(arguments, channels_last, kernel, static_cast<const T*>(nullptr), 0);
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

// The stage in one kernel, where 2 x 2 windows with p = 2 tile the image and its pooled map fits
// into the shared memory of a block. False, and nothing done, elsewhere.
template <typename T>
bool forward_tiles(const Images& x, const Tensor& kernel, const StageArguments& arguments,
                   Tensor& output) {
  const T* in = x.data.const_data_ptr<T>();
  const int pack = tile_pack<T>(arguments, x.channels_last, in);
  if (pack == 0 || !fits_block<T>(arguments, x.channels_last, kernel)) return false;
  const Launcher launcher(x.data);
  const Tensor weights = kernel_in_double(kernel);
  output = new_pooled(x, arguments.geometry);
  T* out = output.mutable_data_ptr<T>();
  Fused<T> s = fused<T>(arguments, x.channels_last, kernel, out, pack);
  s.kernel = weights.const_data_ptr<double>();
  dispatch_tiles<T>(x.channels_last, pack, [&](auto layout, auto n) {
    launcher.run_blocks_with_shared(
        tile_forward_kernel<decltype(layout)::value != 0, decltype(n)::value, T>, s.N,
        tile_threads(s), s.shared_bytes(), s, in, out);
  });
  return true;
}

template <typename T>
bool backward_tiles(const Tensor& grad_output, const Images& x, const Tensor& kernel,
                    const StageArguments& arguments, Tensor& grad_input) {
  const T *in = x.data.const_data_ptr<T>(), *grad = grad_output.const_data_ptr<T>();
  T* to = grad_input.mutable_data_ptr<T>();
  const int pack = tile_pack<T>(arguments, x.channels_last, in, to);
  if (pack == 0 || !fits_block<T>(arguments, x.channels_last, kernel)) return false;
  const Launcher launcher(x.data);
  const Tensor weights = kernel_in_double(kernel);
  Fused<T> s = fused<T>(arguments, x.channels_last, kernel, grad, pack);
  s.kernel = weights.const_data_ptr<double>();
  dispatch_tiles<T>(x.channels_last, pack, [&](auto layout, auto n) {
    launcher.run_blocks_with_shared(
        tile_backward_kernel<decltype(layout)::value != 0, decltype(n)::value, T>, s.N,
        tile_threads(s), s.shared_bytes(), s, grad, in, to);
  });
  return true;
}

// ----------------------------------------------------------------- the three operators, elsewhere

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

// act(x) in the type to compute in.
template <typename T>
Images activated(const Images& x, ActivationKind activation) {
  Images a = x;
  a.data = empty_images(x, x.H, x.W, type_to_compute_in(x.data));
  Launcher(x.data).run_over(activate_kernel<T>, x.data.numel(), x.data.numel(), activation,
                            x.data.const_data_ptr<T>(), a.data.mutable_data_ptr<opmath_t<T>>());
  return a;
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  const PoolGeometry& g = arguments.geometry;
  if (x.data.numel() == 0) return new_pooled(x, g);
  Tensor output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (forward_tiles<T>(x, kernel, arguments, output)) return;
    const Images a = activated<T>(x, arguments.activation);
    output = converted(subtractive_norm2d(pooled(a, g, arguments.p), kernel), x.data.scalar_type());
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  const PoolGeometry& g = arguments.geometry;
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    if (backward_tiles<T>(grad_output, x, kernel, arguments, grad_input)) return;
    const Images a = activated<T>(x, arguments.activation);
    const Tensor y = pooled(a, g, arguments.p);
    const Tensor grad_z = converted(grad_output, a.data.scalar_type());
    const Tensor grad_y = subtractive_norm2d_backward(grad_z, kernel);
    const Tensor grad_a = pool_gradient(grad_y, a, y, g, arguments.p);
    const int64_t count = x.data.numel();
    Launcher(x.data).run_over(activation_gradient_kernel<T>, count, count, arguments.activation,
                              grad_a.const_data_ptr<A>(), a.data.const_data_ptr<A>(),
                              grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
