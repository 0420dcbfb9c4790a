// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Bound by memory: the forward pass reads the input and writes the output, the backward pass reads
// input and gradient and writes a gradient, each of them once. That leaves some 25 instructions for
// an element of a half type. Two ways:
//
// One block takes one image where its pooled map, in the type to compute in, fits into shared
// memory. There the map waits for its mean: sums over channels, the blur of that one plane and the
// subtraction are between barriers of the block, not between kernels; coef and the normalised
// weights are made on the way. Windows of 2 x 2 with p = 2 that tile the image, the networks', are
// taken in tiles, all of a window in the registers of one thread: in NCHW two rows of neighbours,
// in NHWC a pack of channels of four pixels. The activation is then cheaper than that of
// ../activation.h: a few units in the last place off, of the type of the tensor. As many threads
// make a block as fill a multiprocessor together with the other blocks that it holds. All other
// windows go through the functions of one window and one element in ../lp_pool.h; their backward
// pass keeps the norms in shared memory, too, and reads the input a second time, from cache.
//
// Larger maps: activation and pooling in one kernel, whose result (in the type to compute in) the
// normalization then takes; backwards the normalization first, then the pooled map once more, then
// one kernel from its gradient to that of the input. No atomics either way.

#include "../stage.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr int kStageThreads = 512;  // of a block that takes windows one by one

// An input plane as lp_pool.h reads it, activated element by element.
template <typename T>
struct ActivatedPlane {
  using math_type = opmath_t<T>;
  const T* first;
  ActivationKind kind;

  template <typename I>
  __device__ math_type operator[](I i) const {
    return activation_value(kind, static_cast<math_type>(first[i]));
  }
};

// Where the index-th element, in the order of memory, of images with planes of H x W lies.
template <typename I>
struct Position {
  I n, c, h, w;
};

template <typename I>
__device__ __forceinline__ Position<I> position_of(I index, bool channels_last, I C, I H, I W) {
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  U rest = static_cast<U>(index), c = 0;
  if (channels_last) {
    c = rest % static_cast<U>(C);
    rest /= static_cast<U>(C);
  }
  const U w = rest % static_cast<U>(W);
  rest /= static_cast<U>(W);
  const U h = rest % static_cast<U>(H);
  rest /= static_cast<U>(H);
  if (!channels_last) {
    c = rest % static_cast<U>(C);
    rest /= static_cast<U>(C);
  }
  return {static_cast<I>(rest), static_cast<I>(c), static_cast<I>(h), static_cast<I>(w)};
}

// ------------------------------------------------------------------------------- a block, an image

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
  A p;
  const void* kernel;
  ScalarType kernel_type;
  int32_t taps_h, taps_w;  // of a separable kernel: equal
  bool separable;
  bool map_pack;      // whether tensors of the output's shape are read and written in packs
  bool sum_pack;      // whether the channels of the map in shared memory are
  int32_t groups;     // of channels that are added up at once
  uint32_t units;     // tiles of an image
  uint32_t unit_row;  // tiles of a row of windows, or, in NHWC, of a pixel
  Divider by_unit_row, by_rows;         // by_rows: OH, or, in NHWC, OW
  Divider by_width, by_inner, by_sums;  // OW; pixels, or, in NHWC, C; sum_units()

  static constexpr int kNear = kNeighbours<T>;

  static int64_t rounded(int64_t size) { return (size + 3) / 4 * 4; }

  MNIST_OPS_HD int32_t taps() const { return separable ? taps_w : taps_h * taps_w; }
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
  // A plane with zeros around it: left and right alone where the kernel is separable, and then
  // above and below alone, of what its rows gave.
  MNIST_OPS_HD int32_t padded_w() const { return g.OW + taps_w - 1; }
  MNIST_OPS_HD int32_t padded_size() const {
    return (separable ? g.OH : g.OH + taps_h - 1) * padded_w();
  }
  MNIST_OPS_HD int32_t rows_size() const { return separable ? (g.OH + taps_h - 1) * g.OW : 0; }
  MNIST_OPS_HD int32_t coef_size() const { return separable ? g.OH + g.OW : pixels(); }
  int64_t shared_bytes(int maps) const {
    const int64_t size = static_cast<int64_t>(maps) * shared_map_size() + mean_size() +
                         padded_size() + rows_size() + coef_size() + 2 * taps();
    return size * static_cast<int64_t>(sizeof(A));
  }
};

template <typename A>
struct SharedMemory {
  A* map;        // pooled, or the gradient with respect to that
  A* norms;      // pooled, where the map is the gradient
  A* mean;       // what is subtracted; before it is known, sums over groups of channels
  A* padded;     // the sum over channels, zeros around it
  A* rows;       // blurred along the rows, zeros above and below
  A* coef;       // of a separable kernel: its share of each row, then of each column
  A* weight[2];  // normalised, [adjoint]
};

template <typename T, typename A = opmath_t<T>>
__device__ SharedMemory<A> shared_memory(const Fused<T>& s, int maps) {
  SharedMemory<A> m;
  m.map = reinterpret_cast<A*>(dynamic_shared_memory());
  m.norms = m.map + (maps - 1) * s.shared_map_size();
  m.mean = m.norms + s.shared_map_size();
  m.padded = m.mean + s.mean_size();
  m.rows = m.padded + s.padded_size();
  m.coef = m.rows + s.rows_size();
  m.weight[0] = m.coef + s.coef_size();
  m.weight[1] = m.weight[0] + s.taps();
  return m;
}

__device__ __forceinline__ int32_t this_thread() {
  return static_cast<int32_t>(threadIdx.x);
}
__device__ __forceinline__ int32_t block_threads() {
  return static_cast<int32_t>(blockDim.x);
}

template <typename T>
__device__ double kernel_value(const Fused<T>& s, int32_t i) {
  switch (s.kernel_type) {
    case ScalarType::Double:
      return static_cast<const double*>(s.kernel)[i];
    case ScalarType::Half:
      return static_cast<double>(static_cast<float>(static_cast<const Half*>(s.kernel)[i]));
    case ScalarType::BFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const BFloat16*>(s.kernel)[i]));
    default:
      return static_cast<double>(static_cast<const float*>(s.kernel)[i]);
  }
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
  for (int32_t i = lane; i < s.taps(); i += kWarp) sum += kernel_value(s, i);
  const double total = lane_sum(sum, kWarp);
  for (int32_t i = lane; i < s.taps(); i += kWarp) {
    const A weight = static_cast<A>(kernel_value(s, i) / total);
    m.weight[0][i] = weight;
    m.weight[1][s.taps() - 1 - i] = weight;
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
    if (s.separable) {
      m.coef[i] = weight_inside(m.weight[0], s.taps_w, i < OH ? i : i - OH, i < OH ? OH : OW);
    } else {
      m.coef[i] = coefficient_at<A>(i / OW, i % OW, OH, OW, m.weight[0], s.taps_h, s.taps_w, false);
    }
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
  const int32_t radius_h = s.taps_h / 2, radius_w = s.taps_w / 2;
  const A* weight = m.weight[adjoint];
  const auto each_pixel = [&](const auto& body) {
    for (int32_t pixel = this_thread(); pixel < pixels; pixel += block_threads()) {
      const auto h = static_cast<int32_t>(s.by_width.quotient(static_cast<uint32_t>(pixel)));
      body(pixel, h, pixel - h * OW);
    }
  };
  const auto coefficient = [&](int32_t pixel, int32_t h, int32_t w) {
    return s.separable ? m.coef[h] * m.coef[OH + w] : m.coef[pixel];
  };
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
  const int32_t above = s.separable ? 0 : radius_h;
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    A sum = m.mean[pixel];
    for (int32_t k = 1; k < s.groups; ++k) sum += m.mean[k * pixels + pixel];
    m.padded[(h + above) * s.padded_w() + w + radius_w] =
        adjoint ? sum / coefficient(pixel, h, w) : sum;
  });
  __syncthreads();
  if (s.separable) {
    each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
      m.rows[pixel + radius_h * OW] =
          correlate(m.padded + h * s.padded_w() + w, 1, weight, s.taps_w);
    });
    __syncthreads();
  }
  each_pixel([&](int32_t pixel, int32_t h, int32_t w) {
    A blurred = A(0);
    if (s.separable) {
      blurred = correlate(m.rows + pixel, OW, weight, s.taps_h);
    } else {
      for (int32_t k = 0; k < s.taps_h; ++k) {
        blurred +=
            correlate(m.padded + (h + k) * s.padded_w() + w, 1, weight + k * s.taps_w, s.taps_w);
      }
    }
    const A channels = static_cast<A>(s.g.C);
    const A mean =
        adjoint ? blurred / channels : local_mean(blurred, channels, coefficient(pixel, h, w));
    for (int32_t i = pixel; i < pixels + n - 1; i += pixels) m.mean[i] = mean;
  });
  __syncthreads();
}

// Calls body(index in the tensor, index in the shared map, pixel) for this thread's elements of a
// map, the first of n neighbours each.
template <int n, typename T, typename F>
__device__ __forceinline__ void each_map_element(const Fused<T>& s, const F& body) {
  const int32_t inner = s.channels_last ? s.g.C : s.pixels();
  for (int32_t i = this_thread() * n; i < s.map_size(); i += block_threads() * n) {
    const auto outer = static_cast<int32_t>(s.by_inner.quotient(static_cast<uint32_t>(i)));
    const int32_t rest = i - outer * inner;
    if (s.channels_last) {
      body(i, outer * s.step_pixel() + rest, outer);
    } else {
      body(i, i, rest);
    }
  }
}

template <int n, typename T, typename A>
__device__ __forceinline__ void write_packs(const Fused<T>& s, const SharedMemory<A>& m,
                                            T* output) {
  each_map_element<n>(s, [&](int32_t i, int32_t at, int32_t pixel) {
    const Pack<A, n> from = load_pack<n>(m.map + at);
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      to.values[j] = static_cast<T>(from.values[j] - m.mean[s.channels_last ? pixel : pixel + j]);
    }
    store_pack(output + i, to);
  });
}

template <int n, typename T, typename A>
__device__ __forceinline__ void read_packs(const Fused<T>& s, const SharedMemory<A>& m,
                                           const T* input) {
  each_map_element<n>(s, [&](int32_t i, int32_t at, int32_t) {
    const Pack<T, n> from = load_pack<n>(input + i);
    Pack<A, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) to.values[j] = static_cast<A>(from.values[j]);
    store_pack(m.map + at, to);
  });
}

template <typename T, typename A>
__device__ __forceinline__ void write_map(const Fused<T>& s, const SharedMemory<A>& m, T* output) {
  if (s.map_pack) {
    write_packs<kNeighbours<T>>(s, m, output);
  } else {
    write_packs<1>(s, m, output);
  }
}

template <typename T, typename A>
__device__ __forceinline__ void read_map(const Fused<T>& s, const SharedMemory<A>& m,
                                         const T* input) {
  if (s.map_pack) {
    read_packs<kNeighbours<T>>(s, m, input);
  } else {
    read_packs<1>(s, m, input);
  }
}

// ---------------------------------------------------------------------------- 2 x 2 tiles, p = 2
//
// Functions of the device's approximations, which are within 2 units in the last place but for
// approximate_tanh. On the CPU, where the tests run this, they are exact.

__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__device__ __forceinline__ float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / std::sqrt(x);
#endif
}

__device__ __forceinline__ double reciprocal_root(double x) {
  return 1.0 / std::sqrt(x);
}

__device__ __forceinline__ float approximate_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::sqrt(x);
#endif
}

// One instruction, within 2^-11 of the value.
__device__ __forceinline__ float approximate_tanh(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return elementary::tanh(x);
#endif
}

// x within [-bound, bound]; NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("{\n\tmin.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;\n\t}"
      : "+f"(x)
      : "f"(bound), "f"(-bound));
  return x;
#else
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
#endif
}

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

// -------------------------------------------------------------------------------- any other window

template <Norm norm, typename T, typename A>
__device__ void pool_windows(const Fused<T>& s, const T* x, A* map) {
  for (int32_t i = this_thread(); i < s.map_size(); i += block_threads()) {
    const auto at = position_of(i, s.channels_last, s.g.C, s.g.OH, s.g.OW);
    const ActivatedPlane<T> plane{x + s.g.input_offset(0, at.c), s.activation};
    map[at.c * s.step_c() + (at.h * s.g.OW + at.w) * s.step_pixel()] =
        window_norm<norm>(plane, s.g, s.p, at.h, at.w);
  }
}

template <Norm norm, typename T, typename A>
__device__ void unpool_windows(const Fused<T>& s, const SharedMemory<A>& m, const T* x, T* gx) {
  PoolGeometryOf<int32_t> g = s.g;  // of the maps in shared memory
  g.out_c = s.step_c(), g.out_w = s.step_pixel(), g.out_h = s.g.OW * s.step_pixel();
  each_map_element<1>(s, [&](int32_t, int32_t at, int32_t pixel) { m.map[at] -= m.mean[pixel]; });
  __syncthreads();
  for (int32_t i = this_thread(); i < g.C * g.H * g.W; i += block_threads()) {
    const auto at = position_of(i, s.channels_last, g.C, g.H, g.W);
    const ActivatedPlane<T> plane{x + g.input_offset(0, at.c), s.activation};
    const int32_t o = g.output_offset(0, at.c);
    const A grad = input_gradient<norm>(static_cast<const A*>(m.map + o), plane,
                                        static_cast<const A*>(m.norms + o), g, s.p, at.h, at.w);
    gx[i] = static_cast<T>(
        activation_gradient(s.activation, grad, plane[at.h * g.in_h + at.w * g.in_w]));
  }
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s, 1);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    pool_windows<norm>(s, input + image * s.g.in_n, m.map);
    blur_map<false>(s, m, image == blockIdx.x);
    write_map(s, m, output + image * s.g.out_n);
    __syncthreads();
  }
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_backward_kernel(Fused<T> s, const T* __restrict__ grad_output,
                          const T* __restrict__ input, T* __restrict__ grad_input) {
  const auto m = shared_memory(s, 2);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T* x = input + image * s.g.in_n;
    read_map(s, m, grad_output + image * s.g.out_n);
    pool_windows<norm>(s, x, m.norms);
    blur_map<true>(s, m, image == blockIdx.x);
    unpool_windows<norm>(s, m, x, grad_input + image * s.g.in_n);
    __syncthreads();
  }
}

// -------------------------------------------------------------------------------------- large maps

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(I count, PoolGeometryOf<I> g, bool channels_last, ActivationKind activation,
                opmath_t<T> p, const T* __restrict__ input, opmath_t<T>* __restrict__ pooled) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const auto at = position_of(i, channels_last, g.C, g.OH, g.OW);
    const ActivatedPlane<T> plane{input + g.input_offset(at.n, at.c), activation};
    pooled[i] = window_norm<norm>(plane, g, p, at.h, at.w);
  }
}

// grad: with respect to the pooled map.
template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    unpool_kernel(I count, PoolGeometryOf<I> g, bool channels_last, ActivationKind activation,
                  opmath_t<T> p, const T* __restrict__ grad, const T* __restrict__ input,
                  const opmath_t<T>* __restrict__ pooled, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const auto at = position_of(i, channels_last, g.C, g.H, g.W);
    const ActivatedPlane<T> plane{input + g.input_offset(at.n, at.c), activation};
    const I o = g.output_offset(at.n, at.c);
    const opmath_t<T> gradient =
        input_gradient<norm>(grad + o, plane, pooled + o, g, p, at.h, at.w);
    grad_input[i] = static_cast<T>(
        activation_gradient(activation, gradient, plane[at.h * g.in_h + at.w * g.in_w]));
  }
}

// ------------------------------------------------------------------------------------- operators

PoolGeometryOf<int32_t> narrow(const PoolGeometry& g) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  PoolGeometryOf<int32_t> s{};
  s.N = narrow(g.N), s.C = narrow(g.C), s.H = narrow(g.H), s.W = narrow(g.W);
  s.OH = narrow(g.OH), s.OW = narrow(g.OW);
  s.kernel_h = narrow(g.kernel_h), s.kernel_w = narrow(g.kernel_w);
  s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.padding_h = narrow(g.padding_h), s.padding_w = narrow(g.padding_w);
  s.in_n = narrow(g.in_n), s.in_c = narrow(g.in_c);
  s.in_h = narrow(g.in_h), s.in_w = narrow(g.in_w);
  s.out_n = narrow(g.out_n), s.out_c = narrow(g.out_c);
  s.out_h = narrow(g.out_h), s.out_w = narrow(g.out_w);
  return s;
}

// Whether every index into `images` images, and every bound of a window, fits into 32 bits.
bool fits_narrow(const PoolGeometry& g, int64_t images) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  return fits_32_bits(images * g.in_n) && fits_32_bits(images * g.out_n) && fits_32_bits(rows) &&
         fits_32_bits(columns);
}

// Calls body(norm's tag, geometry) with the geometry in 32 bits where that is enough, for p = 2
// alone: others are bound by their powers, or rare enough to do without.
template <typename F>
void dispatch_large(const StageArguments& arguments, F&& body) {
  dispatch_norm(arguments.p, [&](auto tag) {
    if constexpr (decltype(tag)::value == Norm::kTwo) {
      if (fits_narrow(arguments.geometry, arguments.geometry.N)) {
        return body(tag, narrow(arguments.geometry));
      }
    }
    body(tag, arguments.geometry);
  });
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

// The stage for one kernel, a block for each image. map: a tensor of the output's shape; pack: what
// tile_pack said. The geometry must fit into 32 bits.
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
  s.p = static_cast<opmath_t<T>>(arguments.p);
  s.kernel = kernel.const_data_ptr();
  s.kernel_type = kernel.scalar_type();
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
bool fits_block(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
                int maps) {
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
  return s.shared_bytes(maps) <= shared_memory_limit();
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

// The kernel as it came, or in a type and order that the device reads.
Tensor readable(const Tensor& kernel) {
  switch (kernel.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return contiguous_of(kernel);
    default:
      return kernel_in_double(kernel);  // says what is wrong
  }
}

// The pooled map in the type to compute in: unrounded, where the tensors are of a half type.
template <typename T, typename A = opmath_t<T>>
Tensor pooled_map(const Launcher& launcher, const Images& x, const StageArguments& arguments) {
  const PoolGeometry& geometry = arguments.geometry;
  Tensor pooled = empty_images(x, geometry.OH, geometry.OW, type_to_compute_in(x.data));
  dispatch_large(arguments, [&](auto tag, const auto& g) {
    using I = decltype(g.N + 0);
    launcher.run_over(pool_kernel<decltype(tag)::value, T, I>, pooled.numel(),
                      static_cast<I>(pooled.numel()), g, x.channels_last, arguments.activation,
                      static_cast<A>(arguments.p), x.data.const_data_ptr<T>(),
                      pooled.mutable_data_ptr<A>());
  });
  return pooled;
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (x.data.numel() == 0 || fits_block<T>(arguments, x.channels_last, kernel, 1)) {
      output = new_pooled(x, arguments.geometry);
      if (x.data.numel() == 0) return;
      const Tensor weights = readable(kernel);
      const T* in = x.data.const_data_ptr<T>();
      T* out = output.mutable_data_ptr<T>();
      const int pack = tile_pack<T>(arguments, x.channels_last, in);
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, out, pack);
      if (pack > 0) {
        return dispatch_tiles<T>(x.channels_last, pack, [&](auto tag) {
          launcher.run_blocks_with_shared(tile_forward_kernel<tag.channels_last, tag.pack, T>, s.N,
                                          tile_threads(s), s.shared_bytes(1), s, in, out);
        });
      }
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_forward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(1), s, in, out);
      });
      return;
    }
    output = subtractive_norm2d(pooled_map<T>(launcher, x, arguments), kernel);
    if (output.scalar_type() != x.data.scalar_type()) {
      output = torch::stable::to(output, x.data.scalar_type());
    }
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const int pack = tile_pack<T>(arguments, x.channels_last, in, gi);
    const int maps = pack > 0 ? 1 : 2;
    if (fits_block<T>(arguments, x.channels_last, kernel, maps)) {
      const Tensor weights = readable(kernel);
      const T* go = grad_output.const_data_ptr<T>();
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, go, pack);
      if (pack > 0) {
        return dispatch_tiles<T>(x.channels_last, pack, [&](auto tag) {
          launcher.run_blocks_with_shared(tile_backward_kernel<tag.channels_last, tag.pack, T>, s.N,
                                          tile_threads(s), s.shared_bytes(1), s, go, in, gi);
        });
      }
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_backward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(2), s, go, in, gi);
      });
      return;
    }
    const Tensor grad = subtractive_norm2d_backward(grad_output, kernel);
    const Tensor pooled = pooled_map<T>(launcher, x, arguments);
    dispatch_large(arguments, [&](auto tag, const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run_over(unpool_kernel<decltype(tag)::value, T, I>, grad_input.numel(),
                        static_cast<I>(grad_input.numel()), g, x.channels_last,
                        arguments.activation, static_cast<A>(arguments.p), grad.const_data_ptr<T>(),
                        in, pooled.const_data_ptr<A>(), gi);
    });
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
