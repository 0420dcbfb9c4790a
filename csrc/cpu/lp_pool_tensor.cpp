// LP pooling with a p for each channel on the CPU: powers and logarithms, vectorised, are its
// bound.
//
// Many windows are taken a batch at a time, as in lp_pool.cpp. A few large ones of each plane, such
// as the whole map, are gathered one after the other, and the loops run over their elements.
//
// The gradient of p is the sum of a number for each band of rows, or plane, in their order: the
// same bits with any number of threads.

#include "../lp_pool_tensor.h"

#include "grouping.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kPowerCost = 16;  // of an element, in those of a plain sum

// Whether windows are to be taken in batches.
bool in_batches(const Grouping& all) {
  return all.fits() && all.rows * all.columns * all.inner >= kStep;
}

// Both s^p and s^(p-1) come from one of them, the one that is in range for every s in [0, 1].

template <typename A>
MNIST_OPS_HD A kept_power(const Quotient<A>& s, A p) {
  return cpu::power(s, p < A(0.5) ? p : p - A(1));
}

template <typename A>
MNIST_OPS_HD A power_of(A kept, const Quotient<A>& s, A p) {
  return p < A(0.5) ? kept : kept * s.plain();
}

// sign(x) s^(p-1) factor^2, with the conventions of power_slope.
template <typename A>
MNIST_OPS_HD A kept_slope(A kept, A x, const Quotient<A>& s, A p, A factor) {
  const A size = p < A(0.5) ? s.divide(kept, factor) : kept * factor * factor;
  const A slope = s.value != s.value ? s.value : x < A(0) ? -size : size;
  return x == A(0) ? A(0) : slope;
}

// ----------------------------------------------------------------------------------------- batches

// Numbers of each window of a batch, each kind in a row of its own.
template <typename A>
struct PowerBatch {
  const Grouping& all;
  std::vector<A> scratch;
  A *taps, *kept, *row;
  A *largest, *powers, *counts, *p, *y, *grad;
  A *nonzero, *shift, *scale, *share, *factor, *divergences;

  // Channels lie side by side in NHWC; in NCHW `begin` gives the p of a plane.
  PowerBatch(const Grouping& grouping, const A* p_of_channels)
      : all(grouping),
        scratch((2 * all.taps + 12) * all.capacity + all.g.W * all.inner, A(1)),
        taps(scratch.data()),
        kept(taps + all.taps * all.capacity) {
    A* next = kept + all.taps * all.capacity;
    for (A** const numbers : {&largest, &powers, &counts, &p, &y, &grad, &nonzero, &shift, &scale,
                              &share, &factor, &divergences}) {
      *numbers = next;
      next += all.capacity;
    }
    row = next;
    for (int64_t j = 0; j < all.capacity; ++j) p[j] = usable_power(p_of_channels[j % all.inner]);
  }

  void begin(A p_of_plane) { std::fill(p, p + all.capacity, usable_power(p_of_plane)); }

  PowerWindow<A> window(int64_t j) const {
    return {largest[j], powers[j], counts[j], p[j], divergences[j]};
  }

  // sum[j] = the sum over the window of term(i, j), i the element's place, as BlockSum adds it.
  template <typename F>
  void sum_taps(A* sum, int64_t n, const F& term) const {
    std::vector<double> totals(all.taps > kBlockTerms ? n : 0);
    for (int64_t first = 0; first < all.taps; first += kBlockTerms) {
      std::fill(sum, sum + n, A(0));
      for (int64_t k = first; k < std::min(first + kBlockTerms, all.taps); ++k) {
        const int64_t begin = k * all.capacity;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) sum[j] += term(begin + j, j);
      }
      for (size_t j = 0; j < totals.size(); ++j) totals[j] += static_cast<double>(sum[j]);
    }
    for (size_t j = 0; j < totals.size(); ++j) sum[j] = static_cast<A>(totals[j]);
  }

  // Gathers a batch, and finds m, S and n of each window; returns how many numbers there are,
  // rounded up.
  template <typename T>
  int64_t measure(const T* image, int64_t oh, int64_t rows, int64_t ow, int64_t columns,
                  bool average) {
    all.gather(image, oh, rows, ow, columns, taps, row);
    const int64_t n = (rows * columns * all.inner + kStep - 1) / kStep * kStep;
    for (int64_t r = 0; average && r < rows; ++r) {
      for (int64_t w = 0; w < columns; ++w) {
        A* const to = counts + (r * columns + w) * all.inner;
        std::fill(to, to + all.inner, pixels_of_window<A>(all.g, oh + r, ow + w));
      }
    }
    batch_largest<0>(Batch<A>{taps, all.capacity, n, all.taps}, largest);
    const A *const x = taps, *const m = largest, *const of_window = p;
    A* const keep = kept;
    sum_taps(powers, n, [=](int64_t i, int64_t j) {
      const Quotient<A> s(magnitude(x[i]), m[j]);
      keep[i] = kept_power(s, of_window[j]);
      return power_of(keep[i], s, of_window[j]);
    });
    return n;
  }

  // In place of each element the gradient of it, and in y that of p; `grad` is that of the output.
  void differentiate(int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const PowerWindow<A> measured = window(j);
      shift[j] = measured.shift();
      scale[j] = measured.scale();
      share[j] = measured.share(grad[j]);
      factor[j] = measured.factor();
    }
    A* const x = taps;
    const A *const keep = kept, *const m = largest, *const of_window = p, *const count = counts;
    const A *const shifts = shift, *const scales = scale, *const shares = share;
    const A* const factors = factor;
    const A* const not_zero = nonzero;
    // Zeros of the image count in the mean; those around it, which look the same, do not.
    sum_taps(nonzero, n, [=](int64_t i, int64_t) { return x[i] == A(0) ? A(0) : A(1); });
    sum_taps(divergences, n, [=](int64_t i, int64_t j) {
      const A value = x[i];
      const Quotient<A> s(magnitude(value), m[j]);
      const A power = power_of(keep[i], s, of_window[j]);
      const A part = divergence(s, power, of_window[j], count[j], shifts[j], scales[j]);
      x[i] = shares[j] * kept_slope(keep[i], value, s, of_window[j], factors[j]);
      return value == A(0) ? A(0) : part;
    });
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A zeros = count[j] - not_zero[j];
      divergences[j] += count[j] > A(1) ? zeros : A(0);
      y[j] = grad[j] * window(j).power_gradient();
    }
  }
};

template <typename T>
void forward_batches(const Grouping& all, const opmath_t<T>* p, bool average, const T* input,
                     T* output) {
  using A = opmath_t<T>;
  const PoolGeometry& g = all.g;
  const int64_t groups = (g.OH + all.rows - 1) / all.rows;  // of rows of one plane or image
  const int64_t cost = kPowerCost * all.rows * g.OW * all.inner * all.taps;
  parallel_for(all.outer * groups, cost, [&](int64_t begin, int64_t end) {
    PowerBatch<A> batch(all, p);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / groups, first = item % groups * all.rows;
      if (all.inner == 1) batch.begin(p[image % g.C]);
      const T* const in = input + image * g.H * g.in_h;
      T* const out = output + image * g.OH * g.out_h;
      all.each_batch(first, std::min(first + all.rows, g.OH),
                     [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
                       const int64_t n = batch.measure(in, oh, rows, ow, columns, average);
#pragma omp simd
                       for (int64_t j = 0; j < n; ++j) batch.y[j] = batch.window(j).value();
                       convert(batch.y, out + oh * g.out_h + ow * all.inner,
                               rows * columns * all.inner);
                     });
    }
  });
}

// grad_p has a number for each channel and each item, those of an item side by side.
template <typename T>
void backward_batches(const Grouping& all, const opmath_t<T>* p, bool average, const T* grad_output,
                      const T* input, T* grad_input, opmath_t<T>* grad_p) {
  using A = opmath_t<T>;
  constexpr bool kDirect = std::is_same_v<T, A>;
  constexpr int64_t kBand = 16384;  // elements of a band, or a few windows' rows
  const PoolGeometry& g = all.g;
  const int64_t width = g.W * all.inner;
  const int64_t least = std::max<int64_t>(kBand / width, 4 * g.kernel_h);
  const int64_t band = std::min((least + g.stride_h - 1) / g.stride_h * g.stride_h, g.H);
  const int64_t bands = (g.H + band - 1) / band;
  const bool add = !all.disjoint(), clear = !all.tiles();
  std::vector<double> sums(all.outer * bands * all.inner);
  parallel_for(all.outer * bands, 2 * kPowerCost * width * band, [&](int64_t begin, int64_t end) {
    PowerBatch<A> batch(all, p);
    std::vector<A> staged(kDirect ? 0 : band * width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / bands, top = item % bands * band;
      const int64_t bottom = std::min(top + band, g.H);
      if (all.inner == 1) batch.begin(p[image % g.C]);
      const T* const in = input + image * g.H * g.in_h;
      const T* const go = grad_output + image * g.OH * g.out_h;
      T* const to = grad_input + image * g.H * g.in_h + top * g.in_h;
      A* const gx = stage(to, staged.data());
      double* const sum = sums.data() + item * all.inner;
      if (clear) std::fill(gx, gx + (bottom - top) * width, A(0));
      all.each_batch(g.first_window(top), g.last_window(bottom - 1),
                     [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
                       const int64_t n = batch.measure(in, oh, rows, ow, columns, average);
                       const int64_t of_row = columns * all.inner;
                       convert(go + oh * g.out_h + ow * all.inner, batch.grad, rows * of_row);
                       batch.differentiate(n);
                       for (int64_t r = 0; r < rows; ++r) {
                         // A window counts for the band in which it begins.
                         const int64_t start = g.first_row(oh + r);
                         if (start < top || start >= bottom) continue;
                         const A* const terms = batch.y + r * of_row;
                         for (int64_t j = 0; j < of_row; ++j)
                           sum[j % all.inner] += static_cast<double>(terms[j]);
                       }
                       all.scatter(batch.taps, oh, rows, ow, columns, top, bottom, add, gx,
                                   batch.kept);
                     });
      store(gx, to, (bottom - top) * width);
    }
  });
  std::vector<double> totals(g.C);
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t item = static_cast<int64_t>(i) / all.inner;
    const bool planes = all.inner == 1;
    totals[planes ? item / bands % g.C : static_cast<int64_t>(i) % all.inner] += sums[i];
  }
  for (int64_t c = 0; c < g.C; ++c) grad_p[c] = static_cast<A>(totals[c]);
}

// ------------------------------------------------------------------------- one window after
// another

// The elements of one window side by side.
template <typename A>
struct PowerLine {
  const PoolGeometry& g;
  std::vector<A> elements, kept;
  int64_t n = 0;

  explicit PowerLine(const PoolGeometry& geometry)
      : g(geometry),
        elements(std::min(g.kernel_h, g.H) * std::min(g.kernel_w, g.W)),
        kept(elements.size()) {}

  // body(row of the plane's memory, columns, where they are among the elements) for its rows.
  template <typename F>
  void each_row(int64_t oh, int64_t ow, const F& body) {
    const int64_t first = g.first_column(ow), columns = g.last_column(ow) - first;
    A* to = elements.data();
    for (int64_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih, to += columns) {
      body(ih * g.in_h + first * g.in_w, columns, to);
    }
    n = to - elements.data();
  }

  // The sum of term(i) over the elements.
  template <typename F>
  A sum(const F& term) const {
    double total = 0;
    constexpr int64_t kBlock = 8 * kBlockTerms;  // so many terms for each number of a vector
    for (int64_t first = 0; first < n; first += kBlock) {
      A sum = A(0);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < std::min(first + kBlock, n); ++i) sum += term(i);
      total += static_cast<double>(sum);
    }
    return static_cast<A>(total);
  }

  template <typename T>
  PowerWindow<A> measure(const T* plane, int64_t oh, int64_t ow, A p, bool average) {
    each_row(oh, ow, [&](int64_t from, int64_t columns, A* to) {
      if (g.in_w == 1) return convert(plane + from, to, columns);
      for (int64_t i = 0; i < columns; ++i) to[i] = static_cast<A>(plane[from + i * g.in_w]);
    });
    const A* const x = elements.data();
    A largest = A(0), unordered = A(0);
#pragma omp simd reduction(max : largest) reduction(+ : unordered)
    for (int64_t i = 0; i < n; ++i) {
      const A size = magnitude(x[i]);
      largest = size > largest ? size : largest;
      unordered += x[i] == x[i] ? A(0) : A(1);
    }
    if (unordered > A(0)) largest = std::numeric_limits<A>::quiet_NaN();
    A* const keep = kept.data();
    const A powers = sum([=](int64_t i) {
      const Quotient<A> s(magnitude(x[i]), largest);
      keep[i] = kept_power(s, p);
      return power_of(keep[i], s, p);
    });
    return {largest, powers, average ? pixels_of_window<A>(g, oh, ow) : A(1), p};
  }

  // In place of each element the gradient of it; returns that of p.
  A differentiate(PowerWindow<A> window, A grad) {
    A* const x = elements.data();
    const A* const keep = kept.data();
    const A p = window.p, largest = window.largest, count = window.count;
    const A shift = window.shift(), scale = window.scale();
    const A share = window.share(grad), factor = window.factor();
    window.divergences = sum([=](int64_t i) {
      const A value = x[i];
      const Quotient<A> s(magnitude(value), largest);
      x[i] = share * kept_slope(keep[i], value, s, p, factor);
      return divergence(s, power_of(keep[i], s, p), p, count, shift, scale);
    });
    return grad * window.power_gradient();
  }
};

template <typename T>
void forward_lines(const PoolGeometry& g, const opmath_t<T>* p, bool average, const T* input,
                   T* output) {
  using A = opmath_t<T>;
  const int64_t cost = kPowerCost * std::min(g.kernel_h * g.kernel_w, kGrain) * g.OH * g.OW;
  parallel_for(g.N * g.C, cost, [&](int64_t begin, int64_t end) {
    PowerLine<A> line(g);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / g.C, c = plane % g.C;
      const A power = usable_power(p[c]);
      for (int64_t oh = 0; oh < g.OH; ++oh) {
        for (int64_t ow = 0; ow < g.OW; ++ow) {
          const auto window = line.measure(input + g.input_offset(n, c), oh, ow, power, average);
          output[g.output_offset(n, c) + oh * g.out_h + ow * g.out_w] =
              static_cast<T>(window.value());
        }
      }
    }
  });
}

template <typename T>
void backward_lines(const PoolGeometry& g, const opmath_t<T>* p, bool average, const T* grad_output,
                    const T* input, T* grad_input, opmath_t<T>* grad_p) {
  using A = opmath_t<T>;
  std::vector<double> sums(g.N * g.C);
  const int64_t cost = 2 * kPowerCost * std::min(g.kernel_h * g.kernel_w, kGrain) * g.OH * g.OW;
  parallel_for(g.N * g.C, cost, [&](int64_t begin, int64_t end) {
    PowerLine<A> line(g);
    std::vector<A> gradients(g.H * g.W);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / g.C, c = plane % g.C;
      const A power = usable_power(p[c]);
      std::fill(gradients.begin(), gradients.end(), A(0));
      for (int64_t oh = 0; oh < g.OH; ++oh) {
        for (int64_t ow = 0; ow < g.OW; ++ow) {
          const auto window = line.measure(input + g.input_offset(n, c), oh, ow, power, average);
          const A grad =
              static_cast<A>(grad_output[g.output_offset(n, c) + oh * g.out_h + ow * g.out_w]);
          sums[plane] += static_cast<double>(line.differentiate(window, grad));
          line.each_row(oh, ow, [&](int64_t from, int64_t columns, const A* slopes) {
            A* const to = gradients.data() + from / g.in_w;
            for (int64_t i = 0; i < columns; ++i) to[i] += slopes[i];
          });
        }
      }
      T* const to = grad_input + g.input_offset(n, c);
      if (g.in_w == 1) {
        convert(gradients.data(), to, g.H * g.W);
      } else {
        for (int64_t i = 0; i < g.H * g.W; ++i) to[i * g.in_w] = static_cast<T>(gradients[i]);
      }
    }
  });
  for (int64_t c = 0; c < g.C; ++c) {
    double total = 0;
    for (int64_t n = 0; n < g.N; ++n) total += sums[n * g.C + c];
    grad_p[c] = static_cast<A>(total);
  }
}

// --------------------------------------------------------------------------------------- operators

Tensor pooled(const Images& x, const PoolGeometry& g, const Tensor& p, bool average) {
  Tensor output = new_pooled(x, g);
  if (x.data.numel() == 0) return output;
  const Grouping all(g, x.channels_last);
  dispatch_floating("lp_pool2d_tensor_p", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto* powers = p.const_data_ptr<opmath_t<T>>();
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    if (in_batches(all)) return forward_batches(all, powers, average, in, out);
    forward_lines(g, powers, average, in, out);
  });
  return output;
}

std::tuple<Tensor, Tensor> gradients(const Tensor& grad_output, const Images& x,
                                     const PoolGeometry& g, const Tensor& p, bool average) {
  Tensor grad_input = empty_images(x, g.H, g.W), grad_p = new_like(p);
  if (x.data.numel() == 0) {
    torch::stable::zero_(grad_p);
    return {grad_input, grad_p};
  }
  const Grouping all(g, x.channels_last);
  dispatch_floating("lp_pool2d_tensor_p", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const A* powers = p.const_data_ptr<A>();
    const T *go = grad_output.const_data_ptr<T>(), *in = x.data.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    A* gp = grad_p.mutable_data_ptr<A>();
    if (in_batches(all)) return backward_batches(all, powers, average, go, in, gi, gp);
    backward_lines(g, powers, average, go, in, gi, gp);
  });
  return {grad_input, grad_p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  TensorPoolOperators<&pooled, &gradients>::register_all(m);
}

}  // namespace mnist_ops::cpu
