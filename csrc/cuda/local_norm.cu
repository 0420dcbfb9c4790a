// Local normalization on CUDA.
//
// Bound by memory: subtractive reads the input twice (for the sum over channels, then to subtract)
// and writes it once; divisive and contrastive read it once more for the squares. Between those
// passes everything happens on planes, one value a pixel, 1/C of the data. The steps are kernels of
// their own, so that images and kernels may have any size:
//   prepare   the kernel divided by its sum, and the coef plane
//   reduce    sums over channels, several in one pass over the data
//   blur      rows, then columns (or the 2-D kernel at once); the last step also finishes the plane
//             (divides by coef, takes the root, applies the threshold, ...)
//   apply     from planes back to every channel
//
// A kernel whose sum is 0 or not finite gives infinities and NaN: to refuse it, as the CPU does,
// the host would have to wait for the device.

#include "../local_norm.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

// ---------------------------------------------------------------------------------------- prepare

// weight = values / sum, as they are and flipped (the adjoint's); float64 until the last rounding.
// One block: kernels have few taps. Partial sums by thread, then a tree, so the order is fixed.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(int64_t taps, const double* __restrict__ values, A* __restrict__ weight,
                     A* __restrict__ flipped) {
  __shared__ double partial[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) sum += values[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  const double total = partial[0];
  for (int64_t i = threadIdx.x; i < taps; i += kThreads) {
    const A normalised = static_cast<A>(values[i] / total);
    weight[i] = normalised;
    flipped[taps - 1 - i] = normalised;
  }
}

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

// The blur of a plane of ones. A thread computes a pixel; the taps come from L1, one address for
// all threads of a warp.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    coefficient_kernel(BlurGeometry g, const A* __restrict__ weight, A* __restrict__ coef) {
  for (int64_t i = first_item<int64_t>(); i < g.H * g.W; i += item_stride<int64_t>()) {
    const Taps rows = taps_inside(i / g.W, g.H, g.taps_h);
    const Taps columns = taps_inside(i % g.W, g.W, g.taps_w);
    A sum = A(0);
    if (g.separable) {
      A row = A(0);
      for (int64_t k = columns.first; k < columns.last; ++k) row += weight[k];
      for (int64_t k = rows.first; k < rows.last; ++k) sum += row * weight[k];
    } else {
      for (int64_t kh = rows.first; kh < rows.last; ++kh) {
        for (int64_t kw = columns.first; kw < columns.last; ++kw) {
          sum += weight[kh * g.taps_w + kw];
        }
      }
    }
    coef[i] = sum;
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
    launcher_.run(normalise_kernel<A>, 1, 1, kThreads, taps, values.const_data_ptr<double>(),
                  weight_[0], weight_[1]);
    launcher_.run_over(coefficient_kernel<A>, HW_, blur_, static_cast<const A*>(weight_[0]), coef);
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
    if (blur_.separable) {
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
    if (options.kind == LocalNorm::kSubtractive) {
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
