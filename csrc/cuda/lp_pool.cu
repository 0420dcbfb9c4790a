// LP pooling on CUDA. Every operator is one launch, the double backward two.
//
// p = 1, 2 and inf are bound by memory: one read of the input and one write forward; gradient,
// input and output read and one write backward. Other norms are bound by pow, but for p = 3 and 4,
// which multiply. Four kinds of kernels, the first that fits:
//   pairs     NCHW, 2x2 or 3x3 windows with stride 2, no padding (the reports' pooling), p = 1, 2,
//             3, 4 or inf: a thread takes a pack of neighbouring elements of each of a window's
//             rows, and all windows that begin in it. 2x2: everything is read and written once, in
//             packs, backward too, where the windows tile the image. 3x3: what windows share comes
//             from L1.
//   blocks    NHWC, the same windows and norms, not in float64: a thread takes a pack of channels
//             of one result; backward, of the 2x2 pixels that begin at the same place, so that a
//             window's norm and gradient are read by two or four threads at most
//   channels  NHWC, any windows, p = 1, 2, inf: a thread takes a pack of channels of one result;
//             what windows share comes from L1 and L2.
//   one       a thread computes one result with the functions of ../lp_pool.h, results in the order
//             of memory, so that writes are coalesced and reads are apart by no more than the
//             stride.
// Divisions that find a result's place are in 32 bits, two or three for all that a thread does.
//
// The gradients gather from the windows over an element, in a fixed order: no atomics.

#include "../lp_pool.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

// Calls body with the geometry in 32 bits where every index and every bound of a window fits: the
// divisions that find a result's window are then several times cheaper.
template <typename F>
void dispatch_index(const PoolGeometry& g, F&& body) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  if (!fits_32_bits(g.N * g.C * g.H * g.W) || !fits_32_bits(g.N * g.C * g.OH * g.OW) ||
      !fits_32_bits(rows) || !fits_32_bits(columns)) {
    return body(g);
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  PoolGeometryOf<int32_t> s{};
  s.N = narrow(g.N), s.C = narrow(g.C), s.H = narrow(g.H), s.W = narrow(g.W);
  s.OH = narrow(g.OH), s.OW = narrow(g.OW);
  s.kernel_h = narrow(g.kernel_h), s.kernel_w = narrow(g.kernel_w);
  s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.padding_h = narrow(g.padding_h), s.padding_w = narrow(g.padding_w);
  s.in_n = narrow(g.in_n), s.in_c = narrow(g.in_c);
  s.in_h = narrow(g.in_h), s.in_w = narrow(g.in_w);
  s.out_n = narrow(g.out_n), s.out_c = narrow(g.out_c);
  s.out_h = narrow(g.out_h), s.out_w = narrow(g.out_w);
  return body(s);
}

// Where one result belongs: the first elements of its input and output planes, its row and column.
template <typename I>
struct Position {
  I in_plane, out_plane, h, w;
};

// The position of the index-th element, in the order of memory, of a tensor with planes of H x W.
template <typename I>
__device__ __forceinline__ Position<I> position_of(I index, const PoolGeometryOf<I>& g,
                                                   bool channels_last, I H, I W) {
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  U rest = static_cast<U>(index);
  U c = 0;
  if (channels_last) {
    c = rest % static_cast<U>(g.C);
    rest /= static_cast<U>(g.C);
  }
  const I w = static_cast<I>(rest % static_cast<U>(W));
  rest /= static_cast<U>(W);
  const I h = static_cast<I>(rest % static_cast<U>(H));
  const I outer = static_cast<I>(rest / static_cast<U>(H));
  if (channels_last) {
    const I channel = static_cast<I>(c);
    return {g.input_offset(outer, channel), g.output_offset(outer, channel), h, w};
  }
  // In NCHW planes follow each other at one distance, across channels and images alike.
  return {outer * g.in_c, outer * g.out_c, h, w};
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                   const T* __restrict__ input, T* __restrict__ output) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.OH, g.OW);
    output[i] = static_cast<T>(window_norm<norm>(input + at.in_plane, g, p, at.h, at.w));
  }
}

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

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    directional_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                       const T* __restrict__ direction, const T* __restrict__ input,
                       const T* __restrict__ output, T* __restrict__ directional) {
  using A = opmath_t<T>;
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.OH, g.OW);
    directional[i] = static_cast<T>(directional_derivative<norm>(
        direction + at.in_plane, input + at.in_plane, static_cast<A>(output[i]), g, p, at.h, at.w));
  }
}

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    second_kernel(I count, PoolGeometryOf<I> g, bool channels_last, opmath_t<T> p,
                  const T* __restrict__ direction, const T* __restrict__ grad_output,
                  const T* __restrict__ input, const T* __restrict__ output,
                  const T* __restrict__ directional, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const Position<I> at = position_of(i, g, channels_last, g.H, g.W);
    grad_input[i] = static_cast<T>(second_gradient<norm>(
        direction + at.in_plane, grad_output + at.out_plane, input + at.in_plane,
        output + at.out_plane, directional + at.out_plane, g, p, at.h, at.w));
  }
}

// ------------------------------------------------------------------------- NCHW, 2x2 and 3x3,
// stride 2

// |x|^p for p = 1, 2, and, kGeneral, 3 and 4. These kernels are not for other powers: pow would be
// their bound, and too much code where loops over windows and elements are unrolled.
template <Norm norm, typename A>
__device__ __forceinline__ A power_of(A x, A p) {
  if (norm == Norm::kTwo) return x * x;
  const A size = magnitude(x);
  return norm == Norm::kOne ? size : size * size * (p == A(3) ? size : size * size);
}

// And its inverse for p = 2, 3 and 4.
template <Norm norm, typename A>
__device__ __forceinline__ A root_of(A sum, A p) {
  if (norm == Norm::kTwo) return std::sqrt(sum);
  return p == A(3) ? std::cbrt(sum) : std::sqrt(std::sqrt(sum));
}

// dy/dx for the elements of a window with norm y: norm_gradient of lp_pool.h, kGeneral standing for
// p = 3 and 4, with one division for a window instead of one for an element. In float64 every
// element is divided, and below SafeNorm too.
template <Norm norm, typename A>
struct Slopes {
  A y, inverse = A(0);

  __device__ __forceinline__ explicit Slopes(A norm_of_window) : y(norm_of_window) {
    if constexpr (norm == Norm::kTwo || norm == Norm::kGeneral) {
      if (!std::is_same_v<A, double> && y > SafeNorm<A>::lower) inverse = A(1) / y;
    }
  }

  __device__ __forceinline__ A at(A x, A p) const {
    if constexpr (norm == Norm::kOne || norm == Norm::kInf) {
      return norm_gradient<norm>(x, y, p);
    } else {
      const A r = inverse != A(0) ? x * inverse : y == A(0) ? A(0) : x / y;
      return norm == Norm::kTwo ? r : r * (p == A(3) ? magnitude(r) : r * r);
    }
  }
};

// The p-norm of a window in registers.
template <Norm norm, int kTaps, typename A>
__device__ __forceinline__ A norm_of_taps(const A (&x)[kTaps], A p) {
  if constexpr (norm != Norm::kInf) {
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < kTaps; ++k) sum += power_of<norm>(x[k], p);
    if (norm == Norm::kOne) return sum;
    // Of squares, and as well of higher powers: what is lost to underflow does not count.
    if (is_safe_square_sum(sum)) return root_of<norm>(sum, p);
  }
  A largest = A(0);
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    const A size = magnitude(x[k]);
    if (size > largest || size != size) largest = size;  // nothing is above NaN: it stays
  }
  // Zero, infinity, NaN: the norm is the same, and dividing by it would make NaN of it.
  if (norm == Norm::kInf || !(largest > A(0)) || largest > std::numeric_limits<A>::max()) {
    return largest;
  }
  A sum = A(0);
#pragma unroll
  for (int k = 0; k < kTaps; ++k) sum += power_of<norm>(x[k] / largest, p);
  return largest * root_of<norm>(sum, p);
}

// Sizes of the planes that `pairs` kernels work on.
struct PairGeometry {
  int H, W, OH, OW;
  int columns;  // packs of a row in which windows begin, or, backward, all packs
};

// Where a thread's pack lies: its plane, its row of windows, its index in the row.
struct PairPlace {
  int plane, row, column;
};

__device__ __forceinline__ PairPlace pair_place(int item, int rows, int columns) {
  const unsigned above = static_cast<unsigned>(item) / static_cast<unsigned>(columns);
  const unsigned plane = above / static_cast<unsigned>(rows);
  return {static_cast<int>(plane), static_cast<int>(above - plane * static_cast<unsigned>(rows)),
          static_cast<int>(static_cast<unsigned>(item) - above * static_cast<unsigned>(columns))};
}

// n elements of each of kSize rows, n / 2 windows.
template <Norm norm, int kSize, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_pairs_kernel(int count, PairGeometry g, bool packed_out, opmath_t<T> p,
                         const T* __restrict__ input, T* __restrict__ output) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const PairPlace at = pair_place(item, g.OH, g.columns);
    const T* x = input + (at.plane * g.H + 2 * at.row) * g.W + at.column * n;
    const int ow = at.column * (n / 2);
    A rows[kSize][n + 1];
#pragma unroll
    for (int kh = 0; kh < kSize; ++kh) {
      const Pack<T, n> pack = load_pack<n>(x + kh * g.W);
#pragma unroll
      for (int j = 0; j < n; ++j) rows[kh][j] = static_cast<A>(pack.values[j]);
      // The last window of three columns reaches into the next pack.
      rows[kh][n] = kSize == 3 && ow + n / 2 <= g.OW ? static_cast<A>(x[kh * g.W + n]) : A(0);
    }
    Pack<T, n / 2> to;
#pragma unroll
    for (int m = 0; m < n / 2; ++m) {
      A taps[kSize * kSize];
#pragma unroll
      for (int kh = 0; kh < kSize; ++kh) {
#pragma unroll
        for (int kw = 0; kw < kSize; ++kw) taps[kh * kSize + kw] = rows[kh][2 * m + kw];
      }
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

// ------------------------------------------------------------------------------ NHWC, any windows

// The channels of a pack of one pixel, and where the pixel is.
struct ChannelPlace {
  int n, h, w, c;
};

__device__ __forceinline__ ChannelPlace channel_place(int item, int H, int W, int packs) {
  const unsigned pixel = static_cast<unsigned>(item) / static_cast<unsigned>(packs);
  const unsigned row = pixel / static_cast<unsigned>(W);
  const unsigned image = row / static_cast<unsigned>(H);
  return {static_cast<int>(image), static_cast<int>(row - image * static_cast<unsigned>(H)),
          static_cast<int>(pixel - row * static_cast<unsigned>(W)),
          static_cast<int>(static_cast<unsigned>(item) - pixel * static_cast<unsigned>(packs))};
}

template <Norm norm, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_channels_kernel(int count, PoolGeometryOf<int32_t> g, const T* __restrict__ input,
                            T* __restrict__ output) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, g.OH, g.OW, g.C / n);
    const T* image = input + g.input_offset(at.n, at.c * n);
    const int top = g.first_row(at.h), bottom = g.last_row(at.h);
    const int left = g.first_column(at.w), right = g.last_column(at.w);
    A sums[n] = {};
    for (int ih = top; ih < bottom; ++ih) {
      for (int iw = left; iw < right; ++iw) {
        const Pack<T, n> pack = load_pack<n>(image + ih * g.in_h + iw * g.in_w);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A x = static_cast<A>(pack.values[j]), size = magnitude(x);
          if (norm == Norm::kInf) {
            if (size > sums[j] || size != size) sums[j] = size;
          } else {
            sums[j] += norm == Norm::kTwo ? x * x : size;
          }
        }
      }
    }
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (norm == Norm::kTwo) {
        sums[j] = is_safe_square_sum(sums[j])
                      ? std::sqrt(sums[j])
                      : scaled_window_norm<norm>(image + j, g, A(2), at.h, at.w);
      }
      to.values[j] = static_cast<T>(sums[j]);
    }
    store_pack(output + item * n, to);
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

// ------------------------------------------------------------------------- NHWC, 2x2 and 3x3,
// stride 2

template <Norm norm, int kSize, int n, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_blocks_kernel(int count, PoolGeometryOf<int32_t> g, opmath_t<T> p,
                          const T* __restrict__ input, T* __restrict__ output) {
  using A = opmath_t<T>;
  for (int item = first_item<int>(); item < count; item += item_stride<int>()) {
    const ChannelPlace at = channel_place(item, g.OH, g.OW, g.C / n);
    const T* x = input + g.input_offset(at.n, at.c * n) + 2 * at.h * g.in_h + 2 * at.w * g.in_w;
    Pack<T, n> packs[kSize * kSize], to;
#pragma unroll
    for (int k = 0; k < kSize * kSize; ++k) {
      packs[k] = load_pack<n>(x + k / kSize * g.in_h + k % kSize * g.in_w);
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A taps[kSize * kSize];
#pragma unroll
      for (int k = 0; k < kSize * kSize; ++k) taps[k] = static_cast<A>(packs[k].values[j]);
      to.values[j] = static_cast<T>(norm_of_taps<norm>(taps, p));
    }
    store_pack(output + item * n, to);
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

// --------------------------------------------------------------------------------------- launches

// What the kernels with packs count in 32 bits: elements, and those a pack or a row beyond.
bool counts_in_32_bits(const PoolGeometry& g) {
  return fits_32_bits(g.N * g.C * g.H * g.W + 4 * g.W) && fits_32_bits(g.N * g.C * g.OH * g.OW);
}

// The k of k x k windows with stride 2 that lie inside the image, 2 or 3; 0 for other windows.
int common_window(const PoolGeometry& g) {
  const int64_t k = g.kernel_h;
  const bool common = (k == 2 || k == 3) && g.kernel_w == k && g.stride_h == 2 && g.stride_w == 2 &&
                      g.padding_h == 0 && g.padding_w == 0 && 2 * (g.OH - 1) + k <= g.H &&
                      2 * (g.OW - 1) + k <= g.W;
  return common ? static_cast<int>(k) : 0;
}

// Calls body with the largest pack that rows of the input consist of, and the sizes of its planes;
// false if there is none. NCHW.
template <typename T, typename F>
bool dispatch_row_pack(const PoolGeometry& g, bool aligned, F&& body) {
  constexpr int n = kPackSize<T>;
  if (!aligned || !counts_in_32_bits(g)) return false;
  const auto run = [&](auto pack) {
    constexpr int size = decltype(pack)::value;
    body(pack, PairGeometry{static_cast<int>(g.H), static_cast<int>(g.W), static_cast<int>(g.OH),
                            static_cast<int>(g.OW), static_cast<int>(g.W / size)});
  };
  if (g.W % n == 0) {
    run(Number<n>{});
    return true;
  }
  if constexpr (n > 2) {
    if (g.W % (n / 2) == 0) {
      run(Number<n / 2>{});
      return true;
    }
  }
  return false;
}

// Calls body with the geometry in 32 bits if channels can be taken in packs, and gives what it
// returns: whether it launched a kernel. NHWC.
template <typename T, typename F>
bool dispatch_channels(const PoolGeometry& g, bool aligned, F&& body) {
  // Sums of more terms are added in blocks, one thread a result.
  if (g.kernel_h * g.kernel_w > kBlockTerms) return false;
  if (!aligned || !counts_in_32_bits(g) || g.C % kPackSize<T> != 0) return false;
  bool launched = false;
  dispatch_index(g, [&](const auto& narrow) {
    if constexpr (std::is_same_v<std::decay_t<decltype(narrow)>, PoolGeometryOf<int32_t>>) {
      launched = body(narrow);
    }
  });
  return launched;
}

template <Norm norm, typename T>
bool forward_vectors(const Launcher& launcher, const PoolGeometry& g, bool channels_last, double p,
                     const T* input, T* output) {
  using A = opmath_t<T>;
  if (norm == Norm::kGeneral && p != 3 && p != 4) return false;
  const bool aligned = are_aligned(input, output);
  const int window = common_window(g);
  if (channels_last) {
    return dispatch_channels<T>(g, aligned, [&](const PoolGeometryOf<int32_t>& narrow) {
      // A thread of a 3x3 kernel would need too many registers for more channels.
      constexpr int n = kPackSize<T>, kFew = n < 4 ? n : 4;
      const auto run = [&](auto* kernel, int channels, const auto&... power) {
        const int64_t count = g.N * g.OH * g.OW * g.C / channels;
        launcher.run_over(kernel, count, static_cast<int>(count), narrow, power..., input, output);
        return true;
      };
      if constexpr (!std::is_same_v<T, double>) {
        const A power = static_cast<A>(p);
        if (window == 2) return run(forward_blocks_kernel<norm, 2, n, T>, n, power);
        if (window == 3) return run(forward_blocks_kernel<norm, 3, kFew, T>, kFew, power);
      }
      if constexpr (norm != Norm::kGeneral) return run(forward_channels_kernel<norm, n, T>, n);
      return false;
    });
  }
  return window > 0 && dispatch_row_pack<T>(g, aligned, [&](auto pack, PairGeometry pairs) {
           constexpr int n = decltype(pack)::value;
           pairs.columns = static_cast<int>(ceil_div(g.OW, n / 2));
           const int64_t count = g.N * g.C * g.OH * pairs.columns;
           launcher.run_over(window == 2 ? forward_pairs_kernel<norm, 2, n, T>
                                         : forward_pairs_kernel<norm, 3, n, T>,
                             count, static_cast<int>(count), pairs, g.OW % (n / 2) == 0,
                             static_cast<A>(p), input, output);
         });
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

// ------------------------------------------------------------------------------------- operators

Tensor lp_pool2d(const Tensor& input, double p, std::vector<int64_t> kernel,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d";
  const Images x = images_of(op, "input", input);
  const PoolGeometry geometry = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  p = usable_norm_type(op, p, input.scalar_type());
  const Launcher launcher(input);
  Tensor output = new_pooled(x, geometry);
  if (x.data.numel() == 0) return output;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      if (forward_vectors<norm>(launcher, geometry, x.channels_last, p, x.data.const_data_ptr<T>(),
                                output.mutable_data_ptr<T>())) {
        return;
      }
      dispatch_index(geometry, [&](const auto& g) {
        using I = decltype(g.N + 0);
        launcher.run_over(forward_kernel<norm, T, I>, output.numel(),
                          static_cast<I>(output.numel()), g, x.channels_last, static_cast<A>(p),
                          x.data.const_data_ptr<T>(), output.mutable_data_ptr<T>());
      });
    });
  });
  return output;
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

std::tuple<Tensor, Tensor> lp_pool2d_double_backward(const Tensor& grad_grad_input,
                                                     const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& output, double p,
                                                     std::vector<int64_t> kernel,
                                                     std::vector<int64_t> stride,
                                                     std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d_double_backward";
  const Images x = images_of(op, "input", input);
  const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  p = usable_norm_type(op, p, input.scalar_type());
  check_like(op, "grad_grad_input", grad_grad_input, "input", input);
  const Tensor direction = dense(grad_grad_input, x.channels_last);
  const Tensor y = pooled_like(op, "output", output, x, g);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, g);
  const Launcher launcher(input);
  Tensor directional = new_pooled(x, g);
  Tensor grad_input = empty_images(x, g.H, g.W);
  if (x.data.numel() == 0) return {directional, grad_input};
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    const T* v = direction.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    T* dd = directional.mutable_data_ptr<T>();
    dispatch_norm(p, [&](auto tag) {
      // Rare enough to do without a 32-bit version.
      constexpr Norm norm = decltype(tag)::value;
      launcher.run_over(directional_kernel<norm, T, int64_t>, directional.numel(),
                        directional.numel(), g, x.channels_last, static_cast<A>(p), v, in, out, dd);
      launcher.run_over(second_kernel<norm, T, int64_t>, grad_input.numel(), grad_input.numel(), g,
                        x.channels_last, static_cast<A>(p), v, grad.const_data_ptr<T>(), in, out,
                        static_cast<const T*>(dd), grad_input.mutable_data_ptr<T>());
    });
  });
  return {directional, grad_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("lp_pool2d", TORCH_BOX(&lp_pool2d));
  m.impl("lp_pool2d_backward", TORCH_BOX(&lp_pool2d_backward));
  m.impl("lp_pool2d_double_backward", TORCH_BOX(&lp_pool2d_double_backward));
}

}  // namespace mnist_ops::cuda
