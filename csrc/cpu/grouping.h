// Windows a batch at a time: how they are grouped, gathered from an image and scattered back.
#pragma once

#include "windows.h"

namespace mnist_ops::cpu {

// even[j] = x[2 j], odd[j] = x[2 j + 1].
template <typename A>
inline void split_pairs(const A* x, A* even, A* odd, int64_t count) {
  const auto plainly = [=] {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) even[j] = x[2 * j], odd[j] = x[2 * j + 1];
  };
#if defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const auto eight = [=](int64_t j) {
      _mm256_storeu_ps(even + j, swap_middle(every_other(x + 2 * j, false)));
      _mm256_storeu_ps(odd + j, swap_middle(every_other(x + 2 * j, true)));
    };
    return by_eights(count, eight, plainly);
  }
#endif
  plainly();
}

// The reverse.
template <typename A>
inline void join_pairs(const A* even, const A* odd, A* x, int64_t count) {
  const auto plainly = [=] {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) x[2 * j] = even[j], x[2 * j + 1] = odd[j];
  };
#if defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const auto eight = [=](int64_t j) {
      const __m256 a = _mm256_loadu_ps(even + j), b = _mm256_loadu_ps(odd + j);
      const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
      _mm256_storeu_ps(x + 2 * j, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(x + 2 * j + 8, _mm256_permute2f128_ps(low, high, 0x31));
    };
    return by_eights(count, eight, plainly);
  }
#endif
  plainly();
}

// How windows are grouped. `inner` numbers lie side by side at each pixel: 1, or all channels.
struct Grouping {
  PoolGeometry g;
  int64_t outer, inner, taps;
  int64_t rows, columns;  // of outputs in a batch; more than one row only with all columns
  int64_t capacity;       // numbers in a batch, rounded up

  static constexpr int64_t kBatch = 512;  // or one pixel's, or one row's, where that is more

  Grouping(const PoolGeometry& geometry, bool channels_last)
      : g(geometry),
        outer(channels_last ? g.N : g.N * g.C),
        inner(channels_last ? g.C : 1),
        taps(g.kernel_h * g.kernel_w) {
    columns =
        channels_last ? std::clamp<int64_t>(kBatch / std::max<int64_t>(inner, 1), 1, g.OW) : g.OW;
    rows = columns < g.OW ? 1 : std::clamp<int64_t>(kBatch / (g.OW * inner + 1), 1, g.OH);
    capacity = (rows * columns * inner + kStep - 1) / kStep * kStep;
  }

  // Beyond this the gathered windows would fill memory rather than a cache.
  bool fits() const { return taps <= (int64_t{1} << 18) / capacity; }
  // No element lies in two windows.
  bool disjoint() const { return g.stride_h >= g.kernel_h && g.stride_w >= g.kernel_w; }
  // Two rows of an image make a row of windows.
  bool two_by_two() const {
    return in_pairs() && g.kernel_w == 2 && g.kernel_h == 2 && g.stride_h == 2 &&
           g.padding_h == 0 && 2 * g.OH <= g.H;
  }
  // Two times two pixels with their channels make one.
  bool pixels_by_four() const {
    return inner > 1 && g.kernel_h == 2 && g.kernel_w == 2 && g.stride_h == 2 && g.stride_w == 2 &&
           g.padding_h == 0 && g.padding_w == 0 && 2 * g.OH <= g.H && 2 * g.OW <= g.W;
  }
  // Every element of the image lies in one window.
  bool tiles() const {
    return disjoint() && g.stride_h == g.kernel_h && g.stride_w == g.kernel_w && g.padding_h == 0 &&
           g.padding_w == 0 && g.OH * g.stride_h >= g.H && g.OW * g.stride_w >= g.W;
  }

  // body(oh, rows, ow, columns) for the batches of the rows [first, last) of outputs.
  template <typename F>
  void each_batch(int64_t first, int64_t last, const F& body) const {
    for (int64_t oh = first; oh < last; oh += rows) {
      for (int64_t ow = 0; ow < g.OW; ow += columns) {
        body(oh, std::min(rows, last - oh), ow, std::min(columns, g.OW - ow));
      }
    }
  }

  // taps[k][...] of a batch, from one plane or image; row has room for a row of the image.
  template <typename T, typename A>
  void gather(const T* image, int64_t oh, int64_t n_rows, int64_t ow, int64_t n_columns, A* to,
              A* row) const {
    const int64_t width = n_columns * inner, twos = in_pairs() ? g.kernel_w / 2 * 2 : 0;
    const bool odd = twos > 0 && twos < g.kernel_w;
    for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
      A* const taps_of_row = to + kh * g.kernel_w * capacity;
      for (int64_t r = 0; r < n_rows; ++r) {
        A* tap = taps_of_row + r * width;
        const int64_t ih = (oh + r) * g.stride_h - g.padding_h + kh;
        if (ih < 0 || ih >= g.H) {
          for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
            std::fill(tap + kw * capacity, tap + kw * capacity + width, A(0));
          }
          continue;
        }
        const A* x = load(image + ih * g.in_h, row, g.W * inner);
        for (int64_t kw = 0; kw < twos; kw += 2) {
          split_pairs(x + kw, tap + kw * capacity, tap + (kw + 1) * capacity, width);
        }
        for (int64_t kw = odd ? g.kernel_w : twos; kw < g.kernel_w; ++kw) {
          gather_tap(x, kw, ow, n_columns, tap + kw * capacity);
        }
      }
      if (!odd) continue;
      // An odd number's last tap is the next window's last but two; all rows at once.
      A* const last = taps_of_row + twos * capacity;
      std::copy(last - 2 * capacity + 1, last - 2 * capacity + n_rows * width, last);
      for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t ih = (oh + r) * g.stride_h - g.padding_h + kh;
        const T* const end = image + ih * g.in_h + twos + 2 * (width - 1);
        last[(r + 1) * width - 1] = ih < 0 || ih >= g.H ? A(0) : static_cast<A>(*end);
      }
    }
  }

  // The reverse: the rows [top, bottom) of an image, of which the first is at gradients; spare has
  // room for three numbers a window, where windows are three wide.
  template <typename A>
  void scatter(const A* from, int64_t oh, int64_t n_rows, int64_t ow, int64_t n_columns,
               int64_t top, int64_t bottom, bool add, A* gradients, A* spare) const {
    const int64_t width = n_columns * inner;
    const bool twos = in_pairs() && g.kernel_w == 2 && !add;
    const bool threes = in_pairs() && g.kernel_w == 3;
    for (int64_t kh = g.kernel_h - 1; kh >= 0; --kh) {  // an element's windows in their order
      const A* const taps_of_row = from + kh * g.kernel_w * capacity;
      if (threes) join_threes(taps_of_row, n_rows, spare);
      for (int64_t r = 0; r < n_rows; ++r) {
        const A* tap = taps_of_row + r * width;
        const int64_t ih = (oh + r) * g.stride_h - g.padding_h + kh;
        if (ih < top || ih >= bottom) continue;
        A* gx = gradients + (ih - top) * g.W * inner;
        if (threes) {
          const A* const sums = spare + 2 * r * width;
#pragma omp simd
          for (int64_t i = 0; i < 2 * width; ++i) gx[i] += sums[i];
          gx[2 * width] += taps_of_row[2 * capacity + (r + 1) * width - 1];
          continue;
        }
        if (twos) {
          join_pairs(tap, tap + capacity, gx, width);
          continue;
        }
        for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
          scatter_tap(tap + kw * capacity, kw, ow, n_columns, add, gx);
        }
      }
    }
  }

 private:
  // Rows of windows that begin at every other element and end inside the image.
  bool in_pairs() const {
    return inner == 1 && g.stride_w == 2 && g.padding_w == 0 && 2 * (g.OW - 1) + g.kernel_w <= g.W;
  }

  // The gradients of three taps at every other element, but for each row's last: those with an even
  // index come from the first tap and the window before's third, the others from the second tap.
  // All rows at once: a row is short.
  template <typename A>
  void join_threes(const A* first, int64_t n_rows, A* sums) const {
    const A *const second = first + capacity, *const third = second + capacity;
    const int64_t count = n_rows * g.OW;
    A* const even = sums + 2 * capacity;
#pragma omp simd
    for (int64_t j = 1; j < count; ++j) even[j] = first[j] + third[j - 1];
    for (int64_t j = 0; j < count; j += g.OW) even[j] = first[j];
    join_pairs(even, second, sums, count);
  }

  template <typename A>
  void gather_tap(const A* x, int64_t kw, int64_t ow, int64_t n_columns, A* tap) const {
    const Range inside = windows_with_tap(g, kw);
    const int64_t first = std::clamp(inside.first, ow, ow + n_columns);
    const int64_t last = std::clamp(inside.last, first, ow + n_columns);
    std::fill(tap, tap + (first - ow) * inner, A(0));
    std::fill(tap + (last - ow) * inner, tap + n_columns * inner, A(0));
    const A* from = x + (first * g.stride_w - g.padding_w + kw) * inner;
    A* to = tap + (first - ow) * inner;
    const int64_t count = last - first, step = g.stride_w;
    if (inner > 1) {
      for (int64_t j = 0; j < count; ++j) {
        std::copy(from + j * step * inner, from + (j * step + 1) * inner, to + j * inner);
      }
    } else if (step == 1) {
      std::copy(from, from + count, to);
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = from[j * step];
    }
  }

  template <typename A>
  void scatter_tap(const A* tap, int64_t kw, int64_t ow, int64_t n_columns, bool add, A* gx) const {
    const Range inside = windows_with_tap(g, kw);
    const int64_t first = std::clamp(inside.first, ow, ow + n_columns);
    const int64_t last = std::clamp(inside.last, first, ow + n_columns);
    const A* from = tap + (first - ow) * inner;
    A* to = gx + (first * g.stride_w - g.padding_w + kw) * inner;
    const int64_t count = last - first, step = g.stride_w * inner;
    if (inner > 1) {
      for (int64_t j = 0; j < count; ++j) {
        A* const t = to + j * step;
        const A* const f = from + j * inner;
        if (add) {
#pragma omp simd
          for (int64_t c = 0; c < inner; ++c) t[c] += f[c];
        } else {
          std::copy(f, f + inner, t);
        }
      }
    } else if (!add) {
      for (int64_t j = 0; j < count; ++j) to[j * step] = from[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) to[j * step] += from[j];
    }
  }
};

}  // namespace mnist_ops::cpu
