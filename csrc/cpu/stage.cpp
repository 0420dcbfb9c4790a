// A stage (activation, LP pooling, subtractive normalization) on the CPU.
//
// Reads the input once and writes the output once; what lies between stays in cache: a block of
// channels at a time is activated and pooled, the pooled map of one image (in the type to compute
// in, whatever the tensors are) waits for its mean. A block is one plane in NCHW and up to 16
// channels of each pixel, a cache line of float32, in NHWC. In float32 tanh bounds it, not memory.
//
// With at least as many images as threads each thread takes whole images; with fewer, the blocks of
// each image are shared out. Results do not depend on the number of threads: sums over channels are
// made in the order of the channels.

#include "../stage.h"

#include "blur.h"

#include <memory>

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a plane converted at a time
constexpr int64_t kBlockLanes = 16;

// Neighbouring channels of an image, with which work is done at a time.
struct Block {
  int64_t first, lanes;
};

// The images of one call: of the input or of the output.
struct Layout {
  int64_t C, pixels;
  bool channels_last;

  int64_t lanes() const { return channels_last ? std::min(C, kBlockLanes) : 1; }
  int64_t blocks() const { return (C + lanes() - 1) / lanes(); }
  Block block(int64_t b) const {
    const int64_t first = b * lanes();
    return {first, std::min(lanes(), C - first)};
  }
  int64_t size() const { return C * pixels; }

  // body(Block) for every block, shared out over the threads where they are free.
  template <typename F>
  void over_blocks(int64_t cost, const F& body) const {
    parallel_for(blocks(), cost * pixels * lanes(), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(block(b));
    });
  }
};

template <typename A>
std::unique_ptr<A[]> scratch(int64_t size) {
  return std::make_unique_for_overwrite<A[]>(static_cast<std::size_t>(size));
}

// to[pixel][lane] = value(element, pixel), for a block of an image. All types go by way of a
// buffer: from the image itself the compiler does not vectorise tanh.
template <typename T, typename A, typename F>
void read_block(const T* image, const Layout& layout, const Block& b, A* to, const F& value) {
  if (layout.channels_last) {
    A buffer[kBlockLanes];
    for (int64_t p = 0; p < layout.pixels; ++p) {
      convert(image + p * layout.C + b.first, buffer, b.lanes);
      A* out = to + p * b.lanes;
#pragma omp simd
      for (int64_t l = 0; l < b.lanes; ++l) out[l] = value(buffer[l], p);
    }
  } else {
    A buffer[kChunk];
    const T* plane = image + b.first * layout.pixels;
    for (int64_t p0 = 0; p0 < layout.pixels; p0 += kChunk) {
      const int64_t n = std::min(kChunk, layout.pixels - p0);
      convert(plane + p0, buffer, n);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) to[p0 + j] = value(buffer[j], p0 + j);
    }
  }
}

// The block's elements of an image = value(index in the block, pixel).
template <typename T, typename A = opmath_t<T>, typename F>
void write_block(T* image, const Layout& layout, const Block& b, const F& value) {
  if (layout.channels_last) {
    A buffer[kBlockLanes];
    for (int64_t p = 0; p < layout.pixels; ++p) {
      T* to = image + p * layout.C + b.first;
      A* out = stage(to, buffer);
#pragma omp simd
      for (int64_t l = 0; l < b.lanes; ++l) out[l] = value(p * b.lanes + l, p);
      store(out, to, b.lanes);
    }
  } else {
    A buffer[kChunk];
    T* plane = image + b.first * layout.pixels;
    for (int64_t p0 = 0; p0 < layout.pixels; p0 += kChunk) {
      const int64_t n = std::min(kChunk, layout.pixels - p0);
      A* out = stage(plane + p0, buffer);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) out[j] = value(p0 + j, p0 + j);
      store(out, plane + p0, n);
    }
  }
}

// ------------------------------------------------------------------------------ pooling of a block

// The windows [first, last) of a row whose tap at column offset kw lies inside the image.
struct Range {
  int64_t first, last;
};

Range windows_with_tap(const PoolGeometry& g, int64_t kw) {
  const int64_t lead = g.padding_w - kw;  // ow * stride >= lead
  const int64_t first = lead > 0 ? (lead + g.stride_w - 1) / g.stride_w : 0;
  const int64_t limit = g.W - 1 + lead;  // ow * stride <= limit
  return {first, limit < 0 ? 0 : std::min(g.OW, limit / g.stride_w + 1)};
}

// body(input offset, output offset, step, count) for runs of the elements at column offset kw: of
// the windows of a row (one channel) or of the channels of one window.
template <typename F>
void over_tap(const PoolGeometry& g, int64_t kw, const F& body) {
  const Range r = windows_with_tap(g, kw);
  const int64_t iw = r.first * g.stride_w - g.padding_w + kw;
  if (g.C == 1) {
    if (r.last > r.first) body(iw, r.first, g.stride_w, r.last - r.first);
    return;
  }
  for (int64_t ow = r.first, i = iw * g.C; ow < r.last; ++ow, i += g.stride_w * g.C) {
    body(i, ow * g.C, int64_t{1}, g.C);
  }
}

// Whether every element of the image lies in exactly one window.
bool is_tiled(const PoolGeometry& g) {
  return g.stride_h == g.kernel_h && g.stride_w == g.kernel_w && g.padding_h == 0 &&
         g.padding_w == 0 && g.OH * g.kernel_h == g.H && g.OW * g.kernel_w == g.W;
}

template <Norm norm, typename A>
MNIST_OPS_HD A term_of(A a) {
  return norm == Norm::kTwo ? a * a : magnitude(a);
}

template <Norm norm, typename A>
void add_terms(A* sum, const A* a, int64_t step, int64_t count) {
  const auto term = [](A value) { return term_of<norm>(value); };
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] += term(a[j]);
  } else if (step == 2) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] += term(a[2 * j]);
  } else {
    for (int64_t j = 0; j < count; ++j) sum[j] += term(a[j * step]);
  }
}

// body(lane, row, column, index) for every element of a block of H x W pixels.
template <typename F>
void each_element(int64_t H, int64_t W, int64_t lanes, const F& body) {
  int64_t i = 0;
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t w = 0; w < W; ++w) {
      for (int64_t l = 0; l < lanes; ++l, ++i) body(l, h, w, i);
    }
  }
}

template <Norm norm, typename A>
void pool_block(const A* a, A* y, const PoolGeometry& g, A p) {
  if constexpr (norm == Norm::kInf || norm == Norm::kGeneral) {
    each_element(g.OH, g.OW, g.C, [&](int64_t l, int64_t oh, int64_t ow, int64_t o) {
      y[o] = window_norm<norm>(a + l, g, p, oh, ow);
    });
  } else {
    const int64_t size = g.OH * g.out_h;
    const bool pairs = is_tiled(g) && g.C == 1 && g.kernel_h == 2 && g.kernel_w == 2;
    if (!pairs) std::fill(y, y + size, A(0));
    for (int64_t oh = 0; oh < g.OH; ++oh) {
      A* sums = y + oh * g.out_h;
      if (pairs) {  // the networks' windows, in one pass and the same order
        const A *top = a + 2 * oh * g.in_h, *bottom = top + g.in_h;
#pragma omp simd
        for (int64_t ow = 0; ow < g.OW; ++ow) {
          sums[ow] = term_of<norm>(top[2 * ow]) + term_of<norm>(top[2 * ow + 1]) +
                     term_of<norm>(bottom[2 * ow]) + term_of<norm>(bottom[2 * ow + 1]);
        }
        continue;
      }
      for (int64_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
        const A* row = a + ih * g.in_h;
        for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
          over_tap(g, kw, [&](int64_t i, int64_t o, int64_t step, int64_t count) {
            add_terms<norm>(sums + o, row + i, step, count);
          });
        }
      }
    }
    if constexpr (norm == Norm::kTwo) {
      bool safe = true;
#pragma omp simd reduction(&& : safe)
      for (int64_t o = 0; o < size; ++o) safe = safe && is_safe_square_sum(y[o]);
      if (safe) {
#pragma omp simd
        for (int64_t o = 0; o < size; ++o) y[o] = std::sqrt(y[o]);
      } else {
        each_element(g.OH, g.OW, g.C, [&](int64_t l, int64_t oh, int64_t ow, int64_t o) {
          y[o] = is_safe_square_sum(y[o]) ? std::sqrt(y[o])
                                          : scaled_window_norm<norm>(a + l, g, p, oh, ow);
        });
      }
    }
  }
}

// ga = sum over windows of gp dy/da; gp is overwritten.
template <Norm norm, typename A>
void unpool_block(A* gp, const A* a, const A* y, A* ga, const PoolGeometry& g, A p) {
  if constexpr (norm == Norm::kInf || norm == Norm::kGeneral) {
    each_element(g.H, g.W, g.C, [&](int64_t l, int64_t ih, int64_t iw, int64_t i) {
      ga[i] = input_gradient<norm>(gp + l, a + l, y + l, g, p, ih, iw);
    });
    return;
  }
  const int64_t size = g.H * g.in_h, pooled = g.OH * g.out_h;
  bool divides = true;  // gp / y first, once for each window, where that cannot overflow
  if constexpr (norm == Norm::kTwo) {
#pragma omp simd reduction(&& : divides)
    for (int64_t o = 0; o < pooled; ++o) {
      divides = divides && (y[o] == A(0) || y[o] > SafeNorm<A>::lower);
    }
  }
  if (!is_tiled(g) || !divides) {
    // A row gathers from every window over it.
    std::fill(ga, ga + size, A(0));
    for (int64_t ih = 0; ih < g.H; ++ih) {
      const A* in = a + ih * g.in_h;
      A* to = ga + ih * g.in_h;
      for (int64_t oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
        const A *grad = gp + oh * g.out_h, *out = y + oh * g.out_h;
        for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
          over_tap(g, kw, [&](int64_t i, int64_t o, int64_t step, int64_t count) {
            for (int64_t j = 0; j < count; ++j) {
              to[i + j * step] +=
                  grad[o + j] * norm_gradient<norm>(in[i + j * step], out[o + j], p);
            }
          });
        }
      }
    }
    return;
  }
  if constexpr (norm == Norm::kTwo) {
#pragma omp simd
    for (int64_t o = 0; o < pooled; ++o) gp[o] = y[o] == A(0) ? A(0) : gp[o] / y[o];
  }
  // What a window gives to each of its elements is first put where they are, so that the rest is
  // one long loop.
  for (int64_t oh = 0; oh < g.OH; ++oh) {
    const A* from = gp + oh * g.out_h;
    A* to = ga + oh * g.kernel_h * g.in_h;
    if (g.C == 1 && g.kernel_w == 2) {
#pragma omp simd
      for (int64_t ow = 0; ow < g.OW; ++ow) to[2 * ow] = to[2 * ow + 1] = from[ow];
    } else {
      for (int64_t iw = 0; iw < g.W; ++iw) {
        const A* window = from + iw / g.kernel_w * g.C;
#pragma omp simd
        for (int64_t l = 0; l < g.C; ++l) to[iw * g.C + l] = window[l];
      }
    }
    for (int64_t kh = 1; kh < g.kernel_h; ++kh) std::copy(to, to + g.in_h, to + kh * g.in_h);
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) ga[i] *= norm == Norm::kTwo ? a[i] : sign_of(a[i]);
}

// -------------------------------------------------------------------------------------- one image

template <typename T>
struct Problem {
  using A = opmath_t<T>;
  StageArguments arguments;
  Layout in, out;
  const Blur<A>& blur;

  A p() const { return static_cast<A>(arguments.p); }
  PoolGeometry geometry(const Block& b) const {
    return block_geometry(arguments.geometry, b.lanes);
  }

  // a = act(x) of a block.
  void activate(const T* x, const Block& b, A* a) const {
    dispatch_activation(arguments.activation, [&](auto tag) {
      read_block(x, in, b, a, [](A value, int64_t) {
        return activation_value<decltype(tag)::value, Functions>(value);
      });
    });
  }

  void pool(const A* a, A* y, const PoolGeometry& g) const {
    dispatch_norm(arguments.p, [&](auto tag) { pool_block<decltype(tag)::value>(a, y, g, p()); });
  }

  // sum[pixel] = sum over channels of a map in blocks, [block][pixel][lane].
  void add_channels(const A* map, A* sum) const {
    parallel_for(out.pixels, out.C, [&](int64_t begin, int64_t end) {
      std::fill(sum + begin, sum + end, A(0));
      for (int64_t k = 0; k < out.blocks(); ++k) {
        const Block b = out.block(k);
        const A* from = map + b.first * out.pixels;
        if (b.lanes == 1) {
#pragma omp simd
          for (int64_t q = begin; q < end; ++q) sum[q] += from[q];
        } else {
          for (int64_t q = begin; q < end; ++q) {
            for (int64_t l = 0; l < b.lanes; ++l) sum[q] += from[q * b.lanes + l];
          }
        }
      }
    });
  }

  // Both take the sum over channels, give the plane to subtract and use a third one.
  void mean_of(const A* sum, A* mean, A* plane) const {
    blur.apply(sum, mean, plane, false);
    for (int64_t q = 0; q < out.pixels; ++q) {
      mean[q] = local_mean(mean[q], static_cast<A>(out.C), blur.coef[q]);
    }
  }
  void adjoint_mean_of(A* sum, A* mean, A* plane) const {
    for (int64_t q = 0; q < out.pixels; ++q) sum[q] /= blur.coef[q];
    blur.apply(sum, mean, plane, true);
    for (int64_t q = 0; q < out.pixels; ++q) mean[q] /= static_cast<A>(out.C);
  }
};

// map: the image's pooled channels, in blocks; planes: three of the output's size.
template <typename T, typename A = opmath_t<T>>
void forward_image(const Problem<T>& problem, const T* x, T* z, A* map, A* planes) {
  const Layout& out = problem.out;
  A *sum = planes, *mean = planes + out.pixels, *plane = planes + 2 * out.pixels;
  problem.in.over_blocks(8, [&](const Block& b) {
    const auto a = scratch<A>(problem.in.pixels * b.lanes);
    problem.activate(x, b, a.get());
    problem.pool(a.get(), map + b.first * out.pixels, problem.geometry(b));
  });
  problem.add_channels(map, sum);
  problem.mean_of(sum, mean, plane);
  out.over_blocks(1, [&](const Block& b) {
    const A* from = map + b.first * out.pixels;
    write_block(z, out, b, [=](int64_t i, int64_t pixel) { return from[i] - mean[pixel]; });
  });
}

template <typename T, typename A = opmath_t<T>>
void backward_image(const Problem<T>& problem, const T* g, const T* x, T* gx, A* map, A* planes) {
  const Layout &in = problem.in, &out = problem.out;
  A *sum = planes, *mean = planes + out.pixels, *plane = planes + 2 * out.pixels;
  out.over_blocks(1, [&](const Block& b) {
    read_block(g, out, b, map + b.first * out.pixels, [](A grad, int64_t) { return grad; });
  });
  problem.add_channels(map, sum);
  problem.adjoint_mean_of(sum, mean, plane);
  in.over_blocks(16, [&](const Block& b) {
    const PoolGeometry geometry = problem.geometry(b);
    const int64_t size = in.pixels * b.lanes, pooled = out.pixels * b.lanes;
    const auto buffer = scratch<A>(2 * size + pooled);
    A *a = buffer.get(), *ga = a + size, *y = ga + size;
    A* gp = map + b.first * out.pixels;
    if (b.lanes == 1) {
#pragma omp simd
      for (int64_t q = 0; q < pooled; ++q) gp[q] -= mean[q];
    } else {
      for (int64_t q = 0; q < out.pixels; ++q) {
#pragma omp simd
        for (int64_t l = 0; l < b.lanes; ++l) gp[q * b.lanes + l] -= mean[q];
      }
    }
    problem.activate(x, b, a);
    problem.pool(a, y, geometry);
    dispatch_norm(problem.arguments.p, [&](auto tag) {
      unpool_block<decltype(tag)::value>(gp, a, y, ga, geometry, problem.p());
    });
    dispatch_activation(problem.arguments.activation, [&](auto tag) {
      write_block(gx, in, b, [=](int64_t i, int64_t) {
        return activation_gradient<decltype(tag)::value>(ga[i], a[i]);
      });
    });
  });
}

// ------------------------------------------------------------------------------------- operators

// Runs body(problem, image, map, planes) for every image.
template <typename T, typename F>
void for_each_image(const char* op, const Images& x, const Tensor& kernel,
                    const StageArguments& arguments, const F& body) {
  using A = opmath_t<T>;
  const PoolGeometry& g = arguments.geometry;
  if (x.data.numel() == 0) return;
  const Blur<A> blur(op, kernel, g.OH, g.OW);
  const Problem<T> problem{
      arguments, {g.C, g.H * g.W, x.channels_last}, {g.C, g.OH * g.OW, x.channels_last}, blur};
  const auto run = [&](int64_t begin, int64_t end) {
    const auto map = scratch<A>(problem.out.size() + 3 * problem.out.pixels);
    for (int64_t n = begin; n < end; ++n) {
      body(problem, n, map.get(), map.get() + problem.out.size());
    }
  };
  if (g.N >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_for(g.N, 8 * problem.in.size(), run);
  } else {
    run(0, g.N);
  }
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  Tensor output = empty_images(x, arguments.geometry.OH, arguments.geometry.OW);
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    for_each_image<T>(op, x, kernel, arguments, [&](const auto& problem, int64_t n, auto... rest) {
      forward_image(problem, in + n * problem.in.size(), out + n * problem.out.size(), rest...);
    });
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  Tensor grad_input = empty_images(x, x.H, x.W);
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* go = grad_output.const_data_ptr<T>();
    const T* in = x.data.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    for_each_image<T>(op, x, kernel, arguments, [&](const auto& problem, int64_t n, auto... rest) {
      backward_image(problem, go + n * problem.out.size(), in + n * problem.in.size(),
                     gi + n * problem.in.size(), rest...);
    });
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cpu
