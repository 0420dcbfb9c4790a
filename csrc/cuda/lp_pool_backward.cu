// LP pooling on CUDA, backward: one launch.

#include "lp_pool.cuh"

namespace mnist_ops::cuda {
namespace {

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                    const T* __restrict__ grad_output, const T* __restrict__ input,
                    const T* __restrict__ output, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    grad_input[i] = static_cast<T>(input_gradient<norm>(
        grad_output + at.out_plane, input + at.in_plane, output + at.out_plane, g, p, at.h, at.w));
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

// 3x3 windows: n elements of the rows 2 i and 2 i + 1, over which lie the windows of the rows i - 1
// and i. Windows that are not there count as 0.
template <Norm norm, int n, typename T>
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
    // Equal maxima share a window's gradient.
    if constexpr (norm == Norm::kInf) {
      A ties[2][kWindows] = {};
#pragma unroll
      for (int d = -2; d <= 2; ++d) {  // rows of those windows, from that of this pair
        const int ih = 2 * at.row + d;
        if (ih < 0 || ih >= g.H) continue;
        const T* x = input + (at.plane * g.H + ih) * g.W + at.column * n;
        const Pack<T, n> pack = load_pack<n>(x);
        const Pack<T, 2> before = at.column > 0 ? load_pack<2>(x - 2) : Pack<T, 2>{};
        A sizes[n + 3];
        sizes[0] = magnitude(static_cast<A>(before.values[0]));
        sizes[1] = magnitude(static_cast<A>(before.values[1]));
#pragma unroll
        for (int j = 0; j < n; ++j) sizes[j + 2] = magnitude(static_cast<A>(pack.values[j]));
        sizes[n + 2] = at.column + 1 < g.columns ? magnitude(static_cast<A>(x[n])) : A(0);
#pragma unroll
        for (int r = d > 0 ? 1 : 0; r < (d < 0 ? 1 : 2); ++r) {
#pragma unroll
          for (int m = 0; m < kWindows; ++m) {
#pragma unroll
            for (int kw = 0; kw < 3; ++kw) ties[r][m] += A(sizes[2 * m + kw] == ys[r][m]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int m = 0; m < kWindows; ++m) {
          if (ties[r][m] > A(1)) gs[r][m] /= ties[r][m];
        }
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
            sum += gs[r][m] * Slopes<norm, A>(ys[r][m]).at(x, p);
          }
        }
        to.values[j] = static_cast<T>(sum);
      }
      store_pack(grad_input + i, to);
    }
  }
}

template <Norm norm, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_channels_kernel(int count, PoolGeometryOf<int32_t> g,
                             const T* __restrict__ grad_output, const T* __restrict__ input,
                             const T* __restrict__ output, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, g.H, g.W, g.C / n);
    const T* image = input + g.input_offset(at.n, at.c * n);
    const int outputs = g.output_offset(at.n, at.c * n);
    const Pack<T, n> xs = load_pack<n>(input + item * n);
    A sums[n] = {};
    for (int oh = g.first_window(at.h); oh < g.last_window(at.h); ++oh) {
      for (int ow = g.first_window_column(at.w); ow < g.last_window_column(at.w); ++ow) {
        const int o = outputs + oh * g.out_h + ow * g.out_w;
        const Pack<T, n> ys = load_pack<n>(output + o), gs = load_pack<n>(grad_output + o);
        A ties[n] = {};
        if constexpr (norm == Norm::kInf) {
          for (int ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
            for (int iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
              const Pack<T, n> others = load_pack<n>(image + ih * g.in_h + iw * g.in_w);
#pragma unroll
              for (int j = 0; j < n; ++j) {
                ties[j] +=
                    A(magnitude(static_cast<A>(others.values[j])) == static_cast<A>(ys.values[j]));
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
          A slope =
              norm_gradient<norm>(static_cast<A>(xs.values[j]), static_cast<A>(ys.values[j]), A(2));
          if (norm == Norm::kInf && slope != A(0) && slope == slope) slope /= ties[j];
          sums[j] += static_cast<A>(gs.values[j]) * slope;
        }
      }
    }
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) to.values[j] = static_cast<T>(sums[j]);
    store_pack(grad_input + item * n, to);
  }
}

// The pixels 2 h and 2 h + 1, 2 w and 2 w + 1: of 2x2 windows one lies over them, of 3x3 windows
// four, [h - 1, h] x [w - 1, w].
template <Norm norm, int kSize, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_blocks_kernel(int count, PoolGeometryOf<int32_t> g, opmath_t<T> p,
                           const T* __restrict__ grad_output, const T* __restrict__ input,
                           const T* __restrict__ output, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  constexpr int kReach = kSize - 1, kWindows = kReach * kReach;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, (g.H + 1) / 2, (g.W + 1) / 2, g.C / n);
    const T* image = input + g.input_offset(at.n, at.c * n);
    const int outputs = g.output_offset(at.n, at.c * n);
    Pack<T, n> ys[kWindows], gs[kWindows];
    bool there[kWindows];
#pragma unroll
    for (int k = 0; k < kWindows; ++k) {
      const int oh = at.h - kReach + 1 + k / kReach, ow = at.w - kReach + 1 + k % kReach;
      there[k] = oh >= 0 && oh < g.OH && ow >= 0 && ow < g.OW;
      const int o = outputs + oh * g.out_h + ow * g.out_w;
      ys[k] = there[k] ? load_pack<n>(output + o) : Pack<T, n>{};
      gs[k] = there[k] ? load_pack<n>(grad_output + o) : Pack<T, n>{};
    }
    A ties[kWindows][n] = {};
    if constexpr (norm == Norm::kInf) {
#pragma unroll
      for (int dh = 2 - 2 * kReach; dh < 1 + kReach; ++dh) {
#pragma unroll
        for (int dw = 2 - 2 * kReach; dw < 1 + kReach; ++dw) {
          const int ih = 2 * at.h + dh, iw = 2 * at.w + dw;
          if (ih < 0 || ih >= g.H || iw < 0 || iw >= g.W) continue;
          const Pack<T, n> pack = load_pack<n>(image + ih * g.in_h + iw * g.in_w);
#pragma unroll
          for (int k = 0; k < kWindows; ++k) {
            // From the window's own first row and column.
            const int kh = dh + 2 * (kReach - 1 - k / kReach);
            const int kw = dw + 2 * (kReach - 1 - k % kReach);
            if (kh < 0 || kh >= kSize || kw < 0 || kw >= kSize) continue;
#pragma unroll
            for (int j = 0; j < n; ++j) {
              ties[k][j] +=
                  A(magnitude(static_cast<A>(pack.values[j])) == static_cast<A>(ys[k].values[j]));
            }
          }
        }
      }
    }
    Pack<T, n> pixels[4];
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      const int ih = 2 * at.h + pixel / 2, iw = 2 * at.w + pixel % 2;
      const bool inside = ih < g.H && iw < g.W;
      pixels[pixel] = inside ? load_pack<n>(image + ih * g.in_h + iw * g.in_w) : Pack<T, n>{};
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A sums[4] = {};
#pragma unroll
      for (int k = 0; k < kWindows; ++k) {
        if (!there[k]) continue;
        const Slopes<norm, A> window(static_cast<A>(ys[k].values[j]));
        A grad = static_cast<A>(gs[k].values[j]);
        if (norm == Norm::kInf && ties[k][j] > A(1)) grad /= ties[k][j];
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
          // A window before this place has only its third row, or column, here.
          if (k / kReach < kReach - 1 && pixel / 2 > 0) continue;
          if (k % kReach < kReach - 1 && pixel % 2 > 0) continue;
          sums[pixel] += grad * window.at(static_cast<A>(pixels[pixel].values[j]), p);
        }
      }
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel) {
        pixels[pixel].values[j] = static_cast<T>(sums[pixel]);
      }
    }
    T* const to = grad_input + g.input_offset(at.n, at.c * n);
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      const int ih = 2 * at.h + pixel / 2, iw = 2 * at.w + pixel % 2;
      if (ih < g.H && iw < g.W) store_pack(to + ih * g.in_h + iw * g.in_w, pixels[pixel]);
    }
  }
}

template <Norm norm, typename T>
bool backward_vectors(const Launcher& launcher, const PoolGeometry& g, bool channels_last, double p,
                      const T* grad_output, const T* input, const T* output, T* grad_input) {
  using A = opmath_t<T>;
  if (norm == Norm::kGeneral && p != 3 && p != 4) return false;
  const bool aligned = are_aligned(grad_output, input, output, grad_input);
  const int window = common_window(g);
  if (channels_last) {
    return dispatch_channels<T>(g, aligned, [&](const PoolGeometryOf<int32_t>& narrow) {
      // A thread of a 3x3 kernel would need too many registers for more channels.
      constexpr int n = kPackSize<T>, kFew = n < 4 ? n : 4;
      const auto run = [&](auto* kernel, int64_t pixels, int channels, const auto&... power) {
        const int64_t count = g.N * pixels * g.C / channels;
        launcher.run_over(kernel, count, static_cast<int>(count), narrow, power..., grad_output,
                          input, output, grad_input);
        return true;
      };
      if constexpr (!std::is_same_v<T, double>) {
        const int64_t blocks = ceil_div(g.H, 2) * ceil_div(g.W, 2);
        const A power = static_cast<A>(p);
        if (window == 2) return run(backward_blocks_kernel<norm, 2, n, T>, blocks, n, power);
        if (window == 3) return run(backward_blocks_kernel<norm, 3, kFew, T>, blocks, kFew, power);
      }
      if constexpr (norm != Norm::kGeneral) {
        return run(backward_channels_kernel<norm, n, T>, g.H * g.W, n);
      }
      return false;
    });
  }
  // Windows of two must tile the image: elements that are in none are not written.
  if (window == 0 || (window == 2 && (g.H != 2 * g.OH || g.W != 2 * g.OW))) return false;
  return dispatch_row_pack<T>(g, aligned, [&](auto pack, const PairGeometry& pairs) {
    constexpr int n = decltype(pack)::value;
    const int64_t count = g.N * g.C * ((g.H + 1) / 2) * pairs.columns;
    launcher.run_over(
        window == 2 ? backward_tiles_kernel<norm, n, T> : backward_threes_kernel<norm, n, T>, count,
        static_cast<int>(count), pairs, static_cast<A>(p), grad_output, input, output, grad_input);
  });
}

Tensor lp_pool2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& output,
                          double p, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d_backward";
  const Images x = images_of(op, "input", input);
  const PoolGeometry geometry = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  p = usable_norm_type(op, p, input.scalar_type());
  const Tensor y = pooled_like(op, "output", output, x, geometry);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, geometry);
  const Launcher launcher(input);
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      if (backward_vectors<norm>(launcher, geometry, x.channels_last, p, grad.const_data_ptr<T>(),
                                 x.data.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                 grad_input.mutable_data_ptr<T>())) {
        return;
      }
      dispatch_index(geometry, [&](const auto& g) {
        using I = decltype(g.N + 0);
        launcher.run_over(backward_kernel<norm, T, I>, grad_input.numel(),
                          static_cast<I>(grad_input.numel()), g, x.channels_last, static_cast<A>(p),
                          grad.const_data_ptr<T>(), x.data.const_data_ptr<T>(),
                          y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>());
      });
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("lp_pool2d_backward", TORCH_BOX(&lp_pool2d_backward));
}

}  // namespace mnist_ops::cuda
