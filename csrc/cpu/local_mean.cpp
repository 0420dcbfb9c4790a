// Means of neighbourhoods on the CPU.
//
// A thread takes as many rows of an image (NCHW: of a plane) at a time as fit into L2: it blurs
// them and their surroundings along the rows, then along the columns. But for the surroundings the
// input is read once. Rows are filled up with zeros to whole blocks, whose sums stay in registers.

#include "../local_mean.h"

#include "../online/simd.h"
#include "blur.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kPart = 1 << 15;  // elements of the rows taken at a time,
constexpr int64_t kRadii = 8;       // or so many times the kernel's radius of rows

// Sums under way: vectors in registers. With four of AVX-512's, rows of 32 were half zeros, and
// took 1.6 times as long; longer ones gained 0.05.
constexpr int64_t kSums = online::kVectorBytes == 64 ? 2 : 4;
template <typename A>
constexpr int64_t kVector = online::kVectorBytes / sizeof(A);
template <typename A>
constexpr int64_t kBlock = kSums * kVector<A>;

// out[m] = sum over k of weight[k * n + m] * x[m + k * step], for m < n, a multiple of kBlock.
template <typename A>
void along_row(const A* x, int64_t step, const A* weight, int64_t taps, int64_t n, A* out) {
  for (int64_t m = 0; m < n; m += kBlock<A>) {
    online::Vector<A> sums[kSums];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kSums; ++v) sums[v] = online::splat(A(0));
    for (int64_t k = 0; k < taps; ++k) {
      const A *const from = x + m + k * step, *const w = weight + k * n + m;
      for (int64_t v = 0; v < kSums; ++v) {
        const int64_t j = v * kVector<A>;
        sums[v] = online::fmadd(online::load(w + j), online::load(from + j), sums[v]);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kSums; ++v) online::store(out + m + v * kVector<A>, sums[v]);
  }
}

// out[m] = sum over k of weight[k * stride] * x[m + k * n], added to what is there or not. Rows of
// weight 0 are not looked at: they may lie outside, and infinity times 0 is NaN.
template <typename A>
void across_rows(const A* x, const A* weight, int64_t stride, int64_t taps, int64_t n, bool add,
                 A* out) {
  for (int64_t m = 0; m < n; m += kBlock<A>) {
    online::Vector<A> sums[kSums];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kSums; ++v) sums[v] = online::splat(A(0));
    for (int64_t k = 0; k < taps; ++k) {
      if (weight[k * stride] == A(0)) continue;
      const auto w = online::splat(weight[k * stride]);
      const A* const from = x + m + k * n;
      for (int64_t v = 0; v < kSums; ++v) {
        sums[v] = online::fmadd(w, online::load(from + v * kVector<A>), sums[v]);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kSums; ++v) {
      A* const to = out + m + v * kVector<A>;
      online::store(to, add ? online::load(to) + sums[v] : sums[v]);
    }
  }
}

template <typename T>
class Means {
 public:
  using A = opmath_t<T>;

  Means(const char* op, const Images& x, const Tensor& kernel, const MeanBands& bands)
      : bands_(bands),
        inner_(x.channels_last ? x.C : 1),
        length_(x.W * inner_),
        n_((length_ + kBlock<A> - 1) / kBlock<A> * kBlock<A>) {
    const Tensor k = kernel_in_double(kernel);
    const double* const values = k.const_data_ptr<double>();
    const double sum = kernel_sum(op, k);
    columns_ = table(bands.columns, 1, x.H, [=](int64_t a, int64_t d, int64_t h) {
      return bands.column_weight(values, sum, a, d, h);
    });
    rows_ = table(bands.rows, inner_, n_, [=](int64_t a, int64_t d, int64_t w) {
      return bands.row_weight(values, sum, a, d, w);
    });
  }

  void run(const T* in, T* out, int64_t planes) const {
    const int64_t H = bands_.columns.size, radius = bands_.columns.taps / 2;
    const int64_t height = std::min(H, std::max({kPart / n_, kRadii * radius, int64_t{1}}));
    const int64_t parts = (H + height - 1) / height;
    const int64_t taps = bands_.pairs * (bands_.rows.taps + bands_.columns.taps);
    parallel_for(planes * parts, height * n_ * taps / 4, [=, this](int64_t begin, int64_t end) {
      const int64_t width = n_ + 2 * margin();
      std::vector<A> padded((height + 2 * radius) * width), blurred((height + 2 * radius) * n_);
      std::vector<A> sums(height * n_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / parts * H * length_, first = i % parts * height;
        const int64_t last = std::min(H, first + height);
        const int64_t top = std::max(first - radius, int64_t{0});
        const int64_t bottom = std::min(H, last + radius);
        // All at once: what was just stored cannot be loaded at other addresses without waiting.
        for (int64_t h = top; h < bottom; ++h) {
          convert(in + plane + h * length_, padded.data() + (h - top) * width + margin(), length_);
        }
        for (int64_t a = 0; a < bands_.pairs; ++a) {
          for (int64_t h = top; h < bottom; ++h) {
            along_row(padded.data() + (h - top) * width, inner_,
                      rows_.data() + a * bands_.rows.taps * n_, bands_.rows.taps, n_,
                      blurred.data() + (h - first + radius) * n_);
          }
          for (int64_t h = first; h < last; ++h) {
            across_rows(blurred.data() + (h - first) * n_,
                        columns_.data() + a * bands_.columns.taps * H + h, H, bands_.columns.taps,
                        n_, a > 0, sums.data() + (h - first) * n_);
          }
        }
        for (int64_t h = first; h < last; ++h) {
          convert(sums.data() + (h - first) * n_, out + plane + h * length_, length_);
        }
      }
    });
  }

 private:
  // Weights in the type that computes, as [pair][tap][n], for positions of `inner` elements each;
  // 0 beyond the last.
  template <typename F>
  std::vector<A> table(const Band& band, int64_t inner, int64_t n, const F& weight) const {
    std::vector<A> all(bands_.pairs * band.taps * n);
    A* to = all.data();
    for (int64_t a = 0; a < bands_.pairs; ++a) {
      for (int64_t d = 0; d < band.taps; ++d, to += n) {
        for (int64_t i = 0; i < band.size; ++i) {
          // Far from the border, where no tap is folded back, all are the same.
          const bool inside = i >= band.taps && i + band.taps < band.size;
          const A value = inside ? to[(i - 1) * inner] : static_cast<A>(weight(a, d, i));
          std::fill(to + i * inner, to + (i + 1) * inner, value);
        }
      }
    }
    return all;
  }

  // Zeros on either side of a row.
  int64_t margin() const { return bands_.rows.taps / 2 * inner_; }

  MeanBands bands_;
  int64_t inner_, length_, n_;  // of a position, of a row, of a row filled up
  std::vector<A> columns_, rows_;
};

Tensor means(const char* op, const Images& x, const Tensor& kernel, const MeanBands& bands) {
  Tensor output = empty_images(x, x.H, x.W);
  if (output.numel() == 0) return output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    Means<T>(op, x, kernel, bands)
        .run(x.data.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
             x.channels_last ? x.N : x.N * x.C);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  LocalMeanOperators<&means>::register_all(m);
}

}  // namespace mnist_ops::cpu
