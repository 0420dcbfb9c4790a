// LP pooling on CUDA: the backward pass, one launch, and its derivative, two.

#include "lp_pool.cuh"

namespace mnist_ops::cuda {
namespace {

template <typename Tag, typename T, typename I>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, I>)
    backward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                    const T* __restrict__ grad_output, const T* __restrict__ input,
                    const T* __restrict__ output, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    with_norm(Tag{}, p, [&](auto tag) {
      grad_input[i] = static_cast<T>(
          input_gradient<decltype(tag)::value>(grad_output + at.out_plane, input + at.in_plane,
                                               output + at.out_plane, g, p, at.h, at.w));
    });
  }
}

// 2x2 windows that tile the image: n elements of two rows, n / 2 windows.
template <Norm norm, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_tiles_kernel(int count, PairGeometry g, opmath_t<T> p,
                          const T* __restrict__ grad_output, const T* __restrict__ input,
                          const T* __restrict__ output, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const PairPlace at = pair_place(item, g.OH, g.columns);
    const int i = (at.plane * g.H + 2 * at.row) * g.W + at.column * n;
    const int o = (at.plane * g.OH + at.row) * g.OW + at.column * (n / 2);
    const Pack<T, n> upper = load_pack<n>(input + i), lower = load_pack<n>(input + i + g.W);
    const Pack<T, n / 2> ys = load_pack<n / 2>(output + o), gs = load_pack<n / 2>(grad_output + o);
    Pack<T, n> to_upper, to_lower;
#pragma unroll
    for (int m = 0; m < n / 2; ++m) {
      const A y = static_cast<A>(ys.values[m]), grad = static_cast<A>(gs.values[m]);
      const A x[4] = {static_cast<A>(upper.values[2 * m]), static_cast<A>(upper.values[2 * m + 1]),
                      static_cast<A>(lower.values[2 * m]), static_cast<A>(lower.values[2 * m + 1])};
      const Slopes<norm, A> window(y);
      A ties = A(0), slopes[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        slopes[k] = window.at(x[k], p);
        if (norm == Norm::kInf) ties += A(magnitude(x[k]) == y);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (norm == Norm::kInf && slopes[k] != A(0) && slopes[k] == slopes[k]) slopes[k] /= ties;
        (k < 2 ? to_upper : to_lower).values[2 * m + k % 2] = static_cast<T>(grad * slopes[k]);
      }
    }
    store_pack(grad_input + i, to_upper);
    store_pack(grad_input + i + g.W, to_lower);
  }
}

// 3x3 windows with p = 2 (on an H100 2.3 times as fast as an element a thread): n elements of the
// rows 2 i and 2 i + 1, over which lie the windows of the rows i - 1 and i. Windows that are not
// there count as 0.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_threes_kernel(int count, PairGeometry g, opmath_t<T> p,
                           const T* __restrict__ grad_output, const T* __restrict__ input,
                           const T* __restrict__ output, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  constexpr int kWindows = n / 2 + 1;  // in a row: one begins before the pack
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const PairPlace at = pair_place(item, (g.H + 1) / 2, g.columns);
    const int first = at.column * (n / 2) - 1;
    A ys[2][kWindows], gs[2][kWindows];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int oh = at.row - 1 + r;
#pragma unroll
      for (int m = 0; m < kWindows; ++m) {
        const int ow = first + m;
        const bool there = oh >= 0 && oh < g.OH && ow >= 0 && ow < g.OW;
        const int o = (at.plane * g.OH + oh) * g.OW + ow;
        ys[r][m] = there ? static_cast<A>(output[o]) : A(1);
        gs[r][m] = there ? static_cast<A>(grad_output[o]) : A(0);
      }
    }
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int ih = 2 * at.row + below;
      if (ih >= g.H) continue;
      const int i = (at.plane * g.H + ih) * g.W + at.column * n;
      const Pack<T, n> xs = load_pack<n>(input + i);
      Pack<T, n> to;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = static_cast<A>(xs.values[j]);
        A sum = A(0);
        // A window's rows 0 and 1 are those of this pair, its row 2 the next pair's first.
#pragma unroll
        for (int r = below; r < 2; ++r) {
#pragma unroll
          for (int m = j / 2 + j % 2; m < j / 2 + 2; ++m) {
            const int ow = first + m, oh = at.row - 1 + r;
            if (oh < 0 || oh >= g.OH || ow < 0 || ow >= g.OW) continue;
            sum += gs[r][m] * Slopes<Norm::kTwo, A>(ys[r][m]).at(x, p);
          }
        }
        to.values[j] = static_cast<T>(sum);
      }
      store_pack(grad_input + i, to);
    }
  }
}

// 2x2 windows with stride 2, p = 2: the pixels 2 h and 2 h + 1, 2 w and 2 w + 1, over which lies
// one window, or none where the image ends.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_blocks_kernel(int count, PoolGeometryOf<int32_t> g, const T* __restrict__ grad_output,
                           const T* __restrict__ input, const T* __restrict__ output,
                           T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, (g.H + 1) / 2, (g.W + 1) / 2, g.C / n);
    const int place = g.input_offset(at.n, at.c * n) + 2 * at.h * g.in_h + 2 * at.w * g.in_w;
    const bool there = at.h < g.OH && at.w < g.OW;
    const int o = g.output_offset(at.n, at.c * n) + at.h * g.out_h + at.w * g.out_w;
    const Pack<T, n> ys = there ? load_pack<n>(output + o) : Pack<T, n>{};
    const Pack<T, n> gs = there ? load_pack<n>(grad_output + o) : Pack<T, n>{};
    Pack<T, n> pixels[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (there) pixels[k] = load_pack<n>(input + place + k / 2 * g.in_h + k % 2 * g.in_w);
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const Slopes<Norm::kTwo, A> window(static_cast<A>(ys.values[j]));
      const A grad = static_cast<A>(gs.values[j]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const A slope = there ? window.at(static_cast<A>(pixels[k].values[j]), A(2)) : A(0);
        pixels[k].values[j] = static_cast<T>(grad * slope);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = 2 * at.h + k / 2 < g.H && 2 * at.w + k % 2 < g.W;
      if (inside) store_pack(grad_input + place + k / 2 * g.in_h + k % 2 * g.in_w, pixels[k]);
    }
  }
}

// Whether a kernel with packs was launched.
template <Norm norm, typename T>
bool backward_packs(const Launcher& launcher, const PoolGeometry& g, bool channels_last, double p,
                    const T* grad_output, const T* input, const T* output, T* grad_input) {
  const int window = common_window(g);
  if (window == 0 || (norm == Norm::kGeneral && p != 3 && p != 4)) return false;
  const bool aligned = are_aligned(grad_output, input, output, grad_input);
  if (!channels_last) {
    const auto run = [&](auto* kernel, const PairGeometry& pairs) {
      const int64_t count = g.N * g.C * ((g.H + 1) / 2) * pairs.columns;
      launcher.run_over(kernel, count, static_cast<int>(count), pairs, static_cast<opmath_t<T>>(p),
                        grad_output, input, output, grad_input);
    };
    if (window == 2) {
      // They must tile the image: elements that are in no window are not written.
      if (g.H != 2 * g.OH || g.W != 2 * g.OW) return false;
      return dispatch_pairs<norm, T>(g, aligned, [&](auto pack, const PairGeometry& pairs) {
        run(backward_tiles_kernel<norm, decltype(pack)::value, T>, pairs);
      });
    }
    if constexpr (norm == Norm::kTwo) {
      return dispatch_pack_of_row<T, kShortPack<T>>(
          g, aligned, [&](auto pack, const PairGeometry& pairs) {
            run(backward_threes_kernel<decltype(pack)::value, T>, pairs);
          });
    }
    return false;
  }
  if constexpr (norm == Norm::kTwo && !std::is_same_v<T, double>) {
    if (window != 2 || !takes_channels<T>(g, aligned)) return false;
    constexpr int n = kPackSize<T>;
    const int64_t count = g.N * ceil_div(g.H, 2) * ceil_div(g.W, 2) * g.C / n;
    launcher.run_over(backward_blocks_kernel<n, T>, count, static_cast<int>(count), narrow(g),
                      grad_output, input, output, grad_input);
    return true;
  }
  return false;
}

// ------------------------------------------------------------- the backward pass, differentiated

template <typename A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A, int64_t>)
    directional_kernel(int64_t count, PoolGeometry g, bool channels_last, A p,
                       const A* __restrict__ direction, const A* __restrict__ input,
                       const A* __restrict__ output, A* __restrict__ directional) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const auto at = position_of(i, g, channels_last, g.OH, g.OW);
    with_norm(AnyNorm{}, p, [&](auto tag) {
      directional[i] = directional_derivative<decltype(tag)::value>(
          direction + at.in_plane, input + at.in_plane, output[i], g, p, at.h, at.w);
    });
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A, int64_t>)
    second_kernel(int64_t count, PoolGeometry g, bool channels_last, A p,
                  const A* __restrict__ direction, const A* __restrict__ grad_output,
                  const A* __restrict__ input, const A* __restrict__ output,
                  const A* __restrict__ directional, A* __restrict__ grad_input) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const auto at = position_of(i, g, channels_last, g.H, g.W);
    with_norm(AnyNorm{}, p, [&](auto tag) {
      grad_input[i] = second_gradient<decltype(tag)::value>(
          direction + at.in_plane, grad_output + at.out_plane, input + at.in_plane,
          output + at.out_plane, directional + at.out_plane, g, p, at.h, at.w);
    });
  }
}

}  // namespace

Tensor lp_pool2d_backward(const Tensor& grad_output, const Images& x, const Tensor& output,
                          const PoolGeometry& geometry, double p) {
  const Launcher launcher(x.data);
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating("lp_pool2d", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *grad = grad_output.const_data_ptr<T>(), *in = x.data.const_data_ptr<T>();
    const T* out = output.const_data_ptr<T>();
    T* to = grad_input.mutable_data_ptr<T>();
    bool done = false;
    dispatch_norm(p, [&](auto tag) {
      done = backward_packs<decltype(tag)::value>(launcher, geometry, x.channels_last, p, grad, in,
                                                  out, to);
    });
    if (done) return;
    dispatch_window(geometry, p, [&](auto tag, const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run_over(backward_kernel<decltype(tag), T, I>, grad_input.numel(),
                        static_cast<I>(grad_input.numel()), g, x.channels_last,
                        static_cast<opmath_t<T>>(p), grad, in, out, to);
    });
  });
  return grad_input;
}

namespace {

void pool_second(const Tensor& direction, const Tensor& grad, const Images& x, const Tensor& y,
                 const PoolGeometry& g, double p, Tensor& by_grad, Tensor& by_input) {
  const Launcher launcher(x.data);
  dispatch_computed(x.data, [&](auto element) {
    using A = decltype(element);
    const A *in = x.data.const_data_ptr<A>(), *out = y.const_data_ptr<A>();
    const A *v = direction.const_data_ptr<A>(), *gy = grad.const_data_ptr<A>();
    A* dd = by_grad.mutable_data_ptr<A>();
    launcher.run_over(directional_kernel<A>, by_grad.numel(), by_grad.numel(), g, x.channels_last,
                      static_cast<A>(p), v, in, out, dd);
    launcher.run_over(second_kernel<A>, by_input.numel(), by_input.numel(), g, x.channels_last,
                      static_cast<A>(p), v, gy, in, out, static_cast<const A*>(dd),
                      by_input.mutable_data_ptr<A>());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  PoolOperators<&lp_pool2d, &lp_pool2d_backward, &pool_second>::register_all(m);
}

}  // namespace mnist_ops::cuda
