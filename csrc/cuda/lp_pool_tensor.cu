// LP pooling with a p for each channel on CUDA. Powers and logarithms are its bound.
//
// In NCHW a few neighbouring threads of a warp share a large window, such as the whole map, whose
// pixels are neighbours in memory; elsewhere a thread takes one. Backward, one launch leaves m or y
// and the gradient's share of each window, and its part of p's gradient; the second gathers the
// gradient of each element from the windows over it, in a fixed order; two more add the parts of
// each channel, in stretches whose number depends on the shape alone. No atomics.

#include "../lp_pool_tensor.h"

#include "reduce.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {
namespace {

// Of lanes neighbouring threads; NaN if one of them has it.
template <typename A>
__device__ __forceinline__ A lane_largest(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kWholeWarp, value, distance);
    value = other > value || other != other ? other : value;
  }
  return value;
}

// What a window is made of, found by `lanes` threads together.
template <bool for_gradient, typename T, typename I, typename A = opmath_t<T>>
__device__ __forceinline__ PowerWindow<A> measured(const T* plane, const PoolGeometryOf<I>& g, I oh,
                                                   I ow, A p, bool average, int lane, int lanes) {
  const I top = g.first_row(oh), left = g.first_column(ow);
  const I width = g.last_column(ow) - left, taps = (g.last_row(oh) - top) * width;
  const auto size_of = [&](I tap) {
    const I row = tap / width;
    const I offset = (top + row) * g.in_h + (left + tap - row * width) * g.in_w;
    return magnitude(static_cast<A>(plane[offset]));
  };
  A largest = A(0);
  for (I tap = lane; tap < taps; tap += lanes) {
    const A size = size_of(tap);
    if (size > largest || size != size) largest = size;  // nothing is above NaN: it stays
  }
  largest = lane_largest(largest, lanes);
  BlockSum<A> powers;
  for (I tap = lane; tap < taps; tap += lanes) {
    powers.add(elementary::power(elementary::Quotient<A>(size_of(tap), largest), p));
  }
  PowerWindow<A> window{largest, lane_sum(powers.value(), lanes),
                        average ? static_cast<A>(taps) : A(1), p};
  if (for_gradient) {
    const A shift = window.shift(), scale = window.scale();
    BlockSum<A> divergences;
    for (I tap = lane; tap < taps; tap += lanes) {
      const elementary::Quotient<A> s(size_of(tap), largest);
      divergences.add(divergence(s, elementary::power(s, p), p, window.count, shift, scale));
    }
    window.divergences = lane_sum(divergences.value(), lanes);
  }
  return window;
}

// The channel of a place whose plane begins at in_plane.
template <typename I>
__device__ __forceinline__ I channel_of(I in_plane, const PoolGeometryOf<I>& g,
                                        bool channels_last) {
  return (channels_last ? in_plane : in_plane / g.in_c) % g.C;
}

// Calls body(index, window, whether this thread is to write) for each window. All threads of a warp
// take part in every sum: those beyond the last window look at it again.
template <bool for_gradient, typename T, typename I, typename F>
__device__ __forceinline__ void for_each_window(I count, const PoolGeometryOf<I>& g,
                                                bool channels_last, bool average, int lanes,
                                                const opmath_t<T>* p, const T* input,
                                                const F& body) {
  const I of_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (I first = static_cast<I>(blockIdx.x) * of_block; first < count;
       first += static_cast<I>(gridDim.x) * of_block) {
    const I mine = first + static_cast<I>(threadIdx.x) / lanes;
    const I index = mine < count ? mine : count - 1;
    const Position<I> at = position_of(index, g, channels_last, g.OH, g.OW);
    const auto power = usable_power(p[channel_of(at.in_plane, g, channels_last)]);
    const auto window =
        measured<for_gradient>(input + at.in_plane, g, at.h, at.w, power, average, lane, lanes);
    body(index, window, mine < count && lane == 0);
  }
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, I>)
    forward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, bool average, int lanes,
                   const opmath_t<T>* __restrict__ p, const T* __restrict__ input,
                   T* __restrict__ output) {
  for_each_window<false>(count, g, channels_last, average, lanes, p, input,
                         [&](I index, const PowerWindow<opmath_t<T>>& window, bool writes) {
                           if (writes) output[index] = static_cast<T>(window.value());
                         });
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, I>)
    shares_kernel(I count, PoolGeometryOf<I> g, bool channels_last, bool average, int lanes,
                  const opmath_t<T>* __restrict__ p, const T* __restrict__ grad_output,
                  const T* __restrict__ input, opmath_t<T>* __restrict__ divisors,
                  opmath_t<T>* __restrict__ shares, opmath_t<T>* __restrict__ terms) {
  using A = opmath_t<T>;
  for_each_window<true>(count, g, channels_last, average, lanes, p, input,
                        [&](I index, const PowerWindow<A>& window, bool writes) {
                          if (!writes) return;
                          const A grad = static_cast<A>(grad_output[index]);
                          // By way of y where powers of s may be out of range, else of m: y is
                          // rounded, which large powers of it magnify.
                          const bool scaled = window.has_scale();
                          const A y = window.value(), root = window.square_root();
                          const bool by_norm = scaled && window.p < A(1);
                          divisors[index] = by_norm ? y : window.largest;
                          shares[index] = grad * (by_norm  ? A(1) / window.count
                                                  : scaled ? root * root / window.powers
                                                           : A(1));
                          terms[index] = grad * window.power_gradient();
                        });
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, I>)
    elements_kernel(I count, PoolGeometryOf<I> g, bool channels_last,
                    const opmath_t<T>* __restrict__ p, const T* __restrict__ input,
                    const opmath_t<T>* __restrict__ divisors,
                    const opmath_t<T>* __restrict__ shares, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    const A power = usable_power(p[channel_of(at.in_plane, g, channels_last)]);
    const A x = static_cast<A>(input[i]);
    BlockSum<A> sum;
    for (I oh = g.first_window(at.h); oh < g.last_window(at.h); ++oh) {
      for (I ow = g.first_window_column(at.w); ow < g.last_window_column(at.w); ++ow) {
        const I o = at.out_plane + oh * g.out_h + ow * g.out_w;
        sum.add(shares[o] * power_slope(x, divisors[o], power));
      }
    }
    grad_input[i] = static_cast<T>(sum.value());
  }
}

// Numbers of C channels to be added: those with the index t = image * pixels + pixel of channel c
// lie at c * channel + image * image_stride + pixel * pixel_stride.
struct Terms {
  int64_t count, pixels, channel, image_stride, pixel_stride;
};

// The sums of `parts` stretches of each channel's terms, side by side.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(int64_t channels, int64_t parts, Terms t, const In* __restrict__ terms,
                Out* __restrict__ sums) {
  __shared__ double shared[kThreads / kWarp];
  const int64_t length = (t.count + parts - 1) / parts;
  for (int64_t item = blockIdx.x; item < channels * parts; item += gridDim.x) {
    const int64_t c = quotient(item, parts), first = (item - c * parts) * length;
    const int64_t last = first + length < t.count ? first + length : t.count;
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const int64_t image = quotient(i, t.pixels), pixel = i - image * t.pixels;
      sum += static_cast<double>(
          terms[c * t.channel + image * t.image_stride + pixel * t.pixel_stride]);
    }
    sum = block_sum<kThreads>(sum, shared);
    if (threadIdx.x == 0) sums[item] = static_cast<Out>(sum);
  }
}

// How many threads share a window: some terms for each.
int lanes_of(const PoolGeometry& g, bool channels_last) {
  const int64_t taps = std::min(g.kernel_h, g.H) * std::min(g.kernel_w, g.W);
  return channels_last || taps < kWarp ? 1 : lanes_for(taps / 4);
}

// Calls body with the geometry in 32 bits where every index fits.
template <typename F>
void dispatch_width(const PoolGeometry& g, const F& body) {
  if (fits_narrow(g, g.N)) return body(narrow(g));
  body(g);
}

Tensor pooled(const Images& x, const PoolGeometry& geometry, const Tensor& p, bool average) {
  const Launcher launcher(x.data);
  Tensor output = new_pooled(x, geometry);
  if (x.data.numel() == 0) return output;
  const int lanes = lanes_of(geometry, x.channels_last);
  dispatch_floating("lp_pool2d_tensor_p", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    dispatch_width(geometry, [&](const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run(forward_kernel<T, I>, output.numel(), kThreads / lanes, kThreads,
                   static_cast<I>(output.numel()), g, x.channels_last, average, lanes,
                   p.const_data_ptr<opmath_t<T>>(), x.data.const_data_ptr<T>(),
                   output.mutable_data_ptr<T>());
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> gradients(const Tensor& grad_output, const Images& x,
                                     const PoolGeometry& geometry, const Tensor& p, bool average) {
  const Launcher launcher(x.data);
  Tensor grad_input = empty_images(x, x.H, x.W), grad_p = new_like(p);
  if (x.data.numel() == 0) {
    torch::stable::zero_(grad_p);
    return {grad_input, grad_p};
  }
  const int lanes = lanes_of(geometry, x.channels_last);
  const int64_t windows = grad_output.numel(), pixels = geometry.OH * geometry.OW;
  const Terms of_windows{geometry.N * pixels, pixels, geometry.out_c, geometry.out_n,
                         geometry.out_w};
  const int64_t parts = std::clamp<int64_t>(of_windows.count / (16 * kThreads), 1, kThreads);
  const Terms of_parts{parts, parts, parts, 0, 1};
  Tensor work = new_tensor(x.data, {3, windows}, p.scalar_type());
  Tensor sums = new_tensor(x.data, {x.C, parts}, ScalarType::Double);
  dispatch_floating("lp_pool2d_tensor_p", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const A* powers = p.const_data_ptr<A>();
    const T* in = x.data.const_data_ptr<T>();
    A *divisors = work.mutable_data_ptr<A>(), *shares = divisors + windows,
      *terms = shares + windows;
    dispatch_width(geometry, [&](const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run(shares_kernel<T, I>, windows, kThreads / lanes, kThreads,
                   static_cast<I>(windows), g, x.channels_last, average, lanes, powers,
                   grad_output.const_data_ptr<T>(), in, divisors, shares, terms);
      launcher.run_over(elements_kernel<T, I>, grad_input.numel(),
                        static_cast<I>(grad_input.numel()), g, x.channels_last, powers, in,
                        static_cast<const A*>(divisors), static_cast<const A*>(shares),
                        grad_input.mutable_data_ptr<T>());
    });
    double* const of_stretches = sums.mutable_data_ptr<double>();
    launcher.run_blocks(sums_kernel<A, double>, x.C * parts, kThreads, x.C, parts, of_windows,
                        static_cast<const A*>(terms), of_stretches);
    launcher.run_blocks(sums_kernel<double, A>, x.C, kThreads, x.C, int64_t{1}, of_parts,
                        static_cast<const double*>(of_stretches), grad_p.mutable_data_ptr<A>());
  });
  return {grad_input, grad_p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  TensorPoolOperators<&pooled, &gradients>::register_all(m);
}

}  // namespace mnist_ops::cuda
