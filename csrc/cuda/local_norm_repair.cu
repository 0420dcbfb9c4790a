// Local normalization of images whose squares left the range of the type that computes: a block
// each, in global memory, from the input on.

#include "local_norm.cuh"

namespace mnist_ops::cuda {
namespace {

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

}  // namespace

template <typename T>
void repair(const Launcher& launcher, const Steps<T>& steps) {
  launcher.run_blocks(repair_kernel<T>, steps.N, kThreads, steps);
}

template void repair<double>(const Launcher&, const Steps<double>&);
template void repair<float>(const Launcher&, const Steps<float>&);
template void repair<BFloat16>(const Launcher&, const Steps<BFloat16>&);

}  // namespace mnist_ops::cuda
