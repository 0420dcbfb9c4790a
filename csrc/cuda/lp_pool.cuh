// LP pooling on CUDA: what the kernels of both directions share.
//
// p = 1, 2 and inf are bound by memory: one read of the input and one write forward; gradient,
// input and output read and one write backward. Other norms are bound by pow, but for p = 3 and 4,
// which multiply. Three kinds of kernels, the first that fits:
//   pairs     NCHW, windows with stride 2 and no padding, 2x2 (the reports' pooling) with p = 1, 2,
//             3, 4 or inf, and backward 3x3 with p = 2: a thread takes a pack of neighbouring
//             elements of each of a window's rows. 2x2: everything is read and written once, in
//             packs, backward too, where the windows tile the image. 3x3: what windows share comes
//             from L1.
//   blocks    NHWC, the same 2x2 windows with p = 2, not in float64: a thread takes a pack of
//             channels of one result; backward, of the window's four pixels
//   one       a thread computes one result with the functions of ../lp_pool.h, results in the order
//             of memory, so that writes are coalesced and reads are apart by no more than the
//             stride.
// On an H100 the first two run at 90 to 103 % of a copy's bandwidth with p = 2 and 2x2 windows. The
// third one, in float32 and forward, with 3x3 windows and in NHWC with any, took no more than 30 to
// 35 us with its launch for 67 MB, 77 to 90 %: packs of channels could gain little there. Backward
// and half types of it have not been measured. Divisions that find a result's place are in 32 bits,
// two or three for all that a thread does.
//
// The gradients gather from the windows over an element, in a fixed order: no atomics.
#pragma once

#include "../lp_pool.h"

#include "memory.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {

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

// What the kernels with packs count in 32 bits: elements, and those a pack or a row beyond.
inline bool counts_in_32_bits(const PoolGeometry& g) {
  return fits_32_bits(g.N * g.C * g.H * g.W + 4 * g.W) && fits_32_bits(g.N * g.C * g.OH * g.OW);
}

// The k of k x k windows with stride 2 that lie inside the image, 2 or 3; 0 for other windows.
inline int common_window(const PoolGeometry& g) {
  const int64_t k = g.kernel_h;
  const bool common = (k == 2 || k == 3) && g.kernel_w == k && g.stride_h == 2 && g.stride_w == 2 &&
                      g.padding_h == 0 && g.padding_w == 0 && 2 * (g.OH - 1) + k <= g.H &&
                      2 * (g.OW - 1) + k <= g.W;
  return common ? static_cast<int>(k) : 0;
}

// Calls body with n and the sizes in packs of n where rows of the input consist of those, and gives
// whether they do. NCHW.
template <typename T, int n, typename F>
bool dispatch_pack_of_row(const PoolGeometry& g, bool aligned, const F& body) {
  if (!aligned || !counts_in_32_bits(g) || g.W % n != 0) return false;
  body(Number<n>{},
       PairGeometry{static_cast<int>(g.H), static_cast<int>(g.W), static_cast<int>(g.OH),
                    static_cast<int>(g.OW), static_cast<int>(g.W / n)});
  return true;
}

// The same with a pack for 2x2 windows of this norm.
template <Norm norm, typename T, typename F>
bool dispatch_pairs(const PoolGeometry& g, bool aligned, const F& body) {
  if constexpr (norm == Norm::kTwo) {
    constexpr int n = kPackSize<T>, half = n > 2 ? n / 2 : 2;
    return dispatch_pack_of_row<T, n>(g, aligned, body) ||
           (half < n && dispatch_pack_of_row<T, half>(g, aligned, body));
  } else {
    return dispatch_pack_of_row<T, kShortPack<T>>(g, aligned, body);
  }
}

// Whether channels can be taken in packs, counted in 32 bits. NHWC.
template <typename T>
bool takes_channels(const PoolGeometry& g, bool aligned) {
  return aligned && g.C % kPackSize<T> == 0 && counts_in_32_bits(g) && fits_narrow(g, g.N);
}

}  // namespace mnist_ops::cuda
