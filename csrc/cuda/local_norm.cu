// Local normalization on CUDA.
//
// Bound by memory. Subtractive needs the input twice (for the sum over channels, then to subtract)
// and writes it once, divisive and contrastive need it once more for the squares. Between those
// passes everything happens on planes, one value a pixel, 1/C of the data.
//
// Small images (up to 1024 pixels, float64: 512), enough of them or none of them large: one launch.
// A block takes an image at a time and keeps all planes in shared memory. It reads the input two or
// three times, but from L1 or L2 after the first: memory sees one read and one write.
//
// Other images: the steps are kernels of their own, so that images and kernels may have any size.
//   prepare   the kernel divided by its sum, and the coef plane
//   reduce    sums over channels, several in one pass over the data
//   blur      rows and columns of a tile by way of shared memory; the same launch finishes the
//   plane
//             (divides by coef, takes the root, applies the threshold, ...). Long kernels: rows,
//             then columns; 2-D kernels at once
//   apply     from planes back to every channel
// Launches: subtractive 4 forward and backward; divisive 4 and 5; contrastive 6 and 8.
//
// A kernel whose sum is 0 or not finite gives infinities and NaN: to refuse it, as the CPU does,
// the host would have to wait for the device.

#include "../local_norm.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

// ---------------------------------------------------------------------------------------- prepare

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

// weight = values / sum, as they are and flipped (the adjoint's), by a whole block; float64 until
// the last rounding. Kernels have few taps. shared has a value for each warp.
template <typename A>
__device__ __forceinline__ void normalise(int64_t taps, const double* values, double* shared,
                                          A* weight, A* flipped) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) sum += values[i];
  sum = block_sum<kThreads>(sum, shared);
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) {
    const A normalised = static_cast<A>(values[i] / sum);
    weight[i] = normalised;
    flipped[taps - 1 - i] = normalised;
  }
}

// One pixel of the blur of a plane of ones, with the weights weight(k).
template <typename A, typename Weight>
__device__ __forceinline__ A coefficient(const BlurGeometry& g, int64_t h, int64_t w,
                                         const Weight& weight) {
  const Taps rows = taps_inside(h, g.H, g.taps_h);
  const Taps columns = taps_inside(w, g.W, g.taps_w);
  A sum = A(0);
  if (g.separable) {
    A row = A(0);
#pragma unroll 1
    for (int64_t k = columns.first; k < columns.last; ++k) row += weight(k);
#pragma unroll 1
    for (int64_t k = rows.first; k < rows.last; ++k) sum += row * weight(k);
  } else {
    for (int64_t kh = rows.first; kh < rows.last; ++kh) {
#pragma unroll 1
      for (int64_t kw = columns.first; kw < columns.last; ++kw) sum += weight(kh * g.taps_w + kw);
    }
  }
  return sum;
}

// Every block adds up the kernel for itself, so that one launch does; the first one leaves the
// weights. A thread computes a pixel; the taps come from L1, one address for all threads of a warp.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(int64_t taps, BlurGeometry g, const double* __restrict__ values,
                   A* __restrict__ weight, A* __restrict__ flipped, A* __restrict__ coef) {
  __shared__ double shared[kThreads / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) sum += values[i];
  sum = block_sum<kThreads>(sum, shared);
  const auto normalised = [=](int64_t i) { return static_cast<A>(values[i] / sum); };
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < taps; i += kThreads) {
      weight[i] = flipped[taps - 1 - i] = normalised(i);
    }
  }
  for (int64_t i = first_item<int64_t>(); i < g.H * g.W; i += item_stride<int64_t>()) {
    coef[i] = coefficient<A>(g, i / g.W, i % g.W, normalised);
  }
}

// ----------------------------------------------------------------------------------------- reduce

// The sums over channels that a pass computes. Its terms are functions of the gradient, the input
// and the mean of a pixel; a pass without gradients reads the input alone.
struct SumOfInput {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A) const {
    sums[0] += x;
  }
};

struct SumOfSquares {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A mean) const {
    sums[0] += (x - mean) * (x - mean);
  }
};

struct SumOfProducts {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = true;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A grad, A x, A mean) const {
    sums[0] += grad * (x - mean);
  }
};

struct SumsOfGradient {
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = true;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A grad, A x, A mean) const {
    sums[0] += grad * (x - mean);
    sums[1] += (x - mean) * (x - mean);
    sums[2] += grad;
  }
};

// What a pass reads and writes. Planes hold all images, N * H * W pixels.
template <typename T>
struct Reduction {
  using A = opmath_t<T>;
  int64_t N = 0, C = 0, HW = 0;
  const T* grad = nullptr;
  const T* input = nullptr;
  const A* mean = nullptr;  // of every pixel; null means 0
  const A* coef = nullptr;  // of one image: what the sums are divided by; null means 1
  A* sums[3] = {};
};

template <typename T, typename A, int kSums>
__device__ __forceinline__ void write_sums(const Reduction<T>& r, int64_t pixel,
                                           const A (&sums)[kSums]) {
  const A divide_by = r.coef ? r.coef[pixel % r.HW] : A(1);
#pragma unroll
  for (int k = 0; k < kSums; ++k) r.sums[k][pixel] = sums[k] / divide_by;
}

// NCHW: neighbouring threads take neighbouring pixels, so that each channel is read coalesced.
// blockDim.y threads share the channels of a pixel; their sums are added in order of threadIdx.y.
template <typename Terms, typename T>
__global__ void __launch_bounds__(kThreads) reduce_planes_kernel(Reduction<T> r) {
  using A = opmath_t<T>;
  __shared__ A partial[Terms::kSums][kThreads];
  const int64_t pixels = r.N * r.HW, groups = blockDim.y;
  const unsigned slot = threadIdx.y * blockDim.x + threadIdx.x;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < pixels;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pixel = base + threadIdx.x;
    A sums[Terms::kSums] = {};
    if (pixel < pixels) {
      const int64_t first = pixel / r.HW * r.C * r.HW + pixel % r.HW;
      const A mean = r.mean ? r.mean[pixel] : A(0);
#pragma unroll 4
      for (int64_t c = threadIdx.y; c < r.C; c += groups) {
        const int64_t i = first + c * r.HW;
        const A grad = Terms::kReadsGradient ? static_cast<A>(r.grad[i]) : A(0);
        Terms{}(sums, grad, static_cast<A>(r.input[i]), mean);
      }
    }
    if (groups > 1) {
#pragma unroll
      for (int k = 0; k < Terms::kSums; ++k) partial[k][slot] = sums[k];
      __syncthreads();
      if (threadIdx.y == 0) {
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          for (unsigned y = 1; y < groups; ++y) sums[k] += partial[k][y * blockDim.x + threadIdx.x];
        }
      }
      __syncthreads();  // before the next turn overwrites the partial sums
    }
    if (threadIdx.y == 0 && pixel < pixels) write_sums(r, pixel, sums);
  }
}

// NHWC: `lanes` threads of a warp take the channels of one pixel, which lie side by side.
template <typename Terms, typename T>
__global__ void __launch_bounds__(kThreads) reduce_channels_kernel(Reduction<T> r, int lanes) {
  using A = opmath_t<T>;
  const int64_t pixels = r.N * r.HW;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = blockIdx.x * per_block; base < pixels; base += gridDim.x * per_block) {
    const int64_t pixel = base + threadIdx.x / static_cast<unsigned>(lanes);
    A sums[Terms::kSums] = {};
    if (pixel < pixels) {
      const A mean = r.mean ? r.mean[pixel] : A(0);
#pragma unroll 4
      for (int64_t c = lane; c < r.C; c += lanes) {
        const int64_t i = pixel * r.C + c;
        const A grad = Terms::kReadsGradient ? static_cast<A>(r.grad[i]) : A(0);
        Terms{}(sums, grad, static_cast<A>(r.input[i]), mean);
      }
    }
#pragma unroll
    for (int k = 0; k < Terms::kSums; ++k) sums[k] = lane_sum(sums[k], lanes);
    if (lane == 0 && pixel < pixels) write_sums(r, pixel, sums);
  }
}

// ------------------------------------------------------------------------------------------- blur

// What becomes of a blurred pixel: pixel is its index among all images', at within its image.

// Nothing yet: after the rows, the columns are still to come.
template <typename A>
struct Store {
  A* out;
  __device__ void operator()(A blurred, int64_t pixel, int64_t) const { out[pixel] = blurred; }
};

// mean = est(x) / coef
template <typename A>
struct FinishMean {
  A channels;
  const A* coef;
  A* mean;
  __device__ void operator()(A blurred, int64_t pixel, int64_t at) const {
    mean[pixel] = blurred / channels / coef[at];
  }
};

// What the channels are divided by, from the blurred sum of squares.
template <typename A>
struct FinishDivisor {
  A channels, threshold, value;
  const A* coef;
  A* d;
  __device__ void operator()(A blurred, int64_t pixel, int64_t at) const {
    d[pixel] = divisor(local_deviation(blurred, channels, coef[at]), threshold, value);
  }
};

// The same, and h in place of q.
template <typename A>
struct FinishDivisorGradient {
  A channels, threshold, value;
  const A* coef;
  A *d, *q;
  __device__ void operator()(A blurred, int64_t pixel, int64_t at) const {
    const A s = local_deviation(blurred, channels, coef[at]);
    q[pixel] = divisor_gradient(q[pixel], s, coef[at], threshold);
    d[pixel] = divisor(s, threshold, value);
  }
};

// B = (*)^T(h) / C; for contrastive also the plane that the subtractive gradient then blurs: the
// sum over channels of the divisive gradient, divided by coef, in place of the sum of the input.
template <typename A>
struct FinishB {
  A channels;
  const A *coef, *d, *grads, *mean;
  A *b, *sum;  // sum is null for divisive
  __device__ void operator()(A blurred, int64_t pixel, int64_t at) const {
    const A share = blurred / channels;
    b[pixel] = share;
    if (sum) {
      const A centred = sum[pixel] - channels * mean[pixel];
      sum[pixel] = (grads[pixel] / d[pixel] - centred * share) / coef[at];
    }
  }
};

// The subtractive gradient's plane (*)^T(sum / coef) / C.
template <typename A>
struct FinishAdjointMean {
  A channels;
  A* t;
  __device__ void operator()(A blurred, int64_t pixel, int64_t) const {
    t[pixel] = blurred / channels;
  }
};

// One pixel a thread; a pixel's neighbours were read by neighbouring threads and come from cache,
// as do the taps. `in` is none of the planes that finish writes.
enum class BlurStep { kRows, kColumns, kWhole };

template <BlurStep step, typename A, typename Finish>
__global__ void __launch_bounds__(kThreads)
    blur_kernel(int64_t pixels, BlurGeometry g, const A* __restrict__ weight,
                const A* __restrict__ in, Finish finish) {
  for (int64_t i = first_item<int64_t>(); i < pixels; i += item_stride<int64_t>()) {
    const int64_t row = i / g.W;  // among the rows of all images
    const int64_t w = i - row * g.W;
    const int64_t h = row % g.H;
    A blurred = A(0);
    if constexpr (step == BlurStep::kRows) {
      blurred = correlate_at(in + row * g.W, 1, g.W, w, weight, g.taps_w);
    } else if constexpr (step == BlurStep::kColumns) {
      blurred = correlate_at(in + (row - h) * g.W + w, g.W, g.H, h, weight, g.taps_h);
    } else {
      const Taps rows = taps_inside(h, g.H, g.taps_h);
      for (int64_t k = rows.first; k < rows.last; ++k) {
        blurred += correlate_at(in + (row + k - g.taps_h / 2) * g.W, 1, g.W, w,
                                weight + k * g.taps_w, g.taps_w);
      }
    }
    finish(blurred, i, h * g.W + w);
  }
}

// Both steps of a separable kernel at once, for a tile of the plane: the tile with its surroundings
// comes to shared memory, zeros where the image ends, is blurred along rows and then along columns.
// Up to kTileRadius the surroundings are 1.3 to 2.5 times the tile, and neighbouring tiles find
// them in L2.
constexpr int kTileSide = 32;
constexpr int kTileRadius = 10;

template <typename A, typename Finish>
__global__ void __launch_bounds__(kThreads)
    blur_tile_kernel(int64_t N, BlurGeometry g, const A* __restrict__ weight,
                     const A* __restrict__ in, Finish finish) {
  constexpr int kSide = kTileSide + 2 * kTileRadius;
  __shared__ A tile[kSide * kSide];
  __shared__ A blurred_rows[kSide * kTileSide];
  const int taps = static_cast<int>(g.taps_w), radius = taps / 2;
  const int side = kTileSide + 2 * radius;
  const int64_t down = (g.H + kTileSide - 1) / kTileSide,
                across = (g.W + kTileSide - 1) / kTileSide;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < N * down * across; t += gridDim.x) {
    const int64_t image = t / (down * across), place = t % (down * across);
    const int64_t top = place / across * kTileSide, left = place % across * kTileSide;
    const A* plane = in + image * g.H * g.W;
    for (int i = thread; i < side * side; i += kThreads) {
      const int64_t h = top + i / side - radius, w = left + i % side - radius;
      tile[i] = h >= 0 && h < g.H && w >= 0 && w < g.W ? plane[h * g.W + w] : A(0);
    }
    __syncthreads();
    for (int i = thread; i < side * kTileSide; i += kThreads) {
      const A* x = tile + i / kTileSide * side + i % kTileSide;
      A sum = A(0);
      for (int k = 0; k < taps; ++k) sum += x[k] * weight[k];
      blurred_rows[i] = sum;
    }
    __syncthreads();
    for (int i = thread; i < kTileSide * kTileSide; i += kThreads) {
      const int64_t h = top + i / kTileSide, w = left + i % kTileSide;
      if (h >= g.H || w >= g.W) continue;
      A sum = A(0);
      for (int k = 0; k < taps; ++k) sum += blurred_rows[i + k * kTileSide] * weight[k];
      finish(sum, (image * g.H + h) * g.W + w, h * g.W + w);
    }
    __syncthreads();  // before the next turn overwrites the tile
  }
}

// ------------------------------------------------------------------------------------------ apply

// The planes that the last pass takes; null where it has no use for one.
template <typename A>
struct Planes {
  const A *mean = nullptr, *d = nullptr, *b = nullptr, *t = nullptr;
};

// Values of the last pass at one element.
struct Subtract {
  static constexpr bool kReadsInput = false;
  template <typename A>
  __device__ A operator()(A x, A, const Planes<A>& planes, int64_t pixel) const {
    return x - planes.mean[pixel];
  }
};

struct Divide {
  static constexpr bool kReadsInput = false;
  template <typename A>
  __device__ A operator()(A x, A, const Planes<A>& planes, int64_t pixel) const {
    return (x - (planes.mean ? planes.mean[pixel] : A(0))) / planes.d[pixel];
  }
};

struct DivideGradient {
  static constexpr bool kReadsInput = true;
  template <typename A>
  __device__ A operator()(A grad, A x, const Planes<A>& planes, int64_t pixel) const {
    const A centred = x - (planes.mean ? planes.mean[pixel] : A(0));
    return grad / planes.d[pixel] - centred * planes.b[pixel] - (planes.t ? planes.t[pixel] : A(0));
  }
};

// out = value(a, b, planes) for every element, in the order of memory in either layout, n elements
// a thread: n > 1 only where a pack stays within a row of pixels (NCHW: n divides H * W) or within
// a pixel (NHWC: n divides C). b is read if the value needs it.
template <bool kChannelsLast, int n, typename Value, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(I packs, I C, I HW, const T* __restrict__ a, const T* __restrict__ b,
                 Planes<opmath_t<T>> planes, T* __restrict__ out) {
  using A = opmath_t<T>;
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  for (I pack = first_item<I>(); pack < packs; pack += item_stride<I>()) {
    const I i = pack * n;
    I pixel;
    if constexpr (kChannelsLast) {
      pixel = static_cast<I>(static_cast<U>(i) / static_cast<U>(C));
    } else {
      const U plane = static_cast<U>(i) / static_cast<U>(HW);
      const U image = plane / static_cast<U>(C);
      pixel = static_cast<I>(static_cast<U>(i) - (plane - image) * static_cast<U>(HW));
    }
    const Pack<T, n> from_a = load_pack<n>(a + i);
    const Pack<T, n> from_b = Value::kReadsInput ? load_pack<n>(b + i) : from_a;
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      to.values[j] =
          static_cast<T>(Value{}(static_cast<A>(from_a.values[j]), static_cast<A>(from_b.values[j]),
                                 planes, static_cast<int64_t>(pixel + (kChannelsLast ? 0 : j))));
    }
    store_pack(out + i, to);
  }
}

// ----------------------------------------------------------------------- small images, one launch

constexpr int kMaxTaps = 512;  // of a kernel that shared memory holds

template <typename A>
constexpr int kMaxPixels = static_cast<int>(4096 / sizeof(A));

template <typename T>
struct ImageArguments {
  LocalNorm kind;
  int64_t N;
  int C;
  BlurGeometry g;
  opmath_t<T> threshold, value;
  const double* kernel;
  const T* grad;   // backward
  const T* input;  // of the subtractive backward: the gradient
  T* out;
};

// A block's threads on one image, in either layout, n elements at a time: n divides H * W (NCHW) or
// C (NHWC). Each step ends with a barrier.
template <bool kChannelsLast, int n, typename T>
struct ImageBlock {
  using A = opmath_t<T>;
  int C, H, W, HW, taps_h, taps_w;
  bool separable;
  const A *weight, *flipped;
  A* partial;  // kThreads * n values

  // sums[k][p] = the sums over channels that Terms names; mean is null for 0.
  template <typename Terms>
  __device__ __forceinline__ void reduce(const T* grad, const T* x, const A* mean,
                                         A* const (&sums)[Terms::kSums]) const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto add = [](A(&to)[Terms::kSums], T x_value, T grad_value, A centre) {
      Terms{}(to, Terms::kReadsGradient ? static_cast<A>(grad_value) : A(0),
              static_cast<A>(x_value), centre);
    };
    if constexpr (kChannelsLast) {
      const int packs = C / n;
      int lanes = 1;
      while (lanes < kWarp && lanes < packs) lanes *= 2;
      const int lane = thread % lanes, per_turn = kThreads / lanes;
      // The same number of turns for every thread of a warp: they meet in the shuffles.
      for (int base = 0; base < HW; base += per_turn) {
        const int pixel = base + thread / lanes;
        A total[Terms::kSums] = {};
        if (pixel < HW) {
          const A centre = mean ? mean[pixel] : A(0);
#pragma unroll 4
          for (int c = lane; c < packs; c += lanes) {
            const int64_t i = static_cast<int64_t>(pixel) * C + c * n;
            const Pack<T, n> xs = load_pack<n>(x + i);
            const Pack<T, n> gs = Terms::kReadsGradient ? load_pack<n>(grad + i) : xs;
#pragma unroll
            for (int j = 0; j < n; ++j) add(total, xs.values[j], gs.values[j], centre);
          }
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          total[k] = lane_sum(total[k], lanes);
          if (lane == 0 && pixel < HW) sums[k][pixel] = total[k];
        }
      }
    } else {
      // Where a plane is less than one pack for each thread, groups of threads share the channels,
      // and their sums are added in order.
      const int packs = HW / n, groups = packs < kThreads ? kThreads / packs : 1;
      const int group = groups > 1 ? thread / packs : 0;
      const int first = groups > 1 ? thread % packs : thread;
      for (int q = first; q < packs && group < groups; q += kThreads) {
        A total[n][Terms::kSums] = {};
#pragma unroll 4
        for (int c = group; c < C; c += groups) {
          const int64_t i = static_cast<int64_t>(c) * HW + q * n;
          const Pack<T, n> xs = load_pack<n>(x + i);
          const Pack<T, n> gs = Terms::kReadsGradient ? load_pack<n>(grad + i) : xs;
#pragma unroll
          for (int j = 0; j < n; ++j) {
            add(total[j], xs.values[j], gs.values[j], mean ? mean[q * n + j] : A(0));
          }
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
#pragma unroll
          for (int j = 0; j < n; ++j) {
            // The first group's sums have their place in the plane, the others' wait.
            A* const to = group == 0 ? sums[k] : partial + (k * (groups - 1) + group - 1) * HW;
            to[q * n + j] = total[j][k];
          }
        }
      }
      __syncthreads();
      if (groups > 1) {
        for (int p = thread; p < HW; p += kThreads) {
#pragma unroll
          for (int k = 0; k < Terms::kSums; ++k) {
            A total = sums[k][p];
            for (int other = 1; other < groups; ++other) {
              total += partial[(k * (groups - 1) + other - 1) * HW + p];
            }
            sums[k][p] = total;
          }
        }
      }
    }
    __syncthreads();
  }

  // Blurs a plane and finishes it, by way of scratch; finish may write the plane itself.
  template <typename Finish>
  __device__ __forceinline__ void blur(const A* in, A* scratch, bool adjoint,
                                       const Finish& finish) const {
    const A* const taps = adjoint ? flipped : weight;
    for (int p = static_cast<int>(threadIdx.x); p < HW; p += kThreads) {
      const int h = p / W, w = p % W;
      if (separable) {
        scratch[p] = line(in + h * W, 1, W, w, taps, taps_w);
      } else {
        A sum = A(0);
        for (int k = 0; k < taps_h; ++k) {
          const int row = h + k - taps_h / 2;
          if (row < 0 || row >= H) continue;
          sum += line(in + row * W, 1, W, w, taps + k * taps_w, taps_w);
        }
        scratch[p] = sum;
      }
    }
    __syncthreads();
    for (int p = static_cast<int>(threadIdx.x); p < HW; p += kThreads) {
      finish(separable ? line(scratch + p % W, W, H, p / W, taps, taps_h) : scratch[p], p, p);
    }
    __syncthreads();
  }

  // out = value(a, b, planes) for every element.
  template <typename Value>
  __device__ __forceinline__ void apply(const T* a, const T* b, const Planes<A>& planes,
                                        T* out) const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto one = [&](int64_t i, int pixel) {
      const Pack<T, n> as = load_pack<n>(a + i);
      const Pack<T, n> bs = Value::kReadsInput ? load_pack<n>(b + i) : as;
      Pack<T, n> to;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        to.values[j] =
            static_cast<T>(Value{}(static_cast<A>(as.values[j]), static_cast<A>(bs.values[j]),
                                   planes, static_cast<int64_t>(pixel + (kChannelsLast ? 0 : j))));
      }
      store_pack(out + i, to);
    };
    if constexpr (kChannelsLast) {
      const int packs = C / n;
#pragma unroll 4
      for (int i = thread; i < HW * packs; i += kThreads)
        one(static_cast<int64_t>(i) * n, i / packs);
    } else {
      const int packs = HW / n, groups = packs < kThreads ? kThreads / packs : 1;
      const int group = groups > 1 ? thread / packs : 0;
      for (int q = groups > 1 ? thread % packs : thread; q < packs && group < groups;
           q += kThreads) {
#pragma unroll 4
        for (int c = group; c < C; c += groups) one(static_cast<int64_t>(c) * HW + q * n, q * n);
      }
    }
    __syncthreads();
  }

 private:
  // One output of a correlation along one dimension: correlate_at in 32 bits.
  __device__ __forceinline__ static A line(const A* in, int step, int size, int i, const A* taps,
                                           int count) {
    const int radius = count / 2;
    const int first = i < radius ? radius - i : 0;
    const int last = i + radius < size ? count : size + radius - i;
    A sum = A(0);
#pragma unroll 1  // it stands in many places of a kernel, and is a small part of its time
    for (int k = first; k < last; ++k) sum += in[(i + k - radius) * step] * taps[k];
    return sum;
  }
};

// What the kernels of whole images begin with: weights and coef, and the block's view of them.
template <int kPlanes, typename A>
struct alignas(kVectorBytes) ImageMemory {
  A planes[kPlanes][kMaxPixels<A>];
  A coef[kMaxPixels<A>];
  A weight[kMaxTaps], flipped[kMaxTaps];
  double sums[kThreads / kWarp];
};

template <bool kChannelsLast, int n, typename T, typename Memory>
__device__ __forceinline__ ImageBlock<kChannelsLast, n, T> begin(const ImageArguments<T>& a,
                                                                 Memory& memory,
                                                                 opmath_t<T>* partial) {
  using A = opmath_t<T>;
  const int H = static_cast<int>(a.g.H), W = static_cast<int>(a.g.W);
  normalise(a.g.taps_h * (a.g.separable ? 1 : a.g.taps_w), a.kernel, memory.sums, memory.weight,
            memory.flipped);
  __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < H * W; p += kThreads) {
    memory.coef[p] = coefficient<A>(a.g, p / W, p % W, [&](int64_t k) { return memory.weight[k]; });
  }
  __syncthreads();
  return {a.C,
          H,
          W,
          H * W,
          static_cast<int>(a.g.taps_h),
          static_cast<int>(a.g.taps_w),
          a.g.separable,
          memory.weight,
          memory.flipped,
          partial};
}

template <bool kChannelsLast, int n, typename T>
__global__ void __launch_bounds__(kThreads) forward_image_kernel(ImageArguments<T> a) {
  using A = opmath_t<T>;
  __shared__ ImageMemory<3, A> memory;
  __shared__ A partial[kThreads * n];
  const auto block = begin<kChannelsLast, n>(a, memory, partial);
  A *sum = memory.planes[0], *scratch = memory.planes[1];
  A* const mean = a.kind == LocalNorm::kDivisive ? nullptr : memory.planes[2];
  const A* const coef = memory.coef;
  const A channels = static_cast<A>(a.C);
  for (int64_t image = blockIdx.x; image < a.N; image += gridDim.x) {
    const T* x = a.input + image * a.C * block.HW;
    T* y = a.out + image * a.C * block.HW;
    if (mean) {
      block.template reduce<SumOfInput>(x, x, nullptr, {sum});
      block.blur(sum, scratch, false, FinishMean<A>{channels, coef, mean});
    }
    if (a.kind == LocalNorm::kSubtractive) {
      block.template apply<Subtract>(x, x, {.mean = mean}, y);
    } else {
      block.template reduce<SumOfSquares>(x, x, mean, {sum});
      block.blur(sum, scratch, false, FinishDivisor<A>{channels, a.threshold, a.value, coef, sum});
      block.template apply<Divide>(x, x, {.mean = mean, .d = sum}, y);
    }
  }
}

// a.input of the subtractive gradient is the gradient.
template <bool kChannelsLast, int n, typename T>
__global__ void __launch_bounds__(kThreads) backward_image_kernel(ImageArguments<T> a) {
  using A = opmath_t<T>;
  __shared__ ImageMemory<6, A> memory;
  __shared__ A partial[kThreads * n];
  const auto block = begin<kChannelsLast, n>(a, memory, partial);
  A *sum = memory.planes[0], *scratch = memory.planes[1], *q = memory.planes[2];
  A *squares = memory.planes[3], *grads = memory.planes[4];
  const bool contrastive = a.kind == LocalNorm::kContrastive;
  A* const mean = contrastive ? memory.planes[5] : nullptr;
  const A* const coef = memory.coef;
  const A channels = static_cast<A>(a.C);
  for (int64_t image = blockIdx.x; image < a.N; image += gridDim.x) {
    const int64_t offset = image * a.C * block.HW;
    const T *g = a.grad + offset, *x = a.input + offset;
    T* gx = a.out + offset;
    if (a.kind == LocalNorm::kSubtractive) {
      block.template reduce<SumOfInput>(g, g, nullptr, {sum});
      for (int p = static_cast<int>(threadIdx.x); p < block.HW; p += kThreads) sum[p] /= coef[p];
      __syncthreads();
      block.blur(sum, scratch, true, FinishAdjointMean<A>{channels, sum});
      block.template apply<Subtract>(g, g, {.mean = sum}, gx);
      continue;
    }
    if (contrastive) {
      block.template reduce<SumOfInput>(x, x, nullptr, {sum});
      block.blur(sum, scratch, false, FinishMean<A>{channels, coef, mean});
    }
    // Three sums of a group need three times the room: one after the other, from L1.
    block.template reduce<SumOfProducts>(g, x, mean, {q});
    block.template reduce<SumOfSquares>(x, x, mean, {squares});
    block.template reduce<SumOfInput>(g, g, nullptr, {grads});
    // In place: d of the squares, B of q, the mean's gradient of the sum.
    block.blur(squares, scratch, false,
               FinishDivisorGradient<A>{channels, a.threshold, a.value, coef, squares, q});
    block.blur(q, scratch, true,
               FinishB<A>{channels, coef, squares, grads, mean, q, contrastive ? sum : nullptr});
    if (contrastive) block.blur(sum, scratch, true, FinishAdjointMean<A>{channels, sum});
    block.template apply<DivideGradient>(
        g, x, {.mean = mean, .d = squares, .b = q, .t = contrastive ? sum : nullptr}, gx);
  }
}

// Blocks that look at enough images to make up for their preparation, and fill any device.
constexpr int64_t kImageBlocks = 2048;

template <typename T>
bool takes_one_launch(const Images& images, const Tensor& kernel) {
  // Few images that are large would leave most of the device without work.
  const bool spread = images.N >= 264 || images.stride_n() <= 32768;
  return images.H * images.W <= kMaxPixels<opmath_t<T>> && kernel.numel() <= kMaxTaps && spread &&
         fits_32_bits(images.N * images.stride_n());
}

template <bool backward, typename T>
void run_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                const LocalNormOptions& options, const T* grad, const T* input, T* out) {
  const Tensor values = kernel_in_double(kernel);
  const ImageArguments<T> a{
      options.kind,
      images.N,
      static_cast<int>(images.C),
      {images.H, images.W, kernel.size(0), kernel.size(kernel.dim() - 1), kernel.dim() == 1},
      static_cast<opmath_t<T>>(options.threshold),
      static_cast<opmath_t<T>>(options.value),
      values.const_data_ptr<double>(),
      grad,
      input,
      out};
  const auto launch = [&](auto* one, auto* packs, int64_t divided) {
    const bool aligned = divided % kPackSize<T> == 0 && are_aligned(grad, input, out);
    launcher.run_blocks(aligned ? packs : one, std::min(images.N, kImageBlocks), kThreads, a);
  };
  constexpr int n = kPackSize<T>;
  if constexpr (backward) {
    if (images.channels_last) {
      launch(backward_image_kernel<true, 1, T>, backward_image_kernel<true, n, T>, images.C);
    } else {
      launch(backward_image_kernel<false, 1, T>, backward_image_kernel<false, n, T>,
             images.H * images.W);
    }
  } else {
    if (images.channels_last) {
      launch(forward_image_kernel<true, 1, T>, forward_image_kernel<true, n, T>, images.C);
    } else {
      launch(forward_image_kernel<false, 1, T>, forward_image_kernel<false, n, T>,
             images.H * images.W);
    }
  }
}

// ------------------------------------------------------------------------------------------- steps

// The steps above on one batch of images, with the planes they need.
template <typename T>
class Problem {
 public:
  using A = opmath_t<T>;

  Problem(const Launcher& launcher, const Images& images, const Tensor& kernel,
          const LocalNormOptions& options, int64_t planes)
      : launcher_(launcher),
        N_(images.N),
        C_(images.C),
        HW_(images.H * images.W),
        channels_last_(images.channels_last),
        blur_{images.H, images.W, kernel.size(0), kernel.size(kernel.dim() - 1), kernel.dim() == 1},
        channels(static_cast<A>(images.C)),
        threshold(static_cast<A>(options.threshold)),
        value(static_cast<A>(options.value)) {
    const Tensor values = kernel_in_double(kernel);
    const int64_t taps = values.numel();
    workspace_ = torch::stable::new_empty(
        images.data, {2 * taps + HW_ + planes * N_ * HW_},
        std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    weight_[0] = workspace_.mutable_data_ptr<A>();
    weight_[1] = weight_[0] + taps;
    coef = weight_[1] + taps;
    launcher_.run_over(prepare_kernel<A>, HW_, taps, blur_, values.const_data_ptr<double>(),
                       weight_[0], weight_[1], coef);
  }

  A* plane(int64_t k) const { return coef + HW_ + k * N_ * HW_; }

  template <typename Terms>
  void reduce(Reduction<T> r) const {
    r.N = N_, r.C = C_, r.HW = HW_;
    if (channels_last_) {
      const int lanes = lanes_for(C_);
      launcher_.run(reduce_channels_kernel<Terms, T>, N_ * HW_, kThreads / lanes, kThreads, r,
                    lanes);
    } else {
      // Whole warps side by side, and up to eight of them for the channels.
      const int pixels = kThreads / std::min(lanes_for(C_), kThreads / kWarp);
      launcher_.run(reduce_planes_kernel<Terms, T>, N_ * HW_, pixels, pixels, r);
    }
  }

  // Blurs a plane (adjoint: with the flipped kernel) and finishes it; scratch is another plane.
  template <typename Finish>
  void blur(const A* in, A* scratch, bool adjoint, const Finish& finish) const {
    const int64_t pixels = N_ * HW_;
    const A* weight = weight_[adjoint];
    if (blur_.separable && blur_.taps_w / 2 <= kTileRadius) {
      const int64_t tiles = ceil_div(blur_.H, kTileSide) * ceil_div(blur_.W, kTileSide);
      launcher_.run(blur_tile_kernel<A, Finish>, N_ * tiles, 1, kThreads, N_, blur_, weight, in,
                    finish);
    } else if (blur_.separable) {
      launcher_.run_over(blur_kernel<BlurStep::kRows, A, Store<A>>, pixels, pixels, blur_, weight,
                         in, Store<A>{scratch});
      launcher_.run_over(blur_kernel<BlurStep::kColumns, A, Finish>, pixels, pixels, blur_, weight,
                         static_cast<const A*>(scratch), finish);
    } else {
      launcher_.run_over(blur_kernel<BlurStep::kWhole, A, Finish>, pixels, pixels, blur_, weight,
                         in, finish);
    }
  }

  template <typename Value>
  void apply(const T* a, const T* b, const Planes<A>& planes, T* out) const {
    constexpr int n = kPackSize<T>;
    const bool packs = (channels_last_ ? C_ : HW_) % n == 0 && are_aligned(a, b, out);
    if (packs) {
      apply_packs<Value, n>(a, b, planes, out);
    } else {
      apply_packs<Value, 1>(a, b, planes, out);
    }
  }

 private:
  template <typename Value, int n>
  void apply_packs(const T* a, const T* b, const Planes<A>& planes, T* out) const {
    if (fits_32_bits(N_ * C_ * HW_)) {
      apply_indexed<Value, n, int32_t>(a, b, planes, out);
    } else {
      apply_indexed<Value, n, int64_t>(a, b, planes, out);
    }
  }

  template <typename Value, int n, typename I>
  void apply_indexed(const T* a, const T* b, const Planes<A>& planes, T* out) const {
    const int64_t packs = N_ * C_ * HW_ / n;
    const I count = static_cast<I>(packs), C = static_cast<I>(C_), HW = static_cast<I>(HW_);
    if (channels_last_) {
      launcher_.run_over(apply_kernel<true, n, Value, T, I>, packs, count, C, HW, a, b, planes,
                         out);
    } else {
      launcher_.run_over(apply_kernel<false, n, Value, T, I>, packs, count, C, HW, a, b, planes,
                         out);
    }
  }

  const Launcher& launcher_;
  int64_t N_, C_, HW_;
  bool channels_last_;
  BlurGeometry blur_;
  Tensor workspace_;  // everything below, one allocation
  A* weight_[2];      // [adjoint]

 public:
  A channels, threshold, value;
  A* coef;
};

template <typename T, typename A = opmath_t<T>>
void forward_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                    const LocalNormOptions& options, const T* x, T* y) {
  const Problem<T> problem(launcher, images, kernel, options, 4);
  A *sum = problem.plane(0), *scratch = problem.plane(1), *d = problem.plane(2);
  A* mean = options.kind == LocalNorm::kDivisive ? nullptr : problem.plane(3);
  if (mean) {
    problem.template reduce<SumOfInput>({.input = x, .sums = {sum}});
    problem.blur(sum, scratch, false, FinishMean<A>{problem.channels, problem.coef, mean});
  }
  if (options.kind == LocalNorm::kSubtractive) {
    problem.template apply<Subtract>(x, x, {.mean = mean}, y);
    return;
  }
  problem.template reduce<SumOfSquares>({.input = x, .mean = mean, .sums = {sum}});
  problem.blur(
      sum, scratch, false,
      FinishDivisor<A>{problem.channels, problem.threshold, problem.value, problem.coef, d});
  problem.template apply<Divide>(x, x, {.mean = mean, .d = d}, y);
}

template <typename T, typename A = opmath_t<T>>
void subtractive_backward_images(const Launcher& launcher, const Images& images,
                                 const Tensor& kernel, const LocalNormOptions& options, const T* g,
                                 T* gx) {
  const Problem<T> problem(launcher, images, kernel, options, 3);
  A *sum = problem.plane(0), *scratch = problem.plane(1), *t = problem.plane(2);
  problem.template reduce<SumOfInput>({.input = g, .coef = problem.coef, .sums = {sum}});
  problem.blur(sum, scratch, true, FinishAdjointMean<A>{problem.channels, t});
  problem.template apply<Subtract>(g, g, {.mean = t}, gx);
}

// Divisive and contrastive. s is computed again from the input, in the pass over it that q needs
// anyway; nothing was saved by the forward.
template <typename T, typename A = opmath_t<T>>
void divisive_backward_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                              const LocalNormOptions& options, const T* g, const T* x, T* gx) {
  const bool contrastive = options.kind == LocalNorm::kContrastive;
  const Problem<T> problem(launcher, images, kernel, options, contrastive ? 9 : 6);
  A *scratch = problem.plane(0), *d = problem.plane(1), *q = problem.plane(2);
  A *squares = problem.plane(3), *grads = problem.plane(4), *b = problem.plane(5);
  A *sum = nullptr, *mean = nullptr, *t = nullptr;
  if (contrastive) {
    sum = problem.plane(6), mean = problem.plane(7), t = problem.plane(8);
    problem.template reduce<SumOfInput>({.input = x, .sums = {sum}});
    problem.blur(sum, scratch, false, FinishMean<A>{problem.channels, problem.coef, mean});
  }
  problem.template reduce<SumsOfGradient>(
      {.grad = g, .input = x, .mean = mean, .sums = {q, squares, grads}});
  problem.blur(squares, scratch, false,
               FinishDivisorGradient<A>{problem.channels, problem.threshold, problem.value,
                                        problem.coef, d, q});
  problem.blur(q, scratch, true,
               FinishB<A>{problem.channels, problem.coef, d, grads, mean, b, sum});
  if (contrastive) problem.blur(sum, scratch, true, FinishAdjointMean<A>{problem.channels, t});
  problem.template apply<DivideGradient>(g, x, {.mean = mean, .d = d, .b = b, .t = t}, gx);
}

// ------------------------------------------------------------------------------------- operators

Tensor forward(const char* op, const Tensor& input, const Tensor& kernel,
               const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options);
  const Launcher launcher(input);
  Tensor output = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (output.numel() == 0) return;
    if (takes_one_launch<T>(x, kernel)) {
      const T* in = x.data.const_data_ptr<T>();
      run_images<false, T>(launcher, x, kernel, options, in, in, output.mutable_data_ptr<T>());
      return;
    }
    forward_images(launcher, x, kernel, options, x.data.const_data_ptr<T>(),
                   output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Tensor& input,
                const Tensor& kernel, const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options);
  check_like(op, "grad_output", grad_output, "input", input);
  const Tensor grad = dense(grad_output, x.channels_last);
  const Launcher launcher(input);
  Tensor grad_input = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (grad_input.numel() == 0) return;
    const T* go = grad.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    if (takes_one_launch<T>(x, kernel)) {
      run_images<true, T>(launcher, x, kernel, options, go, x.data.const_data_ptr<T>(), gi);
    } else if (options.kind == LocalNorm::kSubtractive) {
      subtractive_backward_images(launcher, x, kernel, options, go, gi);
    } else {
      divisive_backward_images(launcher, x, kernel, options, go, x.data.const_data_ptr<T>(), gi);
    }
  });
  return grad_input;
}

using Operators = LocalNormOperators<&forward, &backward>;

}  // namespace

Tensor subtractive_norm2d(const Tensor& input, const Tensor& kernel) {
  return Operators::subtractive_norm2d(input, kernel);
}

Tensor subtractive_norm2d_backward(const Tensor& grad_output, const Tensor& kernel) {
  return Operators::subtractive_norm2d_backward(grad_output, kernel);
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
