// LP pooling on CUDA, forward: one launch.

#include "lp_pool.cuh"

namespace mnist_ops::cuda {
namespace {

template <typename Tag, typename T, typename I>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, I>)
    forward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                   const T* __restrict__ input, T* __restrict__ output) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.OH, g.OW);
    with_norm(Tag{}, p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      output[i] = static_cast<T>(window_norm<norm>(input + at.in_plane, g, p, at.h, at.w));
    });
  }
}

// n elements of each of two rows, n / 2 windows of 2x2.
template <Norm norm, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_pairs_kernel(int count, PairGeometry g, bool packed_out, opmath_t<T> p,
                         const T* __restrict__ input, T* __restrict__ output) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const PairPlace at = pair_place(item, g.OH, g.columns);
    const T* x = input + (at.plane * g.H + 2 * at.row) * g.W + at.column * n;
    const int ow = at.column * (n / 2);
    const Pack<T, n> rows[2] = {load_pack<n>(x), load_pack<n>(x + g.W)};
    Pack<T, n / 2> to;
#pragma unroll
    for (int m = 0; m < n / 2; ++m) {
      A taps[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) taps[k] = static_cast<A>(rows[k / 2].values[2 * m + k % 2]);
      to.values[m] = static_cast<T>(norm_of_taps<norm>(taps, p));
    }
    T* y = output + (at.plane * g.OH + at.row) * g.OW + ow;
    if (packed_out) {
      store_pack(y, to);
    } else {
#pragma unroll
      for (int m = 0; m < n / 2; ++m) {
        if (ow + m < g.OW) y[m] = to.values[m];
      }
    }
  }
}

// 2x2 windows with stride 2, p = 2.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_blocks_kernel(int count, PoolGeometryOf<int32_t> g, const T* __restrict__ input,
                          T* __restrict__ output) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, g.OH, g.OW, g.C / n);
    const T* x = input + g.input_offset(at.n, at.c * n) + 2 * at.h * g.in_h + 2 * at.w * g.in_w;
    Pack<T, n> packs[4], to;
#pragma unroll
    for (int k = 0; k < 4; ++k) packs[k] = load_pack<n>(x + k / 2 * g.in_h + k % 2 * g.in_w);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A taps[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) taps[k] = static_cast<A>(packs[k].values[j]);
      to.values[j] = static_cast<T>(norm_of_taps<Norm::kTwo>(taps, A(2)));
    }
    store_pack(output + item * n, to);
  }
}

// Whether a kernel with packs was launched.
template <Norm norm, typename T>
bool forward_packs(const Launcher& launcher, const PoolGeometry& g, bool channels_last, double p,
                   const T* input, T* output) {
  if (common_window(g) != 2 || (norm == Norm::kGeneral && p != 3 && p != 4)) return false;
  const bool aligned = are_aligned(input, output);
  if (!channels_last) {
    return dispatch_pairs<norm, T>(g, aligned, [&](auto pack, PairGeometry pairs) {
      constexpr int n = decltype(pack)::value;
      pairs.columns = static_cast<int>(ceil_div(g.OW, n / 2));
      const int64_t count = g.N * g.C * g.OH * pairs.columns;
      launcher.run_over(forward_pairs_kernel<norm, n, T>, count, static_cast<int>(count), pairs,
                        g.OW % (n / 2) == 0, static_cast<opmath_t<T>>(p), input, output);
    });
  }
  if constexpr (norm == Norm::kTwo && !std::is_same_v<T, double>) {
    if (!takes_channels<T>(g, aligned)) return false;
    constexpr int n = kPackSize<T>;
    const int64_t count = g.N * g.OH * g.OW * g.C / n;
    launcher.run_over(forward_blocks_kernel<n, T>, count, static_cast<int>(count), narrow(g), input,
                      output);
    return true;
  }
  return false;
}

}  // namespace

Tensor lp_pool2d(const Images& x, const PoolGeometry& geometry, double p) {
  const Launcher launcher(x.data);
  Tensor output = new_pooled(x, geometry);
  if (x.data.numel() == 0) return output;
  dispatch_floating("lp_pool2d", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    bool done = false;
    dispatch_norm(p, [&](auto tag) {
      done = forward_packs<decltype(tag)::value>(launcher, geometry, x.channels_last, p, in, out);
    });
    if (done) return;
    dispatch_window(geometry, p, [&](auto tag, const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run_over(forward_kernel<decltype(tag), T, I>, output.numel(),
                        static_cast<I>(output.numel()), g, x.channels_last,
                        static_cast<opmath_t<T>>(p), in, out);
    });
  });
  return output;
}

}  // namespace mnist_ops::cuda
