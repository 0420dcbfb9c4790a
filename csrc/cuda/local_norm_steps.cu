// Local normalization step by step, of images of any size: each step is a kernel for all images.
//   prepare   the kernel divided by its sum, and the coef plane
//   reduce    sums over channels, several in one pass over the data
//   blur      rows, then columns; 2-D kernels at once. The last launch finishes the plane: divides
//             by coef, takes the root, applies the threshold, ...
//   apply     from planes back to every channel
//   repair    images whose squares left the range once more, a block each
// Launches: subtractive 5 forward and backward; divisive 6 and 8; contrastive 9 and 13, repair
// among them, which float16 does not need.
//
// The passes over the data have indices in 64 bits and divide in 32 where the numbers allow it
// (quotient()): memory is what they wait for. What planes are for is an argument, not a kernel of
// its own: they are 1/C of the data.

#include "local_norm.cuh"

namespace mnist_ops::cuda {

// What the steps work on: planes of all images in global memory, N * H * W numbers each.
template <typename A>
struct Planes {
  int64_t N, C, HW;
  BlurGeometry geometry;
  LocalNorm kind;
  A threshold, value, root_of_least;
  A *weight, *flipped;  // of the kernel
  A* coef;              // of one image
  A* flags;             // of images: not 0 where they are out of range; null where none is ever
  A* in;                // a sum over channels, to be blurred
  A* scratch;           // blurred along rows
  A *mean, *d;          // what is subtracted, what divides
  A *q, *grads;         // of the gradient: sums over channels of grad * x and of grad
  A *b, *centred, *t;   // of the gradient: see finish()
};

template <typename T>
struct Steps : Planes<opmath_t<T>> {
  static constexpr bool adjoint = false;  // of subtractive: repair has no part in it
  bool channels_last;
  const T* grad;  // null in the forward
  const T* input;
  T* out;

  MNIST_OPS_HD int64_t stride_c() const { return channels_last ? 1 : this->HW; }
  MNIST_OPS_HD int64_t stride_pixel() const { return channels_last ? this->C : 1; }
};

namespace {

// Every block adds up the kernel for itself and leaves the same weights, so that one launch does.
// For coef a thread computes a pixel; the taps come from L1, one address for all threads of a warp.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Planes<A> s, const double* __restrict__ values) {
  __shared__ double shared[kThreads / kWarp];
  const BlurGeometry& g = s.geometry;
  const int64_t taps = g.separable ? g.taps_w : g.taps_h * g.taps_w;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) sum += values[i];
  sum = block_sum<kThreads>(sum, shared);
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) {
    s.weight[i] = s.flipped[taps - 1 - i] = static_cast<A>(values[i] / sum);
  }
  __syncthreads();
  for (int64_t i = first_item<int64_t>(); i < s.HW; i += item_stride<int64_t>()) {
    s.coef[i] = coefficient_at(g, s.weight, g.taps_w, i);
  }
  if (s.flags == nullptr) return;
  for (int64_t i = first_item<int64_t>(); i < s.N; i += item_stride<int64_t>()) s.flags[i] = A(0);
}

// ----------------------------------------------------------------------------------------- reduce

// What a pass adds up over the channels of a pixel, for the plane in; the gradient's pass adds up
// for q and grads, too. kQuotient: the input (for the subtractive gradient), divided by coef.
enum class Sums { kInput, kQuotient, kSquares, kGradient };

// The number of this block, in the order in which they start or in the other one: what the pass
// before read last is in L2.
__device__ __forceinline__ int64_t block_number(bool descending) {
  return descending ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// Adds up the channels first, first + step, ... of n neighbours in memory of which the first
// element is i: pixels of one channel, or the channels of one pixel.
template <bool kGradient, int n, typename T, typename A>
__device__ __forceinline__ void add_channels(const Steps<T>& s, bool squares, int64_t i,
                                             int64_t first, int64_t step, const A (&mean)[n],
                                             A (&sums)[n][3]) {
  const int64_t stride = s.stride_c();
#pragma unroll 4
  for (int64_t c = first; c < s.C; c += step) {
    const Pack<T, n> xs = load_pack<n>(s.input + i + c * stride);
    const Pack<T, n> gs = kGradient ? load_pack<n>(s.grad + i + c * stride) : xs;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A z = static_cast<A>(xs.values[j]) - mean[j];
      if constexpr (kGradient) {
        const A grad = static_cast<A>(gs.values[j]);
        sums[j][0] += z * z;
        sums[j][1] += grad * z;
        sums[j][2] += grad;
      } else {
        sums[j][0] += squares ? z * z : z;
      }
    }
  }
}

template <int n, typename T, typename A>
__device__ __forceinline__ void add_pixels(const Steps<T>& s, Sums what, int64_t pixel, int64_t i,
                                           int64_t first, int64_t step, A (&sums)[n][3]) {
  const bool centred =
      s.kind == LocalNorm::kContrastive && (what == Sums::kSquares || what == Sums::kGradient);
  A mean[n];
#pragma unroll
  for (int j = 0; j < n; ++j) mean[j] = centred ? s.mean[pixel + j] : A(0);
  if (what == Sums::kGradient) {
    add_channels<true>(s, true, i, first, step, mean, sums);
  } else {
    add_channels<false>(s, what == Sums::kSquares, i, first, step, mean, sums);
  }
}

template <typename T, typename A>
__device__ __forceinline__ void write_sums(const Steps<T>& s, Sums what, int64_t pixel,
                                           const A (&sums)[3]) {
  s.in[pixel] = what == Sums::kQuotient ? sums[0] / s.coef[pixel % s.HW] : sums[0];
  // The contrastive gradient needs the input's sum once more.
  if (what == Sums::kInput && s.grad) s.centred[pixel] = sums[0];
  if (what == Sums::kGradient) s.q[pixel] = sums[1], s.grads[pixel] = sums[2];
}

// NCHW: neighbouring threads take neighbouring packs of n pixels, so that each channel is read
// coalesced; n divides H * W. blockDim.y threads share the channels of a pack; their sums are added
// in order of threadIdx.y.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_planes_kernel(const __grid_constant__ Steps<T> s, Sums what, bool descending) {
  using A = opmath_t<T>;
  __shared__ A partial[3][n][kThreads];
  const int64_t packs = s.N * s.HW / n, groups = blockDim.y;
  const int kinds = what == Sums::kGradient ? 3 : 1;
  const unsigned slot = threadIdx.y * blockDim.x + threadIdx.x;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = block_number(descending) * blockDim.x; base < packs;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pixel = (base + threadIdx.x) * n;
    const bool inside = base + threadIdx.x < packs;
    A sums[n][3] = {};
    if (inside) {
      const int64_t image = pixel / s.HW;
      add_pixels(s, what, pixel, pixel + image * (s.C - 1) * s.HW, threadIdx.y, groups, sums);
    }
    if (groups > 1) {
#pragma unroll
      for (int k = 0; k < 3; ++k) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (k < kinds) partial[k][j][slot] = sums[j][k];
        }
      }
      __syncthreads();
      if (threadIdx.y == 0) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
#pragma unroll
          for (int j = 0; j < n; ++j) {
            for (unsigned y = 1; k < kinds && y < groups; ++y) {
              sums[j][k] += partial[k][j][y * blockDim.x + threadIdx.x];
            }
          }
        }
      }
      __syncthreads();  // before the next turn overwrites the partial sums
    }
    if (threadIdx.y == 0 && inside) {
#pragma unroll
      for (int j = 0; j < n; ++j) write_sums(s, what, pixel + j, sums[j]);
    }
  }
}

// NHWC: `lanes` threads of a warp take the channels of one pixel, which lie side by side.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_channels_kernel(const __grid_constant__ Steps<T> s, Sums what, bool descending,
                           int lanes) {
  using A = opmath_t<T>;
  const int64_t pixels = s.N * s.HW;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = block_number(descending) * per_block; base < pixels;
       base += gridDim.x * per_block) {
    const int64_t pixel = base + threadIdx.x / static_cast<unsigned>(lanes);
    A sums[1][3] = {};
    if (pixel < pixels) add_pixels(s, what, pixel, pixel * s.C, lane, lanes, sums);
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[0][k] = lane_sum(sums[0][k], lanes);
    if (lane == 0 && pixel < pixels) write_sums(s, what, pixel, sums[0]);
  }
}

// ------------------------------------------------------------------------------------------- blur

// What becomes of a blurred plane.
//   kRows     nothing yet: the columns are still to come
//   kMean     mean = est(x) / coef
//   kDivisor  d; for the gradient also h, in the place of q. Images out of range get a flag
//   kShare    b = (*)^T(h) / C; for contrastive also the plane that the subtractive gradient then
//             blurs, in the place of the sum of the input: the sum over channels of the divisive
//             gradient, divided by coef
//   kAdjoint  t = (*)^T(sum / coef) / C, the subtractive gradient's
enum class Finish { kRows, kMean, kDivisor, kShare, kAdjoint };

// Of one pixel: `pixel` is its index among all images', `at` within its image.
template <typename A>
__device__ __forceinline__ void finish(const Planes<A>& s, Finish step, A blurred, int64_t pixel,
                                       int64_t at) {
  const A channels = static_cast<A>(s.C), coef = s.coef[at];
  if (step == Finish::kRows) {
    s.scratch[pixel] = blurred;
  } else if (step == Finish::kMean) {
    s.mean[pixel] = local_mean(blurred, channels, coef);
  } else if (step == Finish::kDivisor) {
    const A deviation = local_deviation(blurred, channels, coef);
    if (s.q) s.q[pixel] = divisor_gradient(s.q[pixel], deviation, coef, s.threshold);
    s.d[pixel] = divisor(deviation, s.threshold, s.value);
    if (s.flags && out_of_range(blurred, s.root_of_least / coef, s.threshold)) {
      s.flags[pixel / s.HW] = A(1);
    }
  } else if (step == Finish::kShare) {
    const A share = blurred / channels;
    s.b[pixel] = share;
    if (s.kind == LocalNorm::kContrastive) {
      const A centred = s.centred[pixel] - channels * s.mean[pixel];
      s.centred[pixel] = (s.grads[pixel] / s.d[pixel] - centred * share) / coef;
    }
  } else {
    s.t[pixel] = blurred / channels;
  }
}

// One pixel a thread; a pixel's neighbours were read by neighbouring threads and come from cache,
// as do the taps. `in` is none of the planes that finish() writes.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    blur_kernel(const __grid_constant__ Planes<A> s, Finish step, const A* __restrict__ in,
                const A* __restrict__ weight, int64_t taps_h, int64_t taps_w) {
  for (int64_t i = first_item<int64_t>(); i < s.N * s.HW; i += item_stride<int64_t>()) {
    const int64_t image = quotient(i, s.HW), at = i - image * s.HW;
    const A* plane = in + image * s.HW;
    finish(s, step, correlated(plane, s.geometry, weight, taps_h, taps_w, at), i, at);
  }
}

// ------------------------------------------------------------------------------------------ apply

// The numbers of a plane for n neighbours in memory, of which the first belongs to `pixel`: n
// pixels or, in NHWC, one. `otherwise` where there is no such plane.
template <int n, typename T, typename A>
__device__ __forceinline__ void of_neighbours(const Steps<T>& s, const A* plane, int64_t pixel,
                                              A otherwise, A (&values)[n]) {
  constexpr int m = n == 1 ? 1 : kShortPack<T>;
#pragma unroll
  for (int i = 0; i < n; i += m) {
    Pack<A, m> pack;
    if (plane && !s.channels_last) pack = load_pack<m>(plane + pixel + i);
    const A of_pixel = plane && s.channels_last ? plane[pixel] : otherwise;
#pragma unroll
    for (int j = 0; j < m; ++j) {
      values[i + j] = plane && !s.channels_last ? pack.values[j] : of_pixel;
    }
  }
}

// Every element of the output in the order of memory, n elements a thread: n > 1 only where a pack
// stays within a row of pixels (NCHW: n divides H * W) or within a pixel (NHWC: n divides C).
template <int n, typename T>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ Steps<T> s, bool descending) {
  using A = opmath_t<T>;
  const int64_t packs = s.N * s.C * s.HW / n;
  const A* const mean = s.kind == LocalNorm::kDivisive ? nullptr : s.mean;
  const A* const t = s.kind == LocalNorm::kContrastive ? s.t : nullptr;
  for (int64_t pack = block_number(descending) * kThreads + threadIdx.x; pack < packs;
       pack += item_stride<int64_t>()) {
    const int64_t i = pack * n;
    int64_t pixel = 0;
    if (s.channels_last) {
      pixel = quotient(i, s.C);
    } else {
      const int64_t plane = quotient(i, s.HW);
      pixel = i - (plane - quotient(plane, s.C)) * s.HW;
    }
    const Pack<T, n> xs = load_pack<n>(s.input + i);
    A means[n], result[n];
    of_neighbours(s, mean, pixel, A(0), means);
#pragma unroll
    for (int j = 0; j < n; ++j) result[j] = static_cast<A>(xs.values[j]) - means[j];
    if (s.kind != LocalNorm::kSubtractive) {
      A d[n];
      of_neighbours(s, s.d, pixel, A(1), d);
      if (s.grad) {
        const Pack<T, n> gs = load_pack<n>(s.grad + i);
        A b[n], ts[n];
        of_neighbours(s, s.b, pixel, A(0), b);
        of_neighbours(s, t, pixel, A(0), ts);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          result[j] = static_cast<A>(gs.values[j]) / d[j] - result[j] * b[j] - ts[j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) result[j] /= d[j];
      }
    }
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) to.values[j] = static_cast<T>(result[j]);
    store_pack(s.out + i, to);
  }
}

// ----------------------------------------------------------------------------------------- repair

// A block's work on an image in global memory, of any size: one pixel a thread at a time.
template <typename T>
struct MemoryBlock {
  using Element = T;
  using Data = const T*;
  using A = opmath_t<T>;
  static constexpr bool kExact = true;

  static constexpr int threads = kThreads;

  const Steps<T>& a;
  int64_t image, HW;
  Units<A>* shared;
  int thread = static_cast<int>(threadIdx.x);

  __device__ A* in() const { return a.in + image * HW; }
  __device__ A* mean() const { return a.mean + image * HW; }
  __device__ A* d() const { return a.d + image * HW; }
  __device__ A* q() const { return a.q + image * HW; }
  __device__ A* grads() const { return a.grads + image * HW; }
  __device__ A* centred() const { return a.centred + image * HW; }
  __device__ Units<A>& units() const { return *shared; }
  __device__ A over_channels(A value) const { return value / static_cast<A>(a.C); }
  __device__ A over_coef(A value, int64_t p) const { return value / a.coef[p]; }

  template <bool gradient, typename Use>
  __device__ void reduce(const T* grad, const T* x, const Use& use) const {
    const A scale = units().lift * units().part;
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      const auto each = [&](const auto& body) {
#pragma unroll 1
        for (int64_t c = 0; c < a.C; ++c) {
          const int64_t i = c * a.stride_c() + p * a.stride_pixel();
          body(gradient ? static_cast<A>(grad[i]) : A(0), static_cast<A>(x[i]) * scale);
        }
      };
      A total = A(0);
      each([&](A, A z) { total += z; });
      const A mean = a.kind == LocalNorm::kContrastive ? over_channels(total) : A(0);
      ChannelSums<gradient, A> sums;
      each([&](A g, A z) { sums.template add_one<LocalNorm::kContrastive>(g, z - mean); });
      sums.of[kTotal] = total;
      use(p, p, sums);
    }
    __syncthreads();
  }

  template <typename Finish>
  __device__ bool blur(bool adjoint, const Finish& finish) const {
    const BlurGeometry& g = a.geometry;
    const A* weight = adjoint ? a.flipped : a.weight;
    A* const scratch = a.scratch + image * HW;
    bool any = false;
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      scratch[p] = correlated(in(), g, weight, g.separable ? 1 : g.taps_h, g.taps_w, p);
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      any |=
          finish(g.separable ? correlated(scratch, g, weight, g.taps_h, 1, p) : scratch[p], p, p);
    }
    return __syncthreads_or(any);
  }

  template <bool gradient, bool kExact>
  __device__ void apply(const Result<gradient, kExact, A>& result, const T* grad, const T* x,
                        const A* plane0, const A* plane1, const A* plane2) const {
    T* const out = a.out + image * a.C * HW;
#pragma unroll 1
    for (int64_t p = thread; p < HW; p += threads) {
      const A offset = gradient ? plane2[p] : A(0);
#pragma unroll 1
      for (int64_t c = 0; c < a.C; ++c) {
        const int64_t i = c * a.stride_c() + p * a.stride_pixel();
        out[i] = static_cast<T>(result(gradient ? static_cast<A>(grad[i]) : A(0),
                                       static_cast<A>(x[i]), plane0[p], plane1[p], offset));
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) repair_kernel(const __grid_constant__ Steps<T> s) {
  __shared__ Units<opmath_t<T>> units;
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    if (s.flags[image] == opmath_t<T>(0)) continue;
    __syncthreads();  // before the units of the image before are overwritten
    if (threadIdx.x == 0) units = {};
    const MemoryBlock<T> block{s, image, s.HW, &units};
    for (int64_t p = threadIdx.x; p < s.HW && s.kind == LocalNorm::kDivisive; p += kThreads) {
      block.mean()[p] = 0;
    }
    __syncthreads();
    const int64_t first = image * s.C * s.HW;
    const T *x = s.input + first, *g = s.grad ? s.grad + first : nullptr;
    if (g) {
      normalize_image<true>(block, g, x);
    } else {
      normalize_image<false>(block, g, x);
    }
  }
}

// --------------------------------------------------------------------------------------- launches

// The steps on one batch of images, with the planes that they need.
template <typename T>
struct Problem {
  using A = opmath_t<T>;

  explicit Problem(const NormCall<T>& call) : launcher(call.launcher) {
    const Images& images = call.images;
    const LocalNormOptions& options = call.options;
    const int64_t HW = images.H * images.W, pixels = images.N * HW;
    const Tensor values = kernel_in_double(call.kernel);
    const int64_t taps = round_up(values.numel(), 4);  // what follows begins with a pack
    const bool divides = options.kind != LocalNorm::kSubtractive;
    const bool gradient = call.grad != nullptr;
    const bool both = gradient && options.kind == LocalNorm::kContrastive;
    const int64_t planes = both ? 9 : gradient ? 7 : divides ? 4 : 3;
    workspace = new_tensor(images.data, {2 * taps + HW + planes * pixels + images.N},
                           type_to_compute_in(images.data));
    A* end = workspace.mutable_data_ptr<A>();
    const auto take = [&](int64_t count, bool needed = true) {
      A* const begin = end;
      if (needed) end += count;
      return needed ? begin : nullptr;
    };
    s.N = images.N, s.C = images.C, s.HW = HW;
    s.geometry = call.geometry();
    s.kind = options.kind;
    s.threshold = static_cast<A>(options.threshold), s.value = static_cast<A>(options.value);
    s.root_of_least = root_of_least<A>(images.C);
    s.weight = take(taps), s.flipped = take(taps), s.coef = take(HW);
    s.in = take(pixels), s.scratch = take(pixels), s.mean = take(pixels);
    s.d = take(pixels, divides);
    s.q = take(pixels, gradient), s.grads = take(pixels, gradient);
    s.b = take(pixels, gradient);
    s.centred = take(pixels, both);
    s.t = both ? take(pixels) : s.mean;  // the subtractive gradient has no mean
    s.flags = take(images.N, divides && kLeavesRange<T>);
    s.channels_last = images.channels_last;
    s.grad = call.grad, s.input = call.input, s.out = call.out;
    launcher.run_over(prepare_kernel<A>, std::max(HW, images.N), s,
                      values.const_data_ptr<double>());
  }

  // Every pass over the data begins where the one before ended.
  void reduce(Sums what) {
    const int64_t pixels = s.N * s.HW;
    if (s.channels_last) {
      const int lanes = lanes_for(s.C);
      launcher.run(reduce_channels_kernel<T>, pixels, kThreads / lanes, kThreads, s, what,
                   descending, lanes);
    } else {
      // Whole warps side by side, and up to eight of them for the channels.
      constexpr int n = kShortPack<T>;
      const int across = kThreads / std::min(lanes_for(s.C), kThreads / kWarp);
      const bool packs = s.HW % n == 0 && are_aligned(s.grad, s.input);
      launcher.run(packs ? reduce_planes_kernel<n, T> : reduce_planes_kernel<1, T>,
                   packs ? pixels / n : pixels, across, across, s, what, descending);
    }
    descending = !descending;
  }

  // Blurs a plane and finishes it; adjoint: with the flipped kernel.
  void blur(const A* in, bool adjoint, Finish step) const {
    const BlurGeometry& g = s.geometry;
    const int64_t pixels = s.N * s.HW;
    const A* weight = adjoint ? s.flipped : s.weight;
    const int64_t one = 1;
    if (g.separable) {
      launcher.run_over(blur_kernel<A>, pixels, s, Finish::kRows, in, weight, one, g.taps_w);
      in = s.scratch;
    }
    launcher.run_over(blur_kernel<A>, pixels, s, step, in, weight, g.taps_h,
                      g.separable ? one : g.taps_w);
  }

  void apply() const {
    constexpr int n = kPackSize<T>;
    const int64_t size = s.N * s.C * s.HW;
    const bool packs = (s.channels_last ? s.C : s.HW) % n == 0 &&
                       are_aligned(s.grad, s.input, static_cast<const T*>(s.out));
    launcher.run_over(packs ? apply_kernel<n, T> : apply_kernel<1, T>, packs ? size / n : size, s,
                      descending);
    if constexpr (kLeavesRange<T>) {
      if (s.flags) launcher.run_blocks(repair_kernel<T>, s.N, kThreads, s);
    }
  }

  const Launcher& launcher;
  Tensor workspace;
  Steps<T> s{};  // kernels that need no images take its planes alone
  bool descending = false;
};

}  // namespace

// For the gradient s is computed again from the input, in the pass over it that q needs anyway;
// nothing was saved by the forward.
template <typename T>
void run_steps(const NormCall<T>& call) {
  Problem<T> problem(call);
  const Steps<T>& s = problem.s;
  if (call.adjoint) {
    problem.reduce(Sums::kQuotient);
    problem.blur(s.in, true, Finish::kAdjoint);
  } else if (s.kind != LocalNorm::kDivisive) {
    problem.reduce(Sums::kInput);
    problem.blur(s.in, false, Finish::kMean);
  }
  if (s.kind != LocalNorm::kSubtractive) {
    problem.reduce(call.grad ? Sums::kGradient : Sums::kSquares);
    problem.blur(s.in, false, Finish::kDivisor);
  }
  if (call.grad) {
    problem.blur(s.q, true, Finish::kShare);
    if (s.kind == LocalNorm::kContrastive) problem.blur(s.centred, true, Finish::kAdjoint);
  }
  problem.apply();
}

#define MNIST_OPS_STEPS(T) template void run_steps<T>(const NormCall<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_STEPS)

}  // namespace mnist_ops::cuda
