// A stage (activation, LP pooling, subtractive normalization) on the CPU.
//
// Reads the input once and writes the output once; what lies between stays in cache: a part of the
// image at a time is activated and pooled, and the pooled map of one image (in the type to compute
// in, whatever the tensors are) waits for its mean. Where windows tile the image a part is as many
// rows of them as fit into L1, of one plane in NCHW and of all channels in NHWC: one piece of
// memory either way. Where they overlap it is a plane, or up to 16 channels of every pixel. In
// float32 tanh bounds the forward pass, not memory, and the backward pass makes it once more.
//
// With at least as many images as threads each thread takes whole images; with fewer, the parts of
// each image are shared out. Results do not depend on the number of threads.

#include "../stage.h"

#include "blur.h"
#include "windows.h"

#include <memory>

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // elements converted at a time
constexpr int64_t kPart = 4096;   // elements of the input in a part, where it can be cut so small
constexpr int64_t kLanes = 16;    // channels of a part in NHWC where windows overlap

template <typename A>
std::unique_ptr<A[]> scratch(int64_t size) {
  return std::make_unique_for_overwrite<A[]>(static_cast<std::size_t>(size));
}

// Some channels, side by side, of neighbouring pixels of an image. Copies of it are dense, the
// lanes innermost.
struct Region {
  int64_t offset, pixels, lanes;
  int64_t pitch;  // from pixel to pixel

  int64_t size() const { return pixels * lanes; }

  // body(offset in the image, offset in a copy, count) for pieces of up to kChunk elements.
  template <typename F>
  void pieces(const F& body) const {
    if (pitch == lanes) {
      for (int64_t i = 0; i < size(); i += kChunk) {
        body(offset + i, i, std::min(kChunk, size() - i));
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) body(offset + p * pitch, p * lanes, lanes);
    }
  }
};

// to[i] = value(i-th element of the region). All types go by way of a buffer: from the image itself
// the compiler does not vectorise tanh.
template <typename T, typename A, typename F>
void read_region(const T* image, const Region& region, A* to, const F& value) {
  A buffer[kChunk];
  region.pieces([&](int64_t from, int64_t i, int64_t n) {
    convert(image + from, buffer, n);
    A* out = to + i;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = value(buffer[j]);
  });
}

// i-th element of the region = value(i).
template <typename T, typename A = opmath_t<T>, typename F>
void write_region(T* image, const Region& region, const F& value) {
  A buffer[kChunk];
  region.pieces([&](int64_t to, int64_t i, int64_t n) {
    A* out = stage(image + to, buffer);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = value(i + j);
    store(out, image + to, n);
  });
}

// ------------------------------------------------------------------------------ pooling of a block

// body(input offset, output offset, step, count) for runs of the elements at the same column of
// their window: of the windows of a row (one channel) or of the channels of one window.
template <typename F>
void over_taps(const PoolGeometry& g, const F& body) {
  // Columns that lie inside the image for some window: a window may be far wider than that.
  const int64_t first = std::max<int64_t>(0, g.padding_w - (g.OW - 1) * g.stride_w);
  const int64_t last = std::min(g.kernel_w, g.W + g.padding_w);
  for (int64_t kw = first; kw < last; ++kw) {
    const Range r = windows_with_tap(g, kw);
    const int64_t iw = r.first * g.stride_w - g.padding_w + kw;
    if (g.C == 1) {
      if (r.last > r.first) body(iw, r.first, g.stride_w, r.last - r.first);
      continue;
    }
    for (int64_t ow = r.first, i = iw * g.C; ow < r.last; ++ow, i += g.stride_w * g.C) {
      body(i, ow * g.C, int64_t{1}, g.C);
    }
  }
}

// Whether whole windows lie side by side; what is left over on the right and below is in none.
bool is_tiled(const PoolGeometry& g) {
  return g.stride_h == g.kernel_h && g.stride_w == g.kernel_w && g.padding_h == 0 &&
         g.padding_w == 0 && g.OH * g.kernel_h <= g.H && g.OW * g.kernel_w <= g.W;
}

// The networks' windows.
bool is_pairs(const PoolGeometry& g) {
  return is_tiled(g) && g.C == 1 && g.kernel_h == 2 && g.kernel_w == 2;
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
  // Sums of more terms are added in blocks.
  if (norm == Norm::kInf || norm == Norm::kGeneral || g.kernel_h * g.kernel_w > kBlockTerms) {
    each_element(g.OH, g.OW, g.C, [&](int64_t l, int64_t oh, int64_t ow, int64_t o) {
      y[o] = window_norm<norm>(a + l, g, p, oh, ow);
    });
    return;
  }
  if constexpr (norm == Norm::kOne || norm == Norm::kTwo) {
    const int64_t size = g.OH * g.out_h;
    const bool pairs = is_pairs(g);
    if constexpr (kHasPairs && norm == Norm::kTwo && std::is_same_v<A, float>) {
      if (pairs) {
        for (int64_t oh = 0; oh < g.OH; ++oh) {
          const A* const top = a + 2 * oh * g.in_h;
          pair_norms(top, top + g.in_h, y + oh * g.out_h, g.OW);
        }
        return;
      }
    }
    if (!pairs) std::fill(y, y + size, A(0));
    for (int64_t oh = 0; oh < g.OH; ++oh) {
      A* sums = y + oh * g.out_h;
      if (pairs) {  // in one pass and the same order
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
        over_taps(g, [&](int64_t i, int64_t o, int64_t step, int64_t count) {
          add_terms<norm>(sums + o, row + i, step, count);
        });
      }
    }
    if constexpr (norm == Norm::kTwo) {
      // Windows of zeros are common behind rectifiers: they must not cost the others their vectors.
      A unsafe = A(0);
#pragma omp simd reduction(+ : unsafe)
      for (int64_t o = 0; o < size; ++o) {
        const A unsafety = unsafety_of_square_sum(y[o]);
        unsafe += unsafety;
        y[o] = unsafety == A(0) ? std::sqrt(y[o]) : A(-1);
      }
      if (unsafe != A(0)) {
        each_element(g.OH, g.OW, g.C, [&](int64_t l, int64_t oh, int64_t ow, int64_t o) {
          if (y[o] < A(0)) y[o] = scaled_window_norm<norm>(a + l, g, p, oh, ow);
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
  const int64_t covered = g.OH * g.kernel_h * g.in_h;  // by windows, where they tile the image
  if constexpr (kHasPairs && norm == Norm::kTwo && std::is_same_v<A, float>) {
    if (is_pairs(g) && 2 * g.OW == g.W) {
      for (int64_t oh = 0; oh < g.OH; ++oh) {
        const A* const top = a + 2 * oh * g.in_h;
        A* const to = ga + 2 * oh * g.in_h;
        pair_gradients(top, top + g.in_h, y + oh * g.out_h, gp + oh * g.out_h, to, to + g.in_h,
                       g.OW);
      }
      std::fill(ga + covered, ga + size, A(0));
      return;
    }
  }
  A small = A(0);  // gp / y first, once for each window, where that cannot overflow
  if constexpr (norm == Norm::kTwo) {
#pragma omp simd reduction(+ : small)
    for (int64_t o = 0; o < pooled; ++o) {
      const A is_small = y[o] > SafeNorm<A>::lower ? A(0) : A(1);
      small += y[o] == A(0) ? A(0) : is_small;
    }
  }
  if (!is_tiled(g) || small != A(0)) {
    // A row gathers from every window over it.
    std::fill(ga, ga + size, A(0));
    for (int64_t ih = 0; ih < g.H; ++ih) {
      const A* in = a + ih * g.in_h;
      A* to = ga + ih * g.in_h;
      for (int64_t oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
        const A *grad = gp + oh * g.out_h, *out = y + oh * g.out_h;
        over_taps(g, [&](int64_t i, int64_t o, int64_t step, int64_t count) {
          for (int64_t j = 0; j < count; ++j) {
            to[i + j * step] += grad[o + j] * norm_gradient<norm>(in[i + j * step], out[o + j], p);
          }
        });
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
      for (int64_t iw = 0; iw < g.OW * g.kernel_w; ++iw) {
        const A* window = from + iw / g.kernel_w * g.C;
#pragma omp simd
        for (int64_t l = 0; l < g.C; ++l) to[iw * g.C + l] = window[l];
      }
    }
    if (g.OW * g.kernel_w < g.W) std::fill(to + g.OW * g.kernel_w * g.C, to + g.in_h, A(0));
    for (int64_t kh = 1; kh < g.kernel_h; ++kh) std::copy(to, to + g.in_h, to + kh * g.in_h);
  }
#pragma omp simd
  for (int64_t i = 0; i < covered; ++i) ga[i] *= norm == Norm::kTwo ? a[i] : sign_of(a[i]);
  // After the product, which may be one with infinity.
  for (int64_t ih = 0; ih < g.OH * g.kernel_h && g.OW * g.kernel_w < g.W; ++ih) {
    std::fill(ga + ih * g.in_h + g.OW * g.kernel_w * g.C, ga + (ih + 1) * g.in_h, A(0));
  }
  std::fill(ga + covered, ga + size, A(0));
}

// -------------------------------------------------------------------------------------- one image

// A part of the input, what is pooled from it, and how.
struct Part {
  Region in, out;
  PoolGeometry g;
};

template <typename T>
struct Problem {
  using A = opmath_t<T>;
  StageArguments arguments;
  bool channels_last;
  const Blur<A>& blur;

  const PoolGeometry& g() const { return arguments.geometry; }
  A p() const { return static_cast<A>(arguments.p); }
  int64_t in_size() const { return g().C * g().H * g().W; }
  int64_t out_size() const { return g().C * pixels(); }
  int64_t pixels() const { return g().OH * g().OW; }  // of the output

  // body(part) for every part, shared out over the threads where they are free.
  template <typename F>
  void over_parts(int64_t cost, const F& body) const {
    const bool tiled = is_tiled(g());
    const int64_t C = g().C;
    const int64_t lanes = !channels_last ? 1 : tiled ? C : std::min(C, kLanes);
    // Elements of a row of windows.
    const int64_t row = std::min(g().kernel_h, g().H) * g().W * lanes;
    const int64_t rows = tiled ? std::clamp(kPart / row, int64_t{1}, g().OH) : g().OH;
    const int64_t strips = (g().OH + rows - 1) / rows, blocks = (C + lanes - 1) / lanes;
    parallel_for(blocks * strips, cost * rows * row, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        body(part(i / strips * lanes, lanes, i % strips * rows, rows, tiled));
      }
    });
  }

  Part part(int64_t c, int64_t lanes, int64_t row, int64_t rows, bool tiled) const {
    Part result{};
    PoolGeometry& part = result.g = g();
    lanes = std::min(lanes, part.C - c);
    const bool last = row + rows >= part.OH;  // takes what is left over below the windows, too
    const int64_t first = tiled ? row * part.kernel_h : 0;
    if (tiled) {
      part.OH = last ? part.OH - row : rows;
      part.H = last ? part.H - first : rows * part.kernel_h;
    }
    const int64_t pitch = channels_last ? part.C : 1;
    const int64_t plane = channels_last ? 1 : g().H * g().W;
    const int64_t out_plane = channels_last ? 1 : pixels();
    result.in = {c * plane + first * part.W * pitch, part.H * part.W, lanes, pitch};
    result.out = {c * out_plane + row * part.OW * pitch, part.OH * part.OW, lanes, pitch};
    part = block_geometry(part, lanes);
    return result;
  }

  // a = act(x) of a part.
  void activate(const T* x, const Region& region, A* a) const {
    dispatch_activation(arguments.activation, [&](auto tag) {
      read_region(x, region, a,
                  [](A value) { return activation_value<decltype(tag)::value>(value); });
    });
  }

  void pool(const A* a, A* y, const PoolGeometry& geometry) const {
    dispatch_norm(arguments.p,
                  [&](auto tag) { pool_block<decltype(tag)::value>(a, y, geometry, p()); });
  }

  // sum[pixel] = sum over the channels of a map, in the order of the channels in NCHW.
  void add_channels(const A* map, A* sum) const {
    const int64_t C = g().C, HW = pixels();
    parallel_for(HW, C, [=, this](int64_t begin, int64_t end) {
      if (channels_last) {
        for (int64_t q = begin; q < end; ++q) {
          const A* from = map + q * C;
          A total = A(0);
#pragma omp simd reduction(+ : total)
          for (int64_t c = 0; c < C; ++c) total += from[c];
          sum[q] = total;
        }
        return;
      }
      std::copy(map + begin, map + end, sum + begin);
      for (int64_t c = 1; c < C; ++c) {
        const A* from = map + c * HW;
#pragma omp simd
        for (int64_t q = begin; q < end; ++q) sum[q] += from[q];
      }
    });
  }

  // Both take the sum over channels, give the plane to subtract and use a third one.
  void mean_of(const A* sum, A* mean, A* plane) const {
    blur.apply(sum, mean, plane, false);
    for (int64_t q = 0; q < pixels(); ++q) {
      mean[q] = local_mean(mean[q], static_cast<A>(g().C), blur.coef[q]);
    }
  }
  void adjoint_mean_of(A* sum, A* mean, A* plane) const {
    for (int64_t q = 0; q < pixels(); ++q) sum[q] /= blur.coef[q];
    blur.apply(sum, mean, plane, true);
    for (int64_t q = 0; q < pixels(); ++q) mean[q] /= static_cast<A>(g().C);
  }

  // map[i] -= mean[its pixel], for a copy of a region of the map.
  void subtract(A* map, const Region& region, const A* mean) const {
    mean += channels_last ? region.offset / region.pitch : region.offset % pixels();
    if (region.lanes == 1) {
#pragma omp simd
      for (int64_t q = 0; q < region.pixels; ++q) map[q] -= mean[q];
      return;
    }
    for (int64_t q = 0; q < region.pixels; ++q) {
      A* pixel = map + q * region.lanes;
#pragma omp simd
      for (int64_t l = 0; l < region.lanes; ++l) pixel[l] -= mean[q];
    }
  }
};

// map: of the image's output; planes: three of its planes.
template <typename T, typename A = opmath_t<T>>
void forward_image(const Problem<T>& problem, const T* x, T* z, A* map, A* planes) {
  const int64_t HW = problem.pixels();
  A *sum = planes, *mean = planes + HW, *plane = planes + 2 * HW;
  problem.over_parts(8, [&](const Part& part) {
    const auto buffer = scratch<A>(part.in.size() + part.out.size());
    A *a = buffer.get(), *y = a + part.in.size();
    problem.activate(x, part.in, a);
    problem.pool(a, y, part.g);
    write_region(map, part.out, [=](int64_t i) { return y[i]; });
  });
  problem.add_channels(map, sum);
  problem.mean_of(sum, mean, plane);
  problem.over_parts(1, [&](const Part& part) {
    const auto y = scratch<A>(part.out.size());
    read_region(map, part.out, y.get(), [](A value) { return value; });
    problem.subtract(y.get(), part.out, mean);
    write_region(z, part.out, [from = y.get()](int64_t i) { return from[i]; });
  });
}

template <typename T, typename A = opmath_t<T>>
void backward_image(const Problem<T>& problem, const T* g, const T* x, T* gx, A* map, A* planes) {
  const int64_t HW = problem.pixels();
  A *sum = planes, *mean = planes + HW, *plane = planes + 2 * HW;
  const A* grads = load(g, map, problem.out_size());
  problem.add_channels(grads, sum);
  problem.adjoint_mean_of(sum, mean, plane);
  problem.over_parts(16, [&](const Part& part) {
    const int64_t size = part.in.size(), pooled = part.out.size();
    const auto buffer = scratch<A>(2 * (size + pooled));
    A *a = buffer.get(), *ga = a + size, *y = ga + size, *gp = y + pooled;
    read_region(grads, part.out, gp, [](A grad) { return grad; });
    problem.subtract(gp, part.out, mean);
    problem.activate(x, part.in, a);
    problem.pool(a, y, part.g);
    dispatch_norm(problem.arguments.p, [&](auto tag) {
      unpool_block<decltype(tag)::value>(gp, a, y, ga, part.g, problem.p());
    });
    dispatch_activation(problem.arguments.activation, [&](auto tag) {
      write_region(gx, part.in, [=](int64_t i) {
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
  const Problem<T> problem{arguments, x.channels_last, blur};
  const auto run = [&](int64_t begin, int64_t end) {
    const auto workspace = scratch<A>(problem.out_size() + 3 * problem.pixels());
    for (int64_t n = begin; n < end; ++n) {
      body(problem, n, workspace.get(), workspace.get() + problem.out_size());
    }
  };
  if (g.N >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_for(g.N, 8 * problem.in_size(), run);
  } else {
    run(0, g.N);
  }
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  Tensor output = new_pooled(x, arguments.geometry);
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* in = x.data.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    for_each_image<T>(op, x, kernel, arguments, [&](const auto& problem, int64_t n, auto... rest) {
      forward_image(problem, in + n * problem.in_size(), out + n * problem.out_size(), rest...);
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
      backward_image(problem, go + n * problem.out_size(), in + n * problem.in_size(),
                     gi + n * problem.in_size(), rest...);
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
