// Local normalization step by step, of images of any size.

#include "local_norm.cuh"

#include <array>

namespace mnist_ops::cuda {
namespace {

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

}  // namespace

template <typename T>
void forward_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                    const LocalNormOptions& options, const T* x, T* y) {
  using A = opmath_t<T>;
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

template <typename T>
void subtractive_backward_images(const Launcher& launcher, const Images& images,
                                 const Tensor& kernel, const LocalNormOptions& options, const T* g,
                                 T* gx) {
  using A = opmath_t<T>;
  const Problem<T> problem(launcher, images, kernel, options, 3);
  A *sum = problem.plane(0), *scratch = problem.plane(1), *t = problem.plane(2);
  problem.template reduce<SumOfInput>({.input = g, .coef = problem.coef, .sums = {sum}});
  problem.blur(sum, scratch, true, FinishAdjointMean<A>{problem.channels, t});
  problem.template apply<Subtract>(g, g, {.mean = t, .descending = true}, gx);
}

// Divisive and contrastive. s is computed again from the input, in the pass over it that q needs
// anyway; nothing was saved by the forward.
template <typename T>
void divisive_backward_images(const Launcher& launcher, const Images& images, const Tensor& kernel,
                              const LocalNormOptions& options, const T* g, const T* x, T* gx) {
  const bool contrastive = options.kind == LocalNorm::kContrastive;
  using A = opmath_t<T>;
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

#define MNIST_OPS_STEPS(T)                                                                    \
  template void forward_images<T>(const Launcher&, const Images&, const Tensor&,              \
                                  const LocalNormOptions&, const T*, T*);                     \
  template void subtractive_backward_images<T>(const Launcher&, const Images&, const Tensor&, \
                                               const LocalNormOptions&, const T*, T*);        \
  template void divisive_backward_images<T>(const Launcher&, const Images&, const Tensor&,    \
                                            const LocalNormOptions&, const T*, const T*, T*);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_STEPS)

}  // namespace mnist_ops::cuda
