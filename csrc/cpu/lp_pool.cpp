// LP pooling on the CPU.
//
// p = 1, 2, 3, 4 and inf are bound by memory: one read of the input and one write of the output
// forward, three reads and a write backward. Other norms are bound by their powers, one for each
// element and one for each window, which are vectorised as everything else is.
//
// Windows are taken a batch at a time, some hundreds of results that lie side by side in memory:
// whole rows of a plane in NCHW, pixels with their channels in NHWC. The k-th elements of all
// windows of the batch are gathered side by side, zeros where the image ends, which add nothing to
// any norm. So the loops over a batch are plain ones without strides, borders or remainders,
// whatever the windows look like, and all of it stays in the first-level cache. Backward the same
// elements are replaced by their gradients and go back to where they came from. The reports'
// windows (2 x 2, p = 2, float32) are not gathered, but stay in registers: in NHWC, and in NCHW
// where the processor has AVX2.
//
// A band of rows of the input's gradient belongs to one thread, and an element gets its windows'
// shares in their order: the same bits with any number of threads. Windows across the border of two
// bands are computed for both.

#include "grouping.h"

namespace mnist_ops::cpu {
namespace {

// What an element costs with this norm, in those of a plain sum.
int64_t power_cost(double p) {
  const bool plain = p == 3 || p == 4 || norm_of(p) != Norm::kGeneral;
  return plain ? 1 : 8;
}

template <typename T>
void forward_batches(const Grouping& all, double norm_type, const T* input, T* output) {
  using A = opmath_t<T>;
  constexpr bool in_place = std::is_same_v<T, float>;  // the type that has such loops
  const bool pairs = kHasPairs && norm_type == 2 && all.two_by_two();
  const bool fours = norm_type == 2 && all.pixels_by_four();
  const PoolGeometry& g = all.g;
  const A p = static_cast<A>(norm_type);
  const int64_t cost = all.inner * g.OW * all.taps * power_cost(norm_type);
  const int64_t groups = (g.OH + all.rows - 1) / all.rows;  // of rows of one plane or image
  const BatchLoops<A> loops = loops_of<A>(norm_type, all.taps);
  parallel_for(all.outer * groups, cost * all.rows, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch((all.taps + 2) * all.capacity + g.W * all.inner);
    A *elements = scratch.data(), *y = elements + all.taps * all.capacity;
    A *spare = y + all.capacity, *row = spare + all.capacity;
    for (int64_t item = begin; item < end; ++item) {
      const T* image = input + item / groups * g.H * g.in_h;
      T* out = output + item / groups * g.OH * g.out_h;
      const int64_t first = item % groups * all.rows;
      const auto gathered = [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
        all.gather(image, oh, rows, ow, columns, elements, row);
        const int64_t count = rows * columns * all.inner;
        const Batch<A> batch{elements, all.capacity, (count + kStep - 1) / kStep * kStep, all.taps};
        loops.norms(batch, count, p, y, spare);
        convert(y, out + oh * g.out_h + ow * all.inner, count);
      };
      const auto pool = [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
        if constexpr (in_place) {
          if (pairs || fours) {
            for (int64_t r = oh; r < oh + rows; ++r) {
              const T* const upper = image + 2 * r * g.in_h;
              T* const to = out + r * g.out_h;
              if (pairs) pair_norms(upper, upper + g.in_h, to, g.OW);
              for (int64_t w = ow; fours && w < ow + columns; ++w) {
                const T* const left = upper + 2 * w * g.in_w;
                if (pixel_norms(left, left + g.in_h, to + w * g.out_w, all.inner)) continue;
                gathered(r, 1, w, 1);
              }
            }
            return;
          }
        }
        gathered(oh, rows, ow, columns);
      };
      all.each_batch(first, std::min(first + all.rows, g.OH), pool);
    }
  });
}

template <typename T>
void backward_batches(const Grouping& all, double norm_type, const T* grad_output, const T* input,
                      const T* output, T* grad_input) {
  using A = opmath_t<T>;
  constexpr bool in_place = std::is_same_v<T, float>;  // the type that has such loops
  const bool pairs = kHasPairs && norm_type == 2 && all.two_by_two() && all.tiles();
  const bool fours = norm_type == 2 && all.pixels_by_four() && all.tiles();
  constexpr bool kDirect = std::is_same_v<T, A>;  // no conversion after the last addition
  constexpr int64_t kBand = 16384;                // elements of a band, or a few windows' rows
  const PoolGeometry& g = all.g;
  const A p = static_cast<A>(norm_type);
  const int64_t width = g.W * all.inner;
  const int64_t least = std::max<int64_t>(kBand / width, 4 * g.kernel_h);
  const int64_t band = std::min((least + g.stride_h - 1) / g.stride_h * g.stride_h, g.H);
  const int64_t bands = (g.H + band - 1) / band;
  const bool add = !all.disjoint(), clear = !all.tiles();
  const int64_t cost = 2 * width * band * power_cost(norm_type);
  const BatchLoops<A> loops = loops_of<A>(norm_type, all.taps);
  parallel_for(all.outer * bands, cost, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch((all.taps + 3) * all.capacity + width + (kDirect ? 0 : band * width));
    A *elements = scratch.data(), *y = elements + all.taps * all.capacity;
    A *grad = y + all.capacity, *spare = grad + all.capacity, *row = spare + all.capacity;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / bands, top = item % bands * band;
      const int64_t bottom = std::min(top + band, g.H);
      const T* in = input + image * g.H * g.in_h;
      const T *out = output + image * g.OH * g.out_h, *go = grad_output + image * g.OH * g.out_h;
      T* const to = grad_input + image * g.H * g.in_h + top * g.in_h;
      A* const gx = stage(to, row + width);
      if (clear) std::fill(gx, gx + (bottom - top) * width, A(0));
      const auto gathered = [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
        const int64_t count = rows * columns * all.inner, o = oh * g.out_h + ow * all.inner;
        all.gather(in, oh, rows, ow, columns, elements, row);
        convert(out + o, y, count);
        convert(go + o, grad, count);
        const Batch<A> batch{elements, all.capacity, (count + kStep - 1) / kStep * kStep, all.taps};
        loops.gradients(batch, p, grad, y, spare);
        all.scatter(elements, oh, rows, ow, columns, top, bottom, add, gx, y);
      };
      const auto pool = [&](int64_t oh, int64_t rows, int64_t ow, int64_t columns) {
        if constexpr (in_place) {
          if (pairs || fours) {
            for (int64_t r = oh; r < oh + rows; ++r) {
              const T* const upper = in + 2 * r * g.in_h;
              const int64_t o = r * g.out_h;
              A* const to = gx + (2 * r - top) * width;
              if (pairs) {
                pair_gradients(upper, upper + width, out + o, go + o, to, to + width, g.OW);
              }
              for (int64_t w = ow; fours && w < ow + columns; ++w) {
                const int64_t left = 2 * w * all.inner, at = o + w * all.inner;
                if (pixel_gradients(upper + left, upper + width + left, out + at, go + at,
                                    to + left, to + width + left, all.inner)) {
                  continue;
                }
                gathered(r, 1, w, 1);
              }
            }
            return;
          }
        }
        gathered(oh, rows, ow, columns);
      };
      all.each_batch(g.first_window(top), g.last_window(bottom - 1), pool);
      store(gx, to, (bottom - top) * width);
    }
  });
}

// --------------------------------------- windows too large to gather, second derivatives

// Calls body(n, c, h, w) for every element of an (N, C, H, W) tensor in the order of its memory.
template <typename F>
void for_each_element(const PoolGeometry& g, bool channels_last, int64_t H, int64_t W, int64_t cost,
                      const F& body) {
  const int64_t outer = channels_last ? g.N : g.N * g.C;
  const int64_t inner = channels_last ? g.C : 1;
  parallel_for(outer * H, W * inner * cost, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = channels_last ? item / H : item / H / g.C;
      for (int64_t w = 0; w < W; ++w) {
        for (int64_t i = 0; i < inner; ++i) {
          body(n, channels_last ? i : item / H % g.C, item % H, w);
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------------- operators
//
// What is not computed in batches is computed for half types in float32 throughout.

Tensor forward_each(const Images& x, const PoolGeometry& g, double p) {
  const Tensor image = converted(x.data, type_to_compute_in(x.data));
  Tensor output = empty_images(x, g.OH, g.OW, image.scalar_type());
  dispatch_computed(image, [&](auto element) {
    using A = decltype(element);
    const A* in = image.const_data_ptr<A>();
    A* out = output.mutable_data_ptr<A>();
    const int64_t cost = std::min(g.kernel_h * g.kernel_w, kGrain);
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      for_each_element(g, x.channels_last, g.OH, g.OW, cost,
                       [=](int64_t n, int64_t c, int64_t oh, int64_t ow) {
                         out[g.output_offset(n, c) + oh * g.out_h + ow * g.out_w] =
                             window_norm<norm>(in + g.input_offset(n, c), g, A(p), oh, ow);
                       });
    });
  });
  return converted(output, x.data.scalar_type());
}

Tensor backward_each(const Images& x, const PoolGeometry& g, double p, const Tensor& grad_output,
                     const Tensor& output) {
  const ScalarType dtype = type_to_compute_in(x.data);
  const Tensor image = converted(x.data, dtype), y = converted(output, dtype);
  const Tensor grad = converted(grad_output, dtype);
  Tensor grad_input = empty_images(x, g.H, g.W, dtype);
  dispatch_computed(image, [&](auto element) {
    using A = decltype(element);
    const A *in = image.const_data_ptr<A>(), *out = y.const_data_ptr<A>();
    const A* go = grad.const_data_ptr<A>();
    A* gi = grad_input.mutable_data_ptr<A>();
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      for_each_element(g, x.channels_last, g.H, g.W, 32,
                       [=](int64_t n, int64_t c, int64_t ih, int64_t iw) {
                         const int64_t i = g.input_offset(n, c), o = g.output_offset(n, c);
                         gi[i + ih * g.in_h + iw * g.in_w] =
                             input_gradient<norm>(go + o, in + i, out + o, g, A(p), ih, iw);
                       });
    });
  });
  return converted(grad_input, x.data.scalar_type());
}

}  // namespace

Tensor lp_pool2d(const Images& x, const PoolGeometry& g, double p) {
  if (x.data.numel() == 0) return new_pooled(x, g);
  const Grouping all(g, x.channels_last);
  if (!all.fits()) return forward_each(x, g, p);
  Tensor output = new_pooled(x, g);
  dispatch_floating("lp_pool2d", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    forward_batches(all, p, x.data.const_data_ptr<T>(), output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor lp_pool2d_backward(const Tensor& grad, const Images& x, const Tensor& y,
                          const PoolGeometry& g, double p) {
  if (x.data.numel() == 0) return empty_images(x, g.H, g.W);
  const Grouping all(g, x.channels_last);
  if (!all.fits()) return backward_each(x, g, p, grad, y);
  Tensor grad_input = empty_images(x, g.H, g.W);
  dispatch_floating("lp_pool2d", x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    backward_batches(all, p, grad.const_data_ptr<T>(), x.data.const_data_ptr<T>(),
                     y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

namespace {

void pool_second(const Tensor& direction, const Tensor& grad, const Images& x, const Tensor& y,
                 const PoolGeometry& g, double p, Tensor& by_grad, Tensor& by_input) {
  dispatch_computed(x.data, [&](auto element) {
    using A = decltype(element);
    const A *in = x.data.const_data_ptr<A>(), *v = direction.const_data_ptr<A>();
    const A *out = y.const_data_ptr<A>(), *go = grad.const_data_ptr<A>();
    A *dd = by_grad.mutable_data_ptr<A>(), *gi = by_input.mutable_data_ptr<A>();
    const int64_t cost = std::min(g.kernel_h * g.kernel_w, kGrain);
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      for_each_element(
          g, x.channels_last, g.OH, g.OW, cost, [=](int64_t n, int64_t c, int64_t oh, int64_t ow) {
            const int64_t i = g.input_offset(n, c);
            const int64_t o = g.output_offset(n, c) + oh * g.out_h + ow * g.out_w;
            dd[o] = directional_derivative<norm>(v + i, in + i, out[o], g, A(p), oh, ow);
          });
      for_each_element(
          g, x.channels_last, g.H, g.W, 8, [=](int64_t n, int64_t c, int64_t ih, int64_t iw) {
            const int64_t i = g.input_offset(n, c), o = g.output_offset(n, c);
            gi[i + ih * g.in_h + iw * g.in_w] =
                second_gradient<norm>(v + i, go + o, in + i, out + o, dd + o, g, A(p), ih, iw);
          });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  PoolOperators<&lp_pool2d, &lp_pool2d_backward, &pool_second>::register_all(m);
}

}  // namespace mnist_ops::cpu
