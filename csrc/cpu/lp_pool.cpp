// LP pooling on the CPU.
//
// p = 1 and p = 2 are bound by memory: one read of the input and one write of the output forward,
// three reads and a write backward. They run over rows - in NCHW the outputs of one image row, in
// NHWC the channels of one pixel - so that the inner loop is a plain loop over contiguous results.
// The other norms are bound by pow (p = inf by its comparisons) and use the functions of one window
// and one element in ../lp_pool.h as they are.

#include "../lp_pool.h"

#include "common.h"

namespace mnist_ops::cpu {
namespace {

// The outputs [first, last) of a row whose tap at column offset kw lies inside the image.
struct Range {
  int64_t first, last;
};

Range outputs_with_tap(const PoolGeometry& g, int64_t kw) {
  const int64_t lead = g.padding_w - kw;  // ow * stride >= lead
  const int64_t first = lead > 0 ? (lead + g.stride_w - 1) / g.stride_w : 0;
  const int64_t limit = g.W - 1 + lead;  // ow * stride <= limit
  return {first, limit < 0 ? 0 : std::min(g.OW, limit / g.stride_w + 1)};
}

// ------------------------------------------------------------------------------- forward, p = 1, 2

template <Norm norm, typename A>
void accumulate(A* sum, const A* x, int64_t step, int64_t count) {
  const auto term = [](A value) { return norm == Norm::kTwo ? value * value : magnitude(value); };
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] += term(x[j]);
  } else if (step == 2) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] += term(x[2 * j]);
  } else {
    for (int64_t j = 0; j < count; ++j) sum[j] += term(x[j * step]);
  }
}

// From sums of squares to norms. again(j) computes output j by way of its largest element.
template <typename A, typename F>
void take_roots(A* y, int64_t count, const F& again) {
  bool safe = true;
#pragma omp simd reduction(&& : safe)
  for (int64_t j = 0; j < count; ++j) safe = safe && is_safe_square_sum(y[j]);
  if (safe) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = std::sqrt(y[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      y[j] = is_safe_square_sum(y[j]) ? std::sqrt(y[j]) : again(j);
    }
  }
}

template <Norm norm, typename T>
void forward_rows(const T* input, T* output, const PoolGeometry& g, bool channels_last) {
  using A = opmath_t<T>;
  const int64_t outer = channels_last ? g.N : g.N * g.C;  // images, or planes
  const int64_t in_line = channels_last ? g.C : g.W;
  const int64_t out_line = channels_last ? g.C : g.OW;
  const int64_t cost = g.OW * (channels_last ? g.C : 1) * g.kernel_h * g.kernel_w;
  parallel_for(outer * g.OH, cost, [&](int64_t begin, int64_t end) {
    std::vector<A> from(in_line), to(out_line);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t oh = item % g.OH;
      const T* image = input + item / g.OH * g.H * g.in_h;
      T* row = output + item * g.out_h;
      if (!channels_last) {
        A* y = stage(row, to.data());
        std::fill(y, y + g.OW, A(0));
        for (int64_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
          const A* x = load(image + ih * g.W, from.data(), g.W);
          for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
            const Range r = outputs_with_tap(g, kw);
            accumulate<norm>(y + r.first, x + r.first * g.stride_w - g.padding_w + kw, g.stride_w,
                             r.last - r.first);
          }
        }
        if constexpr (norm == Norm::kTwo) {
          take_roots(y, g.OW,
                     [&](int64_t ow) { return scaled_window_norm<norm>(image, g, A(2), oh, ow); });
        }
        store(y, row, g.OW);
      } else {
        for (int64_t ow = 0; ow < g.OW; ++ow) {
          A* y = stage(row + ow * g.C, to.data());
          std::fill(y, y + g.C, A(0));
          for (int64_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
            for (int64_t iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
              const A* x = load(image + ih * g.in_h + iw * g.in_w, from.data(), g.C);
              accumulate<norm>(y, x, 1, g.C);
            }
          }
          if constexpr (norm == Norm::kTwo) {
            take_roots(y, g.C, [&](int64_t c) {
              return scaled_window_norm<norm>(image + c, g, A(2), oh, ow);
            });
          }
          store(y, row + ow * g.C, g.C);
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------ backward, p = 1, 2

template <Norm norm, typename A>
void add_gradient(A* gx, const A* g, const A* x, const A* y, int64_t step, int64_t count) {
  const auto term = [](A grad, A in, A out) { return grad * norm_gradient<norm>(in, out, A(2)); };
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) gx[j] += term(g[j], x[j], y[j]);
  } else if (step == 2) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) gx[2 * j] += term(g[j], x[2 * j], y[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) gx[j * step] += term(g[j], x[j * step], y[j]);
  }
}

// One thread owns one row of grad_input and gathers from every window over it: no atomics, and the
// same order of additions whatever the number of threads.
template <Norm norm, typename T>
void backward_rows(const T* grad_output, const T* input, const T* output, T* grad_input,
                   const PoolGeometry& g, bool channels_last) {
  using A = opmath_t<T>;
  const int64_t outer = channels_last ? g.N : g.N * g.C;
  const int64_t width = channels_last ? g.W * g.C : g.W;
  const int64_t out_width = channels_last ? g.OW * g.C : g.OW;
  parallel_for(outer * g.H, 2 * width, [&](int64_t begin, int64_t end) {
    std::vector<A> from_x(width), from_g(out_width), from_y(out_width), to(width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t ih = item % g.H;
      const int64_t image = item / g.H * g.OH * g.out_h;
      const A* x = load(input + item * g.in_h, from_x.data(), width);
      A* gx = stage(grad_input + item * g.in_h, to.data());
      std::fill(gx, gx + width, A(0));
      for (int64_t oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
        const A* grad = load(grad_output + image + oh * g.out_h, from_g.data(), out_width);
        const A* y = load(output + image + oh * g.out_h, from_y.data(), out_width);
        for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
          const Range r = outputs_with_tap(g, kw);
          const int64_t iw = r.first * g.stride_w - g.padding_w + kw;
          if (!channels_last) {
            add_gradient<norm>(gx + iw, grad + r.first, x + iw, y + r.first, g.stride_w,
                               r.last - r.first);
          } else {
            for (int64_t ow = r.first; ow < r.last; ++ow) {
              const int64_t i = (ow * g.stride_w - g.padding_w + kw) * g.C, o = ow * g.C;
              add_gradient<norm>(gx + i, grad + o, x + i, y + o, 1, g.C);
            }
          }
        }
      }
      store(gx, grad_input + item * g.in_h, width);
    }
  });
}

// --------------------------------------------------------------- any norm, one result at a time

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

Tensor lp_pool2d(const Tensor& input, double p, std::vector<int64_t> kernel,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d";
  const Images x = images_of(op, "input", input);
  const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  Tensor output = empty_images(x, g.OH, g.OW);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      if constexpr (norm == Norm::kOne || norm == Norm::kTwo) {
        forward_rows<norm>(in, out, g, x.channels_last);
      } else {
        const int64_t cost = g.kernel_h * g.kernel_w * (norm == Norm::kInf ? 1 : 16);
        for_each_element(g, x.channels_last, g.OH, g.OW, cost,
                         [=](int64_t n, int64_t c, int64_t oh, int64_t ow) {
                           out[g.output_offset(n, c) + oh * g.out_h + ow * g.out_w] =
                               static_cast<T>(window_norm<norm>(in + g.input_offset(n, c), g,
                                                                static_cast<A>(p), oh, ow));
                         });
      }
    });
  });
  return output;
}

Tensor lp_pool2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& output,
                          double p, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "lp_pool2d_backward";
  const Images x = images_of(op, "input", input);
  const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
  const Tensor y = pooled_like(op, "output", output, x, g);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, g);
  Tensor grad_input = empty_images(x, g.H, g.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    const T* go = grad.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      if constexpr (norm == Norm::kOne || norm == Norm::kTwo) {
        backward_rows<norm>(go, in, out, gi, g, x.channels_last);
      } else {
        for_each_element(g, x.channels_last, g.H, g.W, norm == Norm::kInf ? 4 : 32,
                         [=](int64_t n, int64_t c, int64_t ih, int64_t iw) {
                           const int64_t i = g.input_offset(n, c), o = g.output_offset(n, c);
                           gi[i + ih * g.in_h + iw * g.in_w] = static_cast<T>(input_gradient<norm>(
                               go + o, in + i, out + o, g, static_cast<A>(p), ih, iw));
                         });
      }
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
  check_like(op, "grad_grad_input", grad_grad_input, "input", input);
  const Tensor direction = dense(grad_grad_input, x.channels_last);
  const Tensor y = pooled_like(op, "output", output, x, g);
  const Tensor grad = pooled_like(op, "grad_output", grad_output, x, g);
  Tensor directional = empty_images(x, g.OH, g.OW);
  Tensor grad_input = empty_images(x, g.H, g.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    const T* v = direction.const_data_ptr<T>();
    const T* out = y.const_data_ptr<T>();
    const T* go = grad.const_data_ptr<T>();
    T* dd = directional.mutable_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    dispatch_norm(p, [&](auto tag) {
      constexpr Norm norm = decltype(tag)::value;
      for_each_element(g, x.channels_last, g.OH, g.OW, 4 * g.kernel_h * g.kernel_w,
                       [=](int64_t n, int64_t c, int64_t oh, int64_t ow) {
                         const int64_t i = g.input_offset(n, c);
                         const int64_t o = g.output_offset(n, c) + oh * g.out_h + ow * g.out_w;
                         dd[o] = static_cast<T>(directional_derivative<norm>(
                             v + i, in + i, static_cast<A>(out[o]), g, static_cast<A>(p), oh, ow));
                       });
      for_each_element(g, x.channels_last, g.H, g.W, 8,
                       [=](int64_t n, int64_t c, int64_t ih, int64_t iw) {
                         const int64_t i = g.input_offset(n, c), o = g.output_offset(n, c);
                         gi[i + ih * g.in_h + iw * g.in_w] = static_cast<T>(second_gradient<norm>(
                             v + i, go + o, in + i, out + o, dd + o, g, static_cast<A>(p), ih, iw));
                       });
    });
  });
  return {directional, grad_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("lp_pool2d", TORCH_BOX(&lp_pool2d));
  m.impl("lp_pool2d_backward", TORCH_BOX(&lp_pool2d_backward));
  m.impl("lp_pool2d_double_backward", TORCH_BOX(&lp_pool2d_double_backward));
}

}  // namespace mnist_ops::cpu
