// Local normalization on CUDA.
//
// Bound by memory. Subtractive needs the input twice (for the sum over channels, then to subtract)
// and writes it once, divisive and contrastive need it once more for the squares. Between those
// passes everything happens on planes, one value a pixel, 1/C of the data.
//
// Images that fit into shared memory with their planes: one launch, one read and one write of
// memory. A block copies an image to its shared memory and works on it there, while other blocks
// of the multiprocessor copy theirs. Images too large for that are shared by the blocks of a
// cluster, up to 8 of them (from compute capability 9.0 on).
//
// Other images: the steps are kernels of their own, so that images and kernels may have any size.
//   prepare   the kernel divided by its sum, and the coef plane
//   reduce    sums over channels, several in one pass over the data
//   blur      rows and columns of a tile by way of shared memory; the same launch finishes the
//             plane (divides by coef, takes the root, applies the threshold, ...). Long kernels:
//             rows, then columns; 2-D kernels at once
//   apply     from planes back to every channel
// Launches: subtractive 4 forward and backward; divisive 5 and 6; contrastive 7 and 9.
//
// Squares leave the range of the type that computes long before their roots do, and the gradient
// has the inverse of a square. Images for which that happens go through their sums and blurs again,
// multiplied by a power of two (Range): in the same kernel where they are in shared memory, in one
// more launch, repair, where they are not. All other images have the bits that they would have
// without.
//
// A kernel whose sum is 0 or not finite gives infinities and NaN: to refuse it, as the CPU does,
// the host would have to wait for the device.

#include "../local_norm.h"

#include "memory.cuh"
#include "reduce.cuh"

#include <array>

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
    prepare_kernel(int64_t taps, BlurGeometry g, int64_t N, const double* __restrict__ values,
                   A* __restrict__ weight, A* __restrict__ flipped, A* __restrict__ coef,
                   A* __restrict__ flags) {
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
  for (int64_t i = first_item<int64_t>(); i < N; i += item_stride<int64_t>()) flags[i] = A(0);
}

// ------------------------------------------------------------------------------------------ range

// Where the type that computes has no digits for what is computed from a deviation s: its square,
// and for the gradient 1 / s^2.
//
// An image with a sum of squares beyond kLeast or kMost is computed again in units of 1 / lift. Of
// all powers of two, lift is the one that brings the smallest deviation above the threshold to
// kTarget: then h, which is largest there, has a place, and y has one at every pixel of an image
// whose numbers lie less than 40 powers of ten apart (float64: 350). Magnitudes further apart than
// squares may be are added up once more, as parts: kPart makes squares of what is far larger than
// the smallest.
template <typename A>
struct Range {
  static constexpr bool kWide = sizeof(A) == 8;
  static constexpr A kLargest = std::numeric_limits<A>::max();
  static constexpr A kLeast = A(kWide ? 0x1p-700 : 0x1p-80), kMost = A(kWide ? 0x1p700 : 0x1p80);
  static constexpr A kTarget = A(kWide ? 0x1p-400 : 0x1p-40);
  // lift is kLeastLift times a power of kStep, up to kMostLift.
  static constexpr A kStep = A(kWide ? 0x1p200 : 0x1p20);
  static constexpr A kLeastLift = A(kWide ? 0x1p-800 : 0x1p-100);
  static constexpr A kMostLift = A(kWide ? 0x1p800 : 0x1p100);
  static constexpr A kMeasure = A(kWide ? 0x1p600 : 0x1p90);  // the lift that shows small numbers
  static constexpr A kPart = A(kWide ? 0x1p-600 : 0x1p-80);
  static constexpr A kNeedsPart = A(kWide ? 0x1p1000 : 0x1p120);  // sums of squares
  static constexpr A kIsPart = kNeedsPart * kPart * kPart;
};

// Of the image that a block works on: in shared memory, where it costs no register.
template <typename A>
struct Units {
  A lift = 1, part = 1, by_lift = 1, by_part = 1;  // and 1 / lift, 1 / part
  A lift_of_known = 1;                             // the lift for what is in range without one
  A unused[3] = {};                                // eight elements
};

// float16 squared is in float32's range.
template <typename T>
constexpr bool kLeavesRange = !std::is_same_v<T, Half>;

// Whether a sum of squares says nothing reliable. A small one may, where its deviation (of a sum of
// kLeast: least) is below the threshold anyway.
template <typename A>
__device__ __forceinline__ bool out_of_range(A squares, A least, A threshold) {
  return !(squares <= Range<A>::kMost) ||
         (squares < Range<A>::kLeast && !(std::abs(least) < threshold));
}

// ----------------------------------------------------------------------------------------- reduce

// The sums over channels that a pass computes. Its terms are functions of the gradient, the input
// and the mean of a pixel, in units of 1 / scale; a pass without gradients reads the input alone.
struct SumOfInput {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A scale, A) const {
    sums[0] += x * scale;
  }
};

struct SumOfSquares {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A scale, A mean) const {
    const A z = x * scale - mean;
    sums[0] += z * z;
  }
};

struct SumsOfGradient {
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = true;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A grad, A x, A scale, A mean) const {
    const A z = x * scale - mean;
    sums[0] += grad * z;
    sums[1] += z * z;
    sums[2] += grad;
  }
};

// Neighbouring elements that a thread reads at a time and adds to as many sums: no more than 16
// bytes of a plane.
template <typename T>
constexpr int kImagePack = sizeof(T) == 8 ? 2 : 4;

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
  bool descending = false;  // from the end of memory: what the pass before read last is in L2
};

// The number of this block, in the order in which they start or in the other one.
__device__ __forceinline__ unsigned block_number(bool descending) {
  return descending ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

template <typename T, typename A, int kSums>
__device__ __forceinline__ void write_sums(const Reduction<T>& r, int64_t pixel,
                                           const A (&sums)[kSums]) {
  const A divide_by = r.coef ? r.coef[pixel % r.HW] : A(1);
#pragma unroll
  for (int k = 0; k < kSums; ++k) r.sums[k][pixel] = sums[k] / divide_by;
}

// NCHW: neighbouring threads take neighbouring packs of n pixels, so that each channel is read
// coalesced; n divides H * W. blockDim.y threads share the channels of a pack; their sums are added
// in order of threadIdx.y.
template <int n, typename Terms, typename T>
__global__ void __launch_bounds__(kThreads) reduce_planes_kernel(Reduction<T> r) {
  using A = opmath_t<T>;
  __shared__ A partial[Terms::kSums][n][kThreads];
  const int64_t packs = r.N * r.HW / n, groups = blockDim.y;
  const unsigned slot = threadIdx.y * blockDim.x + threadIdx.x;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(block_number(r.descending)) * blockDim.x; base < packs;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pixel = (base + threadIdx.x) * n;
    const bool inside = base + threadIdx.x < packs;
    A sums[n][Terms::kSums] = {};
    if (inside) {
      const int64_t first = pixel / r.HW * r.C * r.HW + pixel % r.HW;
      A mean[n];
#pragma unroll
      for (int j = 0; j < n; ++j) mean[j] = r.mean ? r.mean[pixel + j] : A(0);
#pragma unroll 4
      for (int64_t c = threadIdx.y; c < r.C; c += groups) {
        const int64_t i = first + c * r.HW;
        const Pack<T, n> xs = load_pack<n>(r.input + i);
        const Pack<T, n> gs = Terms::kReadsGradient ? load_pack<n>(r.grad + i) : xs;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          Terms{}(sums[j], static_cast<A>(gs.values[j]), static_cast<A>(xs.values[j]), A(1),
                  mean[j]);
        }
      }
    }
    if (groups > 1) {
#pragma unroll
      for (int k = 0; k < Terms::kSums; ++k) {
#pragma unroll
        for (int j = 0; j < n; ++j) partial[k][j][slot] = sums[j][k];
      }
      __syncthreads();
      if (threadIdx.y == 0) {
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
#pragma unroll
          for (int j = 0; j < n; ++j) {
            for (unsigned y = 1; y < groups; ++y) {
              sums[j][k] += partial[k][j][y * blockDim.x + threadIdx.x];
            }
          }
        }
      }
      __syncthreads();  // before the next turn overwrites the partial sums
    }
    if (threadIdx.y == 0 && inside) {
#pragma unroll
      for (int j = 0; j < n; ++j) write_sums(r, pixel + j, sums[j]);
    }
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
  for (int64_t base = block_number(r.descending) * per_block; base < pixels;
       base += gridDim.x * per_block) {
    const int64_t pixel = base + threadIdx.x / static_cast<unsigned>(lanes);
    A sums[Terms::kSums] = {};
    if (pixel < pixels) {
      const A mean = r.mean ? r.mean[pixel] : A(0);
#pragma unroll 4
      for (int64_t c = lane; c < r.C; c += lanes) {
        const int64_t i = pixel * r.C + c;
        const A grad = Terms::kReadsGradient ? static_cast<A>(r.grad[i]) : A(0);
        Terms{}(sums, grad, static_cast<A>(r.input[i]), A(1), mean);
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

// What the channels are divided by, from the blurred sum of squares; for the gradient (where there
// is a q) also h in its place. Images out of range get a flag.
template <typename A>
struct FinishDivisor {
  A channels, threshold, value, root_of_least;
  int64_t HW;
  const A* coef;
  A *flags, *d, *q;  // no flags where the range is not left
  __device__ void operator()(A blurred, int64_t pixel, int64_t at) const {
    const A s = local_deviation(blurred, channels, coef[at]);
    if (q) q[pixel] = divisor_gradient(q[pixel], s, coef[at], threshold);
    d[pixel] = divisor(s, threshold, value);
    if (flags && out_of_range(blurred, root_of_least / coef[at], threshold)) {
      flags[pixel / HW] = A(1);
    }
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
  constexpr int kSide = kTileSide + 2 * kTileRadius, kMost = 2 * kTileRadius + 4;
  constexpr int kGroups = kTileSide / 4;  // of four neighbours, along either dimension
  alignas(kVectorBytes) __shared__ A tile[kSide * kSide];
  alignas(kVectorBytes) __shared__ A blurred_rows[(kSide + 4) * kTileSide];
  alignas(kVectorBytes) __shared__ A weights[kMost];
  const int taps = static_cast<int>(g.taps_w), radius = taps / 2;
  const int side = kTileSide + 2 * radius;
  const int64_t down = (g.H + kTileSide - 1) / kTileSide,
                across = (g.W + kTileSide - 1) / kTileSide;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMost) weights[thread] = thread < taps ? weight[thread] : A(0);
  for (int64_t t = blockIdx.x; t < N * down * across; t += gridDim.x) {
    const int64_t image = t / (down * across), place = t % (down * across);
    const int64_t top = place / across * kTileSide, left = place % across * kTileSide;
    const A* plane = in + image * g.H * g.W;
#pragma unroll 4
    for (int row = thread / kWarp; row < side; row += kThreads / kWarp) {
      const int64_t h = top + row - radius;
#pragma unroll
      for (int step = 0; step < kSide; step += kWarp) {
        const int column = step + thread % kWarp;
        const int64_t w = left + column - radius;
        if (column < side) {
          tile[row * kSide + column] =
              h >= 0 && h < g.H && w >= 0 && w < g.W ? plane[h * g.W + w] : A(0);
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < side * kGroups; i += kThreads) {
      const A* x = tile + i / kGroups * kSide + i % kGroups * 4;
      A sums[4] = {};
      correlate_four([&](int k) { return load_four(x + k); }, weights, taps, sums);
      store_four(blurred_rows + 4 * i, sums);
    }
    __syncthreads();
    for (int i = thread; i < kTileSide * kGroups; i += kThreads) {
      const int row = i / kTileSide * 4;
      const int64_t h = top + row, w = left + i % kTileSide;
      const A* x = blurred_rows + row * kTileSide + i % kTileSide;
      A sums[4] = {};
      correlate_four(
          [&](int k) -> Four<A> {
            const A* from = x + k * kTileSide;
            return {from[0], from[kTileSide], from[2 * kTileSide], from[3 * kTileSide]};
          },
          weights, taps, sums);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (h + j < g.H && w < g.W) {
          finish(sums[j], (image * g.H + h + j) * g.W + w, (h + j) * g.W + w);
        }
      }
    }
    __syncthreads();  // before the next turn overwrites the tile
  }
}

// ------------------------------------------------------------------------------------------ apply

// The planes that the last pass takes; null where it has no use for one.
template <typename A>
struct Planes {
  const A *mean = nullptr, *d = nullptr, *b = nullptr, *t = nullptr;
  bool descending = false;  // as in Reduction
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
  const I first = static_cast<I>(block_number(planes.descending)) * kThreads + threadIdx.x;
  for (I pack = first; pack < packs; pack += item_stride<I>()) {
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

// ------------------------------------------------------------------------ images in shared memory
//
// A block, or a cluster of them, takes an image at a time: each block copies its share of the data
// (channels of NCHW, pixels of NHWC; one range of memory in both) to shared memory, and has every
// plane, whole. Sums over channels are added up from all blocks' shares; the blur, of one plane, is
// every block's own.

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where a block has what, in elements of A from the end of its share of the image(s): multiples of
// four. A flat plane has a value for each pixel.
//   in       the plane that is blurred, its rows with zeros before and behind them, so that the
//            window of a pixel begins at the pixel's own index
//   scratch  that plane blurred along rows, with rows of zeros above and below; before it is
//            blurred, the partial sums of groups of threads and of blocks
//   d        begins where scratch ends; where the gradient has three partial sums, among them,
//   which
//            are done with when it is written
struct PlaneLayout {
  int W4, pitch;            // of scratch and of in
  int scratch_rows, above;  // rows of zeros above
  int flat, taps_pitch;     // the size of a flat plane, and of a row of taps
  int weight, flipped, units, coef, mean, q, grads, centred, scratch, d;  // in begins at 0
  int64_t size;

  PlaneLayout(const BlurGeometry& g, bool backward, int groups) {
    const auto H4 = round_up(g.H, 4), around_w = round_up(g.taps_w - 1, 4);
    const auto around_h = g.separable ? round_up(g.taps_h - 1, 4) : 0;
    const auto row = round_up(g.taps_w, 4), taps = row * (g.separable ? 1 : g.taps_h);
    W4 = static_cast<int>(round_up(g.W, 4));
    pitch = static_cast<int>(W4 + around_w);
    scratch_rows = static_cast<int>(H4 + around_h);
    above = g.separable ? static_cast<int>(g.taps_h / 2) : 0;
    flat = static_cast<int>(round_up(g.H * g.W, 4));
    taps_pitch = static_cast<int>(row);
    int64_t end = g.H * pitch;
    const auto take = [&](int64_t count) {
      const int64_t begin = end;
      end += count;
      return static_cast<int>(begin);
    };
    weight = take(taps), flipped = take(taps), units = take(8);
    coef = take(flat), mean = take(flat);
    q = take(backward ? flat : 0), grads = take(backward ? flat : 0);
    centred = take(backward ? flat : 0);
    const int64_t blurred = int64_t{scratch_rows} * W4;
    const int64_t partial = int64_t{backward ? 3 : 1} * groups * flat;
    scratch =
        take(backward ? std::max(blurred + flat, partial) : std::max(blurred, partial) + flat);
    d = static_cast<int>(backward ? scratch + blurred : end - flat);
    size = end;
  }
};

constexpr int kMaxTaps = 512;  // of a kernel that shared memory holds

template <typename T>
struct ImageArguments {
  LocalNorm kind;
  bool adjoint;  // the gradient of subtractive, which is its forward but for the order of steps
  bool channels_last, separable;
  bool direct;  // few channels, no shares: a thread adds up those of a pixel
  int64_t N;
  int C, H, W, HW, taps_h, taps_w;
  int cluster, share, groups;     // blocks of an image; channels or pixels of a block
  int image_bytes;                // that a share takes in shared memory
  int size;                       // elements of an image
  Divider by_W, by_row, by_line;  // a row's packs; what an element is divided by for its pixel
  PlaneLayout at;
  opmath_t<T> threshold, value, root_of_least, by_channels;
  const double* kernel;
  const T* grad;   // backward
  const T* input;  // of the subtractive backward: the gradient
  T* out;
};

// What stands in a plane that others are divided by: itself if exact, or else its reciprocal,
// finite so that 0 stays 0.
template <bool kExact, typename A>
__device__ __forceinline__ A as_divisor(A d) {
  if constexpr (kExact) return d;
  const A inverse = A(1) / d;
  return d != A(0) && inverse > Range<A>::kLargest ? Range<A>::kLargest : inverse;
}
template <bool kExact, typename A>
__device__ __forceinline__ A divided(A value, A prepared) {
  if constexpr (kExact) return value / prepared;
  return value * prepared;
}

// The values of the last pass, of an element and its pixel's planes, which are in units of 1 / lift
// (see Range).
struct MinusMean {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsBoth = false;
  template <typename A>
  __device__ A operator()(A x, A, A mean, A, A) const {
    return x - mean;
  }
};
template <bool kExact, typename A>
struct CentredByDivisor {
  A lift;
  static constexpr int kPlanes = 2;
  static constexpr bool kReadsBoth = false;
  __device__ A operator()(A x, A, A mean, A d, A) const {
    return divided<kExact>(x * lift - mean, d);
  }
};
// offset = mean * b - t; d is in units of 1
template <bool kExact, typename A>
struct GradientOfDivisor {
  A lift;
  static constexpr int kPlanes = 3;
  static constexpr bool kReadsBoth = true;
  __device__ A operator()(A grad, A x, A b, A d, A offset) const {
    return divided<kExact>(grad, d) + (offset - x * lift * b) * lift;
  }
};

// A block's work on its image. kPacked: accesses of 16 bytes; then four neighbours belong to one
// channel (NCHW) or one pixel (NHWC), and shares begin at multiples of 16 bytes.
template <bool kPacked, typename T>
struct ImageBlock {
  using A = opmath_t<T>;
  static constexpr int m = kPacked ? kImagePack<T> : 1;
  static constexpr bool kExact = sizeof(A) == 8;  // coef and d; or they are reciprocals

  const ImageArguments<T>& a;
  A* const planes;
  const int rank, threads, thread;

  __device__ __forceinline__ ImageBlock(const ImageArguments<T>& arguments, A* memory)
      : a(arguments),
        planes(memory),
        rank(static_cast<int>(blockIdx.x) % arguments.cluster),
        threads(static_cast<int>(blockDim.x)),
        thread(static_cast<int>(threadIdx.x)) {}

  // Of the share, in elements: where it begins in the image, and how many there are.
  __device__ __forceinline__ int first() const {
    return min_of(rank * a.share, a.channels_last ? a.HW : a.C) * (a.channels_last ? a.C : a.HW);
  }
  __device__ __forceinline__ int count() const {
    return min_of((rank + 1) * a.share, a.channels_last ? a.HW : a.C) *
               (a.channels_last ? a.C : a.HW) -
           first();
  }

  __device__ __forceinline__ static int min_of(int x, int y) { return x < y ? x : y; }

  // Planes, and what a plane's values are divided by.
  __device__ __forceinline__ A* in() const { return planes; }
  __device__ __forceinline__ A* mean() const { return planes + a.at.mean; }
  __device__ __forceinline__ A* d() const { return planes + a.at.d; }
  __device__ __forceinline__ A* q() const { return planes + a.at.q; }
  __device__ __forceinline__ A* grads() const { return planes + a.at.grads; }
  __device__ __forceinline__ A* centred() const { return planes + a.at.centred; }
  __device__ __forceinline__ Units<A>& units() const {
    return *reinterpret_cast<Units<A>*>(planes + a.at.units);
  }
  __device__ __forceinline__ A over_channels(A value) const {
    return divided<kExact>(value, kExact ? static_cast<A>(a.C) : a.by_channels);
  }
  __device__ __forceinline__ A over_coef(A value, int p) const {
    return divided<kExact>(value, planes[a.at.coef + p]);
  }

  // ------------------------------------------------------------------------------- preparation

  // The weights and coef, and zeros where nothing is written.
  __device__ __forceinline__ void prepare() const {
    const PlaneLayout& at = a.at;
    for (int i = thread; i < at.size; i += threads) planes[i] = A(0);
    __syncthreads();
    A *weight = planes + at.weight, *flipped = planes + at.flipped, *coef = planes + at.coef;
    const int lines = a.separable ? 1 : a.taps_h, taps = lines * a.taps_w;
    // The same sum for everyone, in the order of one.
    double sum = 0;
    for (int i = thread % kWarp; i < taps; i += kWarp) sum += a.kernel[i];
    sum = lane_sum(sum, kWarp);
    for (int i = thread; i < taps; i += threads) {
      const int row = i / a.taps_w, column = i % a.taps_w;
      const A normalised = static_cast<A>(a.kernel[i] / sum);
      weight[row * at.taps_pitch + column] = normalised;
      flipped[(lines - 1 - row) * at.taps_pitch + a.taps_w - 1 - column] = normalised;
    }
    __syncthreads();
    // The blur of ones along either dimension; the mean and d are not in use yet.
    A *along_h = planes + at.mean, *along_w = planes + at.d;
    const auto inside = [&](int i, int size) {
      const Taps in = taps_inside(i, size, a.taps_w);
      A total = A(0);
      for (int64_t k = in.first; k < in.last; ++k) total += weight[k];
      return total;
    };
    if (a.separable) {
      for (int i = thread; i < a.H + a.W; i += threads) {
        if (i < a.H) {
          along_h[i] = inside(i, a.H);
        } else {
          along_w[i - a.H] = inside(i - a.H, a.W);
        }
      }
      __syncthreads();
    }
    for (int p = thread; p < a.HW; p += threads) {
      const int h = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p))), w = p - h * a.W;
      A total = A(0);
      if (a.separable) {
        total = along_w[w] * along_h[h];
      } else {
        const Taps rows = taps_inside(h, a.H, a.taps_h), columns = taps_inside(w, a.W, a.taps_w);
        for (int64_t i = rows.first; i < rows.last; ++i) {
          for (int64_t k = columns.first; k < columns.last; ++k) {
            total += weight[i * at.taps_pitch + k];
          }
        }
      }
      coef[p] = sizeof(A) == 8 ? total : A(1) / total;
    }
    __syncthreads();
    if (a.separable) {
      for (int i = thread; i < a.H; i += threads) along_h[i] = A(0);
      __syncthreads();
    }
  }

  // -------------------------------------------------------------------------------- the image

  // Begins to copy this block's share; wait_for_copies() and a barrier, and it is there.
  __device__ __forceinline__ void load(T* to, const T* image) const {
    const T* from = image + first();
    constexpr int n = kPacked ? kPackSize<T> : 1;
    const int packs = count() / n;
#pragma unroll 8
    for (int i = thread; i < packs; i += threads) copy_pack<n>(to + i * n, from + i * n);
  }

  // ------------------------------------------------------------------------------------ sums

  // use(p, where, sums) for every pixel, with the sums over all channels that Terms names of the
  // input in units of 1 / scale, where the mean is in units of scale_of_mean / scale; `where` is
  // the pixel's place in the plane `in`. Ends with a barrier.
  template <typename Terms, typename Use>
  __device__ __forceinline__ void reduce(const T* grad, const T* x, A scale, A scale_of_mean,
                                         const Use& use) const {
    A *partial = planes + a.at.scratch, *mean = planes + a.at.mean;
    const auto add = [&](A(&to)[Terms::kSums], int i, A centre) {
      Terms{}(to, Terms::kReadsGradient ? static_cast<A>(grad[i]) : A(0), static_cast<A>(x[i]),
              scale, centre);
    };
    const auto add_pack = [&](A(&to)[Terms::kSums], const Pack<T, m>& gs, const Pack<T, m>& xs,
                              int j, A centre) {
      Terms{}(to, Terms::kReadsGradient ? static_cast<A>(gs.values[j]) : A(0),
              static_cast<A>(xs.values[j]), scale, centre);
    };
    const int flat = a.at.flat;
    if (a.direct) {
      // below
    } else if (a.channels_last) {
      const int packs = a.C / m, pixels = min_of(a.HW - rank * a.share, a.share);
      // So many neighbouring threads that they read from all banks.
      constexpr int most = kPacked ? static_cast<int>(128 / (4 * sizeof(T))) : kWarp;
      int lanes = 1;
      while (lanes < most && lanes < packs) lanes *= 2;
      const int lane = thread % lanes, per_turn = threads / lanes;
      for (int base = 0; base < pixels; base += per_turn) {
        const int pixel = base + thread / lanes;
        A total[Terms::kSums] = {};
        if (pixel < pixels) {
          const A centre = mean[rank * a.share + pixel] * scale_of_mean;
#pragma unroll 2
          for (int c = lane; c < packs; c += lanes) {
            const int i = (pixel * packs + c) * m;
            const Pack<T, m> xs = load_pack<m>(x + i);
            const Pack<T, m> gs = Terms::kReadsGradient ? load_pack<m>(grad + i) : xs;
#pragma unroll
            for (int j = 0; j < m; ++j) add_pack(total, gs, xs, j, centre);
          }
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          total[k] = lane_sum(total[k], lanes);
          if (lane == 0 && pixel < pixels) partial[k * flat + rank * a.share + pixel] = total[k];
        }
      }
      __syncthreads();
    } else {
      const int packs = a.HW / m, channels = min_of(a.C - rank * a.share, a.share);
      const int group = a.groups > 1 ? thread / packs : 0;
      for (int q = thread - group * packs; q < packs && group < a.groups; q += threads) {
        A total[m][Terms::kSums] = {};
        Pack<A, m> centre = load_pack<m>(mean + q * m);
#pragma unroll
        for (int j = 0; j < m; ++j) centre.values[j] *= scale_of_mean;
#pragma unroll 4
        for (int c = group; c < channels; c += a.groups) {
          const int i = c * a.HW + q * m;
          const Pack<T, m> xs = load_pack<m>(x + i);
          const Pack<T, m> gs = Terms::kReadsGradient ? load_pack<m>(grad + i) : xs;
#pragma unroll
          for (int j = 0; j < m; ++j) add_pack(total[j], gs, xs, j, centre.values[j]);
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          Pack<A, m> sums;
#pragma unroll
          for (int j = 0; j < m; ++j) sums.values[j] = total[j][k];
          store_pack(partial + (k * a.groups + group) * flat + q * m, sums);
        }
      }
      __syncthreads();
    }
    if (a.cluster > 1) {
      if (a.groups > 1) {  // this block's own first, for others to read one number a pixel
        for (int p = thread; p < a.HW; p += threads) {
#pragma unroll
          for (int k = 0; k < Terms::kSums; ++k) {
            A* const sums = partial + k * a.groups * flat + p;
            A total = sums[0];
            for (int g = 1; g < a.groups; ++g) total += sums[g * flat];
            sums[0] = total;
          }
        }
      }
      sync_cluster();
    }
    for (int p = thread; p < a.HW; p += threads) {
      A sums[Terms::kSums] = {};
      if (a.direct) {
        const A centre = mean[p] * scale_of_mean;
        for (int c = 0; c < a.C; ++c) add(sums, c * a.HW + p, centre);
      } else {
        // Of all blocks, of the one that has the pixel, or of this block's groups.
        const bool gathered = a.cluster > 1 && !a.channels_last;
        const int terms = gathered ? a.cluster : a.groups;
        const A* mine = partial + p;
        if (a.cluster > 1 && a.channels_last) mine = of_block(mine, p / a.share);
#pragma unroll 4
        for (int i = 0; i < terms; ++i) {
          const A* from = gathered ? of_block(mine, i) : mine + i * flat;
#pragma unroll
          for (int k = 0; k < Terms::kSums; ++k) sums[k] += from[k * a.groups * flat];
        }
      }
      const int h = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p)));
      use(p, p + h * (a.at.pitch - a.W) + a.taps_w / 2, sums);
    }
    if (a.cluster > 1) {
      sync_cluster();  // before anyone writes over what others have yet to read
    } else {
      __syncthreads();
    }
  }

  // ------------------------------------------------------------------------------------ blur

  // finish(blurred, p, where) for every pixel of the plane `in`, which finish may write: the next
  // blur's. Whether finish was true for one of them, for all threads of the block. Ends with a
  // barrier.
  template <typename Finish>
  __device__ __forceinline__ bool blur(bool adjoint, const Finish& finish) const {
    const PlaneLayout& at = a.at;
    const A *in = planes, *taps = planes + (adjoint ? at.flipped : at.weight);
    A* const scratch = planes + at.scratch;
    const int per_row = at.W4 / 4, W4 = at.W4;
    if (a.separable && !a.direct) {  // partial sums were there
      for (int i = thread; i < (at.scratch_rows - a.H) * W4; i += threads) {
        scratch[i < at.above * W4 ? i : i + a.H * W4] = A(0);
      }
    }
    for (int i = thread; i < a.H * per_row; i += threads) {
      const int h = static_cast<int>(a.by_row.quotient(static_cast<uint32_t>(i))),
                w = (i - h * per_row) * 4;
      A sums[4] = {};
      const auto along = [&](int row, const A* weight) {
        const A* x = in + row * at.pitch + w;
        correlate_four([&](int k) { return load_four(x + k); }, weight, a.taps_w, sums);
      };
      if (a.separable) {
        along(h, taps);
      } else {
        const int top = h - a.taps_h / 2;
        for (int k = 0; k < a.taps_h; ++k) {
          if (top + k >= 0 && top + k < a.H) along(top + k, taps + k * at.taps_pitch);
        }
      }
      store_four(scratch + (at.above + h) * W4 + w, sums);
    }
    __syncthreads();
    bool any = false;
    for (int i = thread; i < (a.H + 3) / 4 * a.W; i += threads) {
      const int group = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(i))),
                w = i - group * a.W, h = group * 4;
      const A* x = scratch + h * W4 + w;
      A sums[4] = {};
      const auto load = [&](int k) -> Four<A> {
        const A* from = x + k * W4;
        return {from[0], from[W4], from[2 * W4], from[3 * W4]};
      };
      if (a.separable) {
        correlate_four(load, taps, a.taps_h, sums);
      } else {
        const Four<A> four = load(0);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = four.values[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (h + j < a.H) {
          any |= finish(sums[j], (h + j) * a.W + w, (h + j) * at.pitch + w + a.taps_w / 2);
        }
      }
    }
    return __syncthreads_or(any);
  }

  // ----------------------------------------------------------------------------------- apply

  // image = value(u, v, planes) for every element of this share. Ends with a barrier.
  template <typename Value>
  __device__ __forceinline__ void apply(const Value& value, T* image, const T* u, const T* v,
                                        const A* plane0, const A* plane1, const A* plane2) const {
    constexpr int n = kPacked ? kPackSize<T> : 1;
    T* const out = image + first();
    const int size = count();
    // What two turns of three planes take are more registers than there are.
#pragma unroll(Value::kReadsBoth ? 1 : 2)
    for (int i = thread * n; i < size; i += threads * n) {
      const Pack<T, n> us = load_pack<n>(u + i);
      const Pack<T, n> vs = Value::kReadsBoth ? load_pack<n>(v + i) : us;
      Pack<T, n> to;
#pragma unroll
      for (int c = 0; c < n; c += m) {
        Pack<A, m> of[3];
        const A* const from[3] = {plane0, plane1, plane2};
        // A share of NCHW begins with a channel, one of NHWC with a pixel.
        const int p = a.channels_last
                          ? rank * a.share +
                                static_cast<int>(a.by_line.quotient(static_cast<uint32_t>(i + c)))
                          : static_cast<int>(a.by_line.remainder(static_cast<uint32_t>(i + c)));
#pragma unroll
        for (int k = 0; k < Value::kPlanes; ++k) {
          if (a.channels_last) {
            const A of_pixel = from[k][p];
#pragma unroll
            for (int j = 0; j < m; ++j) of[k].values[j] = of_pixel;
          } else {
            of[k] = load_pack<m>(from[k] + p);
          }
        }
#pragma unroll
        for (int k = Value::kPlanes; k < 3; ++k) of[k] = of[0];
#pragma unroll
        for (int j = 0; j < m; ++j) {
          to.values[c + j] = static_cast<T>(value(static_cast<A>(us.values[c + j]),
                                                  static_cast<A>(vs.values[c + j]), of[0].values[j],
                                                  of[1].values[j], of[2].values[j]));
        }
      }
      store_pack(out + i, to);
    }
    __syncthreads();
  }
};

// ------------------------------------------------------------------------------- one image
//
// The operators, for a block that has an image and its planes where it can sum (reduce), blur and
// apply: an ImageBlock in shared memory, a MemoryBlock in global memory. All blocks of a cluster
// decide alike: they have the same planes.

// In turn kAsItIs; where that leaves the range, kMeasure looks for smaller deviations, kLifted is
// the result, or, with kPart, all but the pixels that are far larger than the smallest.
enum Turn { kAsItIs, kMeasure, kLifted, kPart };

// Writes what stands in the plane d, from a pixel's blurred sum of squares and its deviation s in
// units of 1 / lift: so is d, or for the gradient in units of 1. Whether the result cannot stay.
template <typename T, bool kGradient, typename Block, typename A>
__device__ __forceinline__ bool finish_divisor(const Block& block, int turn, A blurred, A s,
                                               int64_t p, A& d) {
  using R = Range<A>;
  const Units<A>& units = block.units();
  const A threshold = block.a.threshold * units.lift;
  if constexpr (kGradient) {
    d = as_divisor<Block::kExact>(s > threshold || s != s ? s * units.by_lift : block.a.value);
  } else {
    constexpr A kTiny = std::numeric_limits<A>::denorm_min();  // what divides is not 0
    const A value = block.a.value * units.lift;
    d = as_divisor<Block::kExact>(divisor(s, threshold, value < kTiny ? kTiny : value));
  }
  if (!kLeavesRange<T> || turn >= kLifted) return false;
  if (turn == kAsItIs) {
    const A least = block.over_coef(block.a.root_of_least, p);
    if (!out_of_range(blurred, least, threshold)) return false;
    if (blurred >= R::kLeast) return true;
  } else if (s > threshold && blurred <= R::kLargest) {
    d = as_divisor<Block::kExact>(s / R::kMeasure);
    return false;
  }
  d = as_divisor<Block::kExact>(R::kLargest);  // unknown, or none: does not count for lift_for()
  return true;
}

// The lift for the divisors of the plane d, which all threads of the block have written, and no
// less than that of another plane.
template <typename Block, typename A>
__device__ __forceinline__ A lift_for(const Block& block, const A* d, A lift) {
  using R = Range<A>;
  for (; lift < R::kMostLift; lift *= R::kStep) {
    bool any = false;
    for (int64_t p = block.thread; p < block.a.HW; p += block.threads) {
      any |= divided<Block::kExact>(R::kTarget, d[p]) > lift;
    }
    if (!__syncthreads_or(any)) break;
  }
  return lift;
}

// After a turn that was not good enough: what is in shared memory for the next one.
template <typename Block, typename A>
__device__ __forceinline__ void next_turn(const Block& block, int turn, const A* d) {
  using R = Range<A>;
  Units<A>& units = block.units();
  Units<A> next = units;
  if (turn == kAsItIs) {
    next.lift_of_known = lift_for(block, d, R::kLeastLift);
    next.lift = R::kMeasure;
  } else if (turn == kMeasure) {
    next.lift = lift_for(block, d, next.lift_of_known);
  } else {
    next.part = R::kPart;
    next.by_part = 1 / R::kPart;
  }
  next.by_lift = 1 / next.lift;
  if (block.thread == 0) units = next;
  __syncthreads();
}

// units.lift and units.part are 1.
template <typename Block, typename T>
__device__ __forceinline__ void forward_image(const Block& block, const T* x, T* out) {
  using A = opmath_t<T>;
  using R = Range<A>;
  A *mean = block.mean(), *d = block.d(), *in = block.in();
  const Units<A>& units = block.units();
#pragma unroll 1
  for (int turn = kAsItIs;; ++turn) {
    if (block.a.kind != LocalNorm::kDivisive && turn != kPart) {
      block.template reduce<SumOfInput>(
          x, x, units.lift, A(1), [&](auto p, auto where, const A(&sums)[1]) {
            in[where] = block.a.adjoint ? block.over_coef(sums[0], p) : sums[0];
          });
      block.blur(block.a.adjoint, [&](A blurred, auto p, auto) {
        const A share = block.over_channels(blurred);
        mean[p] = block.a.adjoint ? share : block.over_coef(share, p);
        return false;
      });
    }
    if (block.a.kind == LocalNorm::kSubtractive) {
      return block.apply(MinusMean{}, out, x, x, mean, mean, mean);
    }
    block.template reduce<SumOfSquares>(
        x, x, units.lift * units.part, units.part,
        [&](auto, auto where, const A(&sums)[1]) { in[where] = sums[0]; });
    const bool again = block.blur(false, [&](A blurred, auto p, auto) {
      const A s = block.over_coef(std::sqrt(block.over_channels(blurred)), p);
      if (kLeavesRange<T> && turn == kPart && !(blurred >= R::kIsPart)) return false;
      const bool wrong = finish_divisor<T, false>(block, turn, blurred, s * units.by_part, p, d[p]);
      return kLeavesRange<T> && (turn == kLifted ? !(blurred <= R::kNeedsPart) : wrong);
    });
    if (!kLeavesRange<T> || turn == kPart || (turn != kMeasure && !again)) break;
    next_turn(block, turn, d);
  }
  block.apply(CentredByDivisor<Block::kExact, A>{units.lift}, out, x, x, mean, d, d);
}

// Divisive and contrastive. Where s is that much larger than elsewhere that it would need kPart,
// the gradient is 0 next to the one there. units.lift is 1.
template <typename Block, typename T>
__device__ __forceinline__ void backward_image(const Block& block, const T* g, const T* x, T* out) {
  using A = opmath_t<T>;
  A *mean = block.mean(), *d = block.d(), *in = block.in();
  A *q = block.q(), *grads = block.grads(), *centred = block.centred();
  A *b = q, *offset = grads;  // what comes in their place
  const bool contrastive = block.a.kind == LocalNorm::kContrastive;
  const A channels = static_cast<A>(block.a.C);
  const Units<A>& units = block.units();
#pragma unroll 1
  for (int turn = kAsItIs;; ++turn) {
    if (contrastive) {
      block.template reduce<SumOfInput>(
          x, x, units.lift, A(1),
          [&](auto p, auto where, const A(&sums)[1]) { in[where] = centred[p] = sums[0]; });
      block.blur(false, [&](A blurred, auto p, auto) {
        const A value = block.over_coef(block.over_channels(blurred), p);
        mean[p] = value;
        centred[p] -= channels * value;
        return false;
      });
    }
    block.template reduce<SumsOfGradient>(g, x, units.lift, A(1),
                                          [&](auto p, auto where, const A(&sums)[3]) {
                                            q[p] = sums[0];
                                            in[where] = sums[1];
                                            if (contrastive)
                                              grads[p] = sums[2];  // or the offset stays 0
                                          });
    const bool again = block.blur(false, [&](A blurred, auto p, auto where) {
      const A root = std::sqrt(block.over_channels(blurred)), s = block.over_coef(root, p);
      // divisor_gradient(), as s * coef is the root
      const bool above = s > block.a.threshold * units.lift && s > A(0);
      in[where] = above ? q[p] / root / root / s : (s != s ? s : A(0));
      return finish_divisor<T, true>(block, turn, blurred, s, p, d[p]);
    });
    if (!kLeavesRange<T> || (turn != kMeasure && !again)) break;
    next_turn(block, turn, d);
  }
  block.blur(true, [&](A blurred, auto p, auto where) {
    const A share = block.over_channels(blurred);
    b[p] = share;
    if (contrastive) {
      const A over_d = divided<Block::kExact>(grads[p], d[p]) * units.by_lift;
      in[where] = block.over_coef(over_d - centred[p] * share, p);
    }
    return false;
  });
  if (contrastive) {
    block.blur(true, [&](A blurred, auto p, auto) {
      offset[p] = mean[p] * b[p] - block.over_channels(blurred);
      return false;
    });
  }
  block.apply(GradientOfDivisor<Block::kExact, A>{units.lift}, out, g, x, b, d, offset);
}

constexpr int kMostImageThreads = 512;

// The first image of a block and the distance to its next one.
template <typename T>
__device__ __forceinline__ int64_t first_image(const ImageArguments<T>& a) {
  return blockIdx.x / static_cast<unsigned>(a.cluster);
}
template <typename T>
__device__ __forceinline__ int64_t image_stride(const ImageArguments<T>& a) {
  return gridDim.x / static_cast<unsigned>(a.cluster);
}

template <bool kPacked, typename T>
__global__ void __launch_bounds__(kMostImageThreads, 2)
    forward_image_kernel(const __grid_constant__ ImageArguments<T> a) {
  using A = opmath_t<T>;
  unsigned char* const memory = dynamic_shared_memory();
  T* const x = reinterpret_cast<T*>(memory);
  const ImageBlock<kPacked, T> block(a, reinterpret_cast<A*>(memory + a.image_bytes));
  for (int64_t image = first_image(a); image < a.N; image += image_stride(a)) {
    block.load(x, a.input + image * a.size);
    if (image == first_image(a)) block.prepare();
    if (block.thread == 0) block.units() = {};
    wait_for_copies();
    __syncthreads();
    forward_image(block, x, a.out + image * a.size);
  }
}

template <bool kPacked, typename T>
__global__ void __launch_bounds__(kMostImageThreads, 2)
    backward_image_kernel(const __grid_constant__ ImageArguments<T> a) {
  using A = opmath_t<T>;
  unsigned char* const memory = dynamic_shared_memory();
  T* const g = reinterpret_cast<T*>(memory);
  T* const x = reinterpret_cast<T*>(memory + a.image_bytes);
  const ImageBlock<kPacked, T> block(a, reinterpret_cast<A*>(memory + 2 * a.image_bytes));
  for (int64_t image = first_image(a); image < a.N; image += image_stride(a)) {
    block.load(g, a.grad + image * a.size);
    block.load(x, a.input + image * a.size);
    if (image == first_image(a)) block.prepare();
    if (block.thread == 0) block.units() = {};
    wait_for_copies();
    __syncthreads();
    backward_image(block, g, x, a.out + image * a.size);
  }
}

// How a launch divides the images: a cluster of blocks for each, no blocks if it can not.
struct ImagePlan {
  int cluster = 0, share = 0, groups = 1, threads = 0;
  bool direct = false;
  int64_t image_bytes = 0, bytes = 0;  // of shared memory
};

template <typename T>
ImagePlan plan_images(const Multiprocessors& device, const Images& images, const BlurGeometry& g,
                      bool backward, bool packed) {
  using A = opmath_t<T>;
  const int64_t HW = images.H * images.W, buffers = backward ? 2 : 1;
  const int64_t unit = images.channels_last ? images.C : HW;
  const int64_t units = images.channels_last ? HW : images.C;
  constexpr int64_t kMost = int64_t{1} << 24;  // bytes and elements, long before any overflow
  if (HW > kMost || images.C > kMost || HW * images.C > kMost || g.taps_h * g.taps_w > kMaxTaps) {
    return {};
  }
  const auto plan_for = [&](int cluster, int groups) {
    ImagePlan plan;
    int64_t share = ceil_div(units, cluster);
    if (packed) {
      while (share * unit % kPackSize<T> != 0) ++share;
    }
    plan.cluster = cluster, plan.share = static_cast<int>(share), plan.groups = groups;
    plan.image_bytes = round_up(share * unit * static_cast<int64_t>(sizeof(T)), kVectorBytes);
    plan.bytes = buffers * plan.image_bytes +
                 PlaneLayout(g, backward, groups).size * static_cast<int64_t>(sizeof(A));
    if (plan.bytes > device.shared_per_block ||
        share * unit * std::max(HW, images.C) >= int64_t{1} << 32) {
      plan.cluster = 0;
    }
    return plan;
  };
  // A block takes some of the shared memory for itself.
  const auto blocks_for = [&](const ImagePlan& plan) {
    return plan.cluster ? device.shared_bytes / (plan.bytes + 1024) : 0;
  };
  // Two blocks of a multiprocessor, one copying while the other one adds, and work for all of
  // them; no more blocks than that for an image, as they all blur.
  ImagePlan plan = plan_for(1, 1);
  for (int cluster = 2; cluster <= device.largest_cluster && cluster <= units; cluster *= 2) {
    const ImagePlan next = plan_for(cluster, 1);
    const int64_t data = buffers * plan.image_bytes;
    const bool idle = images.N * plan.cluster < device.count && data > device.shared_per_block / 16;
    const bool planes_only = plan.cluster && 2 * data < plan.bytes;
    if (plan.cluster && (blocks_for(plan) >= 2 || planes_only) && !idle) break;
    if (next.cluster) plan = next;
  }
  if (plan.cluster == 0) return plan;
  const int64_t blocks = blocks_for(plan), elements = HW * images.C;
  // The registers are enough for as many threads in all.
  int threads = blocks <= 2 ? 2 * device.block_threads : device.block_threads;
  if (blocks >= 6) threads = device.block_threads / 2;
  while (threads > kWarp && 2 * elements <= threads) threads /= 2;
  const bool direct = !images.channels_last && plan.cluster == 1 && images.C <= 4;
  if (!images.channels_last && !direct) {  // groups of threads where there are fewer packs
    const int64_t packs = HW / (packed ? kImagePack<T> : 1);
    for (int64_t groups = std::min({threads / packs, int64_t{8}, int64_t{plan.share}}); groups > 1;
         --groups) {
      const ImagePlan grouped = plan_for(plan.cluster, static_cast<int>(groups));
      if (blocks_for(grouped) < blocks) continue;
      plan = grouped;
      break;
    }
  }
  plan.threads = threads, plan.direct = direct;
  return plan;
}

// The deviation of a sum of squares of Range::kLeast, times coef.
template <typename A>
A root_of_least(int64_t C) {
  return std::sqrt(Range<A>::kLeast / static_cast<A>(C));
}

// Whether the images went into shared memory. `gradient`: of divisive or contrastive, from grad
// and input; else the forward, or with `adjoint` the gradient of subtractive.
template <bool gradient, typename T>
bool run_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                const LocalNormOptions& options, bool adjoint, const T* grad, const T* input,
                T* out) {
  const BlurGeometry g{images.H, images.W, kernel.size(0), kernel.size(kernel.dim() - 1),
                       kernel.dim() == 1};
  if constexpr (sizeof(opmath_t<T>) == 4) {
    // as_divisor() has no reciprocal of a value so small; the steps divide.
    constexpr float kLeast = 2.9387358770557188e-39F;  // 2^-128: 1 / kLeast is infinite
    if (options.kind != LocalNorm::kSubtractive && static_cast<float>(options.value) <= kLeast) {
      return false;
    }
  }
  const int64_t HW = images.H * images.W;
  const bool packed = (images.channels_last ? images.C : HW) % kImagePack<T> == 0 &&
                      images.C * HW % kPackSize<T> == 0 && are_aligned(grad, input, out);
  const auto kernel_with = [](auto packs) {
    if constexpr (gradient) {
      return &backward_image_kernel<decltype(packs)::value, T>;
    } else {
      return &forward_image_kernel<decltype(packs)::value, T>;
    }
  };
  auto* const kernel_of_images =
      packed ? kernel_with(std::true_type{}) : kernel_with(std::false_type{});
  const ImagePlan plan =
      plan_images<T>(multiprocessors(kernel_of_images), images, g, gradient, packed);
  if (plan.cluster == 0) return false;
  const Tensor values = kernel_in_double(kernel);
  const ImageArguments<T> a{.kind = options.kind,
                            .adjoint = adjoint,
                            .channels_last = images.channels_last,
                            .separable = g.separable,
                            .direct = plan.direct,
                            .N = images.N,
                            .C = static_cast<int>(images.C),
                            .H = static_cast<int>(g.H),
                            .W = static_cast<int>(g.W),
                            .HW = static_cast<int>(HW),
                            .taps_h = static_cast<int>(g.taps_h),
                            .taps_w = static_cast<int>(g.taps_w),
                            .cluster = plan.cluster,
                            .share = plan.share,
                            .groups = plan.groups,
                            .image_bytes = static_cast<int>(plan.image_bytes),
                            .size = static_cast<int>(images.C * HW),
                            .by_W = Divider(g.W),
                            .by_row = Divider(ceil_div(g.W, 4)),
                            .by_line = Divider(images.channels_last ? images.C : HW),
                            .at = PlaneLayout(g, gradient, plan.groups),
                            .threshold = static_cast<opmath_t<T>>(options.threshold),
                            .value = static_cast<opmath_t<T>>(options.value),
                            .root_of_least = root_of_least<opmath_t<T>>(images.C),
                            .by_channels = 1 / static_cast<opmath_t<T>>(images.C),
                            .kernel = values.const_data_ptr<double>(),
                            .grad = grad,
                            .input = input,
                            .out = out};
  launcher.run_clusters_with_shared(kernel_of_images, images.N, plan.cluster, plan.threads,
                                    plan.bytes, a);
  return true;
}

// ------------------------------------------------------------------------------------------- steps

// What repair takes of the steps.
template <typename T>
struct RepairArguments {
  using A = opmath_t<T>;
  LocalNorm kind;
  static constexpr bool adjoint = false;  // of subtractive, which repair has no part in
  int64_t N, C, HW, channel, pixel;       // distances of neighbours
  BlurGeometry geometry;
  A threshold, value, root_of_least;
  const A *flags, *weight, *flipped, *coef;
  A* planes[7];  // in, scratch, mean, d, q, grads, centred of all images
  const T* grad;
  const T* input;
  T* out;
};

// A block's work on an image in global memory, of any size: one pixel a thread at a time.
template <typename T>
struct MemoryBlock {
  using A = opmath_t<T>;
  static constexpr bool kExact = true;

  const RepairArguments<T>& a;
  int64_t image, HW;
  int thread, threads;
  Units<A>* shared;

  __device__ MemoryBlock(const RepairArguments<T>& arguments, int64_t number, Units<A>* of_block)
      : a(arguments),
        image(number),
        HW(arguments.HW),
        thread(static_cast<int>(threadIdx.x)),
        threads(kThreads),
        shared(of_block) {}

  __device__ A* plane(int k) const { return a.planes[k] + image * HW; }
  __device__ A* in() const { return plane(0); }
  __device__ A* mean() const { return plane(2); }
  __device__ A* d() const { return plane(3); }
  __device__ A* q() const { return plane(4); }
  __device__ A* grads() const { return plane(5); }
  __device__ A* centred() const { return plane(6); }
  __device__ Units<A>& units() const { return *shared; }
  __device__ A over_channels(A value) const { return value / static_cast<A>(a.C); }
  __device__ A over_coef(A value, int64_t p) const { return value / a.coef[p]; }

  template <typename Terms, typename Use>
  __device__ void reduce(const T* grad, const T* x, A scale, A scale_of_mean,
                         const Use& use) const {
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      A sums[Terms::kSums] = {};
      const A centre = mean()[p] * scale_of_mean;
#pragma unroll 1
      for (int64_t c = 0; c < a.C; ++c) {
        const int64_t i = c * a.channel + p * a.pixel;
        Terms{}(sums, Terms::kReadsGradient ? static_cast<A>(grad[i]) : A(0), static_cast<A>(x[i]),
                scale, centre);
      }
      use(p, p, sums);
    }
    __syncthreads();
  }

  // One pixel of a correlation with a kernel of taps_h x taps_w.
  __device__ A correlated(const A* from, const A* weight, int64_t taps_h, int64_t taps_w,
                          int64_t p) const {
    const int64_t H = a.geometry.H, W = a.geometry.W, h = p / W, w = p % W;
    const Taps rows = taps_inside(h, H, taps_h), columns = taps_inside(w, W, taps_w);
    A sum = A(0);
#pragma unroll 1
    for (int64_t i = rows.first; i < rows.last; ++i) {
      const A* row = from + (h + i - taps_h / 2) * W + w - taps_w / 2;
#pragma unroll 1
      for (int64_t k = columns.first; k < columns.last; ++k) {
        sum += row[k] * weight[i * taps_w + k];
      }
    }
    return sum;
  }

  template <typename Finish>
  __device__ bool blur(bool adjoint, const Finish& finish) const {
    const BlurGeometry& g = a.geometry;
    const A* weight = adjoint ? a.flipped : a.weight;
    A* const scratch = plane(1);
    bool any = false;
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      scratch[p] = correlated(in(), weight, g.separable ? 1 : g.taps_h, g.taps_w, p);
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      any |= finish(g.separable ? correlated(scratch, weight, g.taps_h, 1, p) : scratch[p], p, p);
    }
    return __syncthreads_or(any);
  }

  template <typename Value>
  __device__ void apply(const Value& value, T* out, const T* u, const T* v, const A* plane0,
                        const A* plane1, const A* plane2) const {
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      const A of[3] = {plane0[p], plane1[p], Value::kPlanes > 2 ? plane2[p] : A(0)};
#pragma unroll 1
      for (int64_t c = 0; c < a.C; ++c) {
        const int64_t i = c * a.channel + p * a.pixel;
        out[i] = static_cast<T>(value(static_cast<A>(u[i]),
                                      Value::kReadsBoth ? static_cast<A>(v[i]) : A(0), of[0], of[1],
                                      of[2]));
      }
    }
  }
};

// Images that the steps before found out of range, a block each, from their input on.
template <bool kGradient, typename T>
__global__ void __launch_bounds__(kThreads)
    repair_kernel(const __grid_constant__ RepairArguments<T> a) {
  __shared__ Units<opmath_t<T>> units;
  for (int64_t image = blockIdx.x; image < a.N; image += gridDim.x) {
    if (a.flags[image] == opmath_t<T>(0)) continue;
    __syncthreads();  // before the units of the image before are overwritten
    if (threadIdx.x == 0) units = {};
    const MemoryBlock<T> block(a, image, &units);
    for (int64_t p = threadIdx.x; p < a.HW && a.kind == LocalNorm::kDivisive; p += kThreads) {
      block.mean()[p] = 0;
      if constexpr (kGradient) block.grads()[p] = 0;
    }
    __syncthreads();
    const int64_t first = image * a.C * a.HW;
    if constexpr (kGradient) {
      backward_image(block, a.grad + first, a.input + first, a.out + first);
    } else {
      forward_image(block, a.input + first, a.out + first);
    }
  }
}

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
        kind_(options.kind),
        threshold_(static_cast<A>(options.threshold)),
        value_(static_cast<A>(options.value)),
        channels(static_cast<A>(images.C)) {
    const Tensor values = kernel_in_double(kernel);
    const int64_t taps = values.numel();
    workspace_ = new_tensor(images.data, {2 * taps + HW_ + planes * N_ * HW_ + N_},
                            type_to_compute_in(images.data));
    weight_[0] = workspace_.mutable_data_ptr<A>();
    weight_[1] = weight_[0] + taps;
    coef = weight_[1] + taps;
    flags_ = coef + HW_ + planes * N_ * HW_;
    launcher_.run_over(prepare_kernel<A>, HW_, taps, blur_, N_, values.const_data_ptr<double>(),
                       weight_[0], weight_[1], coef, flags_);
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
      constexpr int n = kImagePack<T>;
      const int across = kThreads / std::min(lanes_for(C_), kThreads / kWarp);
      if (HW_ % n == 0 && are_aligned(r.grad, r.input)) {
        launcher_.run(reduce_planes_kernel<n, Terms, T>, N_ * HW_ / n, across, across, r);
      } else {
        launcher_.run(reduce_planes_kernel<1, Terms, T>, N_ * HW_, across, across, r);
      }
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

  // What becomes of a blurred sum of squares; with a q, for the gradient.
  FinishDivisor<A> to_divisor(A* d, A* q = nullptr) const {
    return {channels,
            threshold_,
            value_,
            root_of_least<A>(C_),
            HW_,
            coef,
            kLeavesRange<T> ? flags_ : nullptr,
            d,
            q};
  }

  // After that: images that it found out of range, once more. The planes are as in RepairArguments.
  template <bool kGradient>
  void repair(const std::array<A*, 7>& planes, const T* grad, const T* input, T* out) const {
    if constexpr (kLeavesRange<T>) {
      RepairArguments<T> a{.kind = kind_,
                           .N = N_,
                           .C = C_,
                           .HW = HW_,
                           .channel = channels_last_ ? 1 : HW_,
                           .pixel = channels_last_ ? C_ : 1,
                           .geometry = blur_,
                           .threshold = threshold_,
                           .value = value_,
                           .root_of_least = root_of_least<A>(C_),
                           .flags = flags_,
                           .weight = weight_[0],
                           .flipped = weight_[1],
                           .coef = coef,
                           .planes = {},
                           .grad = grad,
                           .input = input,
                           .out = out};
      std::copy(planes.begin(), planes.end(), a.planes);
      launcher_.run_blocks(repair_kernel<kGradient, T>, N_, kThreads, a);
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
  A* flags_;          // of images: not 0 where they are out of range
  LocalNorm kind_;
  A threshold_, value_;

 public:
  A channels;
  A* coef;
};

template <typename T, typename A = opmath_t<T>>
void forward_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                    const LocalNormOptions& options, const T* x, T* y) {
  const Problem<T> problem(launcher, images, kernel, options, 4);
  A *sum = problem.plane(0), *scratch = problem.plane(1), *d = problem.plane(2);
  A* const plane_of_mean = problem.plane(3);
  A* mean = options.kind == LocalNorm::kDivisive ? nullptr : plane_of_mean;
  if (mean) {
    problem.template reduce<SumOfInput>({.input = x, .sums = {sum}});
    problem.blur(sum, scratch, false, FinishMean<A>{problem.channels, problem.coef, mean});
  }
  if (options.kind == LocalNorm::kSubtractive) {
    problem.template apply<Subtract>(x, x, {.mean = mean, .descending = true}, y);
    return;
  }
  // Every pass begins where the one before ended.
  const bool second = mean != nullptr;
  problem.template reduce<SumOfSquares>(
      {.input = x, .mean = mean, .sums = {sum}, .descending = second});
  problem.blur(sum, scratch, false, problem.to_divisor(d));
  problem.template apply<Divide>(x, x, {.mean = mean, .d = d, .descending = !second}, y);
  problem.template repair<false>({sum, scratch, plane_of_mean, d}, nullptr, x, y);
}

template <typename T, typename A = opmath_t<T>>
void subtractive_backward_images(const Launcher& launcher, const Images& images,
                                 const Tensor& kernel, const LocalNormOptions& options, const T* g,
                                 T* gx) {
  const Problem<T> problem(launcher, images, kernel, options, 3);
  A *sum = problem.plane(0), *scratch = problem.plane(1), *t = problem.plane(2);
  problem.template reduce<SumOfInput>({.input = g, .coef = problem.coef, .sums = {sum}});
  problem.blur(sum, scratch, true, FinishAdjointMean<A>{problem.channels, t});
  problem.template apply<Subtract>(g, g, {.mean = t, .descending = true}, gx);
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
  problem.template reduce<SumsOfGradient>({.grad = g,
                                           .input = x,
                                           .mean = mean,
                                           .sums = {q, squares, grads},
                                           .descending = contrastive});
  problem.blur(squares, scratch, false, problem.to_divisor(d, q));
  problem.blur(q, scratch, true,
               FinishB<A>{problem.channels, problem.coef, d, grads, mean, b, sum});
  if (contrastive) problem.blur(sum, scratch, true, FinishAdjointMean<A>{problem.channels, t});
  problem.template apply<DivideGradient>(
      g, x, {.mean = mean, .d = d, .b = b, .t = t, .descending = !contrastive}, gx);
  A* const plane_of_mean = contrastive ? mean : b;
  problem.template repair<true>({squares, scratch, plane_of_mean, d, q, grads, sum}, g, x, gx);
}

// ------------------------------------------------------------------------------------- operators

Tensor forward(const char* op, const Tensor& input, const Tensor& kernel,
               const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options, input.scalar_type());
  const Launcher launcher(input);
  Tensor output = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (output.numel() == 0) return;
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    if (run_images<false, T>(launcher, x, kernel, options, false, in, in, out)) return;
    forward_images(launcher, x, kernel, options, in, out);
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Tensor& input,
                const Tensor& kernel, const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options, input.scalar_type());
  check_like(op, "grad_output", grad_output, "input", input);
  const Tensor grad = dense(grad_output, x.channels_last);
  const Launcher launcher(input);
  Tensor grad_input = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (grad_input.numel() == 0) return;
    const T* go = grad.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    if (options.kind == LocalNorm::kSubtractive) {
      if (run_images<false, T>(launcher, x, kernel, options, true, go, go, gi)) return;
      subtractive_backward_images(launcher, x, kernel, options, go, gi);
    } else {
      const T* in = x.data.const_data_ptr<T>();
      if (run_images<true, T>(launcher, x, kernel, options, false, go, in, gi)) return;
      divisive_backward_images(launcher, x, kernel, options, go, in, gi);
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
