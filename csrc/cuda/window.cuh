// Windows of pooling: geometries in 32 bits, the place of a result, the norm of a kernel, a window
// in registers.
#pragma once

#include "../lp_pool.h"

#include "launch.cuh"

#include <limits>
#include <type_traits>

namespace mnist_ops::cuda {

inline PoolGeometryOf<int32_t> narrow(const PoolGeometry& g) {
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
  return s;
}

// Whether every index into so many images, and every bound of a window, fits into 32 bits.
inline bool fits_narrow(const PoolGeometry& g, int64_t images) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  return fits_32_bits(images * g.in_n) && fits_32_bits(images * g.out_n) && fits_32_bits(rows) &&
         fits_32_bits(columns);
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

// Stands for NormTag<norm> where a kernel finds out by itself which norm it is: with 64-bit
// indices, and where a gradient is differentiated. Both are rare.
struct AnyNorm {};

template <Norm norm, typename A, typename F>
__device__ __forceinline__ void with_norm(NormTag<norm> tag, A, const F& body) {
  body(tag);
}
template <typename A, typename F>
__device__ __forceinline__ void with_norm(AnyNorm, A p, const F& body) {
  if (p == A(1)) {
    body(NormTag<Norm::kOne>{});
  } else if (p == A(2)) {
    body(NormTag<Norm::kTwo>{});
  } else if (p > std::numeric_limits<A>::max()) {
    body(NormTag<Norm::kInf>{});
  } else {
    body(NormTag<Norm::kGeneral>{});
  }
}

// Blocks of kThreads threads that kernels of one result a thread leave registers for. Where nothing
// is said nvcc moves numbers to local memory for the sake of more of them.
template <typename T, typename I = int32_t>
constexpr int kResidentBlocks = sizeof(T) == 8 || sizeof(I) == 8 ? 2 : 4;

// Calls body(norm, geometry) with the geometry in 32 bits, and a kernel of its own for each norm,
// where every index fits: the divisions that find a result's window are then several times cheaper.
template <typename F>
void dispatch_window(const PoolGeometry& g, double p, const F& body) {
  if (!fits_narrow(g, g.N)) return body(AnyNorm{}, g);
  dispatch_norm(p, [&](auto tag) { body(tag, narrow(g)); });
}

// |x|^p for p = 1, 2, and, kGeneral, 3 and 4. Not for other powers: pow would be the bound, and
// too much code where loops over windows and elements are unrolled.
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

}  // namespace mnist_ops::cuda
