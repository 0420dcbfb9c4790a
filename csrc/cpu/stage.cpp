// A stage (activation, LP pooling, subtractive normalization) on the CPU.
//
// Where windows of 2 x 2 with p = 2 tile the image it reads the input once and writes the output
// once; what lies between stays in cache: some rows of windows at a time, of one plane in NCHW and
// of all channels in NHWC, are activated and pooled, and the pooled map of one image (in the type
// to compute in, whatever the tensors are) waits for its mean. In float32 tanh bounds the forward
// pass, not memory, and the backward pass makes it once more. Elsewhere the three operators run.
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
constexpr int64_t kPart = 4096;   // elements of the input in a part: it stays in L1

template <typename A>
std::unique_ptr<A[]> scratch(int64_t size) {
  return std::make_unique_for_overwrite<A[]>(static_cast<std::size_t>(size));
}

// ------------------------------------------------------------------------------------- activation

// a = act(x). All types go by way of a buffer: from the image itself the compiler does not
// vectorise tanh.
template <typename T, typename A>
void activate(ActivationKind activation, const T* x, A* a, int64_t count) {
  dispatch_activation(activation, [&](auto tag) {
    A buffer[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t n = std::min(kChunk, count - i);
      convert(x + i, buffer, n);
      A* to = a + i;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) to[j] = activation_value<decltype(tag)::value>(buffer[j]);
    }
  });
}

// gx = act'(a) ga; ga is overwritten.
template <typename T, typename A>
void activate_backward(ActivationKind activation, const A* a, A* ga, T* gx, int64_t count) {
  dispatch_activation(activation, [&](auto tag) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      ga[i] = activation_gradient<decltype(tag)::value>(ga[i], a[i]);
    }
  });
  convert(ga, gx, count);
}

// -------------------------------------------------------------------------------------- one image

// Some rows of windows, of one plane or of all channels: one piece of memory in the image, with
// what is left over below the last windows, and one in the output.
struct Part {
  int64_t in, in_size, out, out_size, rows;
};

template <typename T>
struct Problem {
  using A = opmath_t<T>;
  StageArguments arguments;
  bool channels_last;
  const Blur<A>& blur;

  const PoolGeometry& g() const { return arguments.geometry; }
  int64_t in_size() const { return g().C * g().H * g().W; }
  int64_t out_size() const { return g().C * pixels(); }
  int64_t pixels() const { return g().OH * g().OW; }  // of the output
  int64_t inner() const { return channels_last ? g().C : 1; }
  int64_t in_row() const { return g().W * inner(); }
  int64_t out_row() const { return g().OW * inner(); }

  // body(part) for every part, shared out over the threads where they are free.
  template <typename F>
  void over_parts(int64_t cost, const F& body) const {
    const int64_t H = g().H, OH = g().OH, planes = channels_last ? 1 : g().C;
    const int64_t rows = std::clamp(kPart / (2 * in_row()), int64_t{1}, OH);
    const int64_t strips = (OH + rows - 1) / rows;
    parallel_for(planes * strips, cost * rows * 2 * in_row(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / strips, first = i % strips * rows;
        const int64_t last = std::min(first + rows, OH), bottom = last == OH ? H : 2 * last;
        body(Part{(plane * H + 2 * first) * in_row(), (bottom - 2 * first) * in_row(),
                  (plane * OH + first) * out_row(), (last - first) * out_row(), last - first});
      }
    });
  }

  // body(first element in the upper row of pixels, index) for the windows of a row.
  template <typename F>
  void each_window(const F& body) const {
    const int64_t n = inner(), OW = g().OW;
    if (n == 1) {
#pragma omp simd
      for (int64_t ow = 0; ow < OW; ++ow) body(2 * ow, ow);
      return;
    }
    for (int64_t ow = 0; ow < OW; ++ow) {
#pragma omp simd
      for (int64_t l = 0; l < n; ++l) body(2 * ow * n + l, ow * n + l);
    }
  }

  // The norms of a row of windows.
  void pool_row(const A* upper, A* y) const {
    const A* const lower = upper + in_row();
    if constexpr (kHasPairs && std::is_same_v<A, float>) {
      if (inner() == 1) return pair_norms(upper, lower, y, g().OW);
    }
    const int64_t n = inner();
    each_window([=](int64_t i, int64_t o) {
      y[o] = upper[i] * upper[i] + upper[i + n] * upper[i + n] + lower[i] * lower[i] +
             lower[i + n] * lower[i + n];
    });
    // Windows of zeros are common behind rectifiers: they must not cost the others their vectors.
    A unsafe = A(0);
#pragma omp simd reduction(+ : unsafe)
    for (int64_t o = 0; o < out_row(); ++o) {
      const A unsafety = unsafety_of_square_sum(y[o]);
      unsafe += unsafety;
      y[o] = unsafety == A(0) ? std::sqrt(y[o]) : A(-1);
    }
    if (unsafe == A(0)) return;
    const PoolGeometry row = block_geometry(g(), n);
    for (int64_t o = 0; o < out_row(); ++o) {
      if (y[o] >= A(0)) continue;
      y[o] = scaled_window_norm<Norm::kTwo>(upper + o % n, row, A(2), int64_t{0}, o / n);
    }
  }

  // The gradients of a row of windows: grad dy/da, for the elements of windows; grad is
  // overwritten.
  void unpool_row(const A* upper, const A* y, A* grad, A* to_upper) const {
    const A* const lower = upper + in_row();
    A* const to_lower = to_upper + in_row();
    if constexpr (kHasPairs && std::is_same_v<A, float>) {
      if (inner() == 1) {
        return pair_gradients(upper, lower, y, grad, to_upper, to_lower, g().OW);
      }
    }
    const int64_t n = inner();
    const auto spread = [&](const auto& gradient) {
      each_window([=](int64_t i, int64_t o) {
        to_upper[i] = gradient(upper[i], o);
        to_upper[i + n] = gradient(upper[i + n], o);
        to_lower[i] = gradient(lower[i], o);
        to_lower[i + n] = gradient(lower[i + n], o);
      });
    };
    A small = A(0);  // grad / y first, once for each window, where that cannot overflow
#pragma omp simd reduction(+ : small)
    for (int64_t o = 0; o < out_row(); ++o) {
      const A is_small = y[o] > SafeNorm<A>::lower ? A(0) : A(1);
      small += y[o] == A(0) ? A(0) : is_small;
    }
    if (small != A(0)) {
      return spread(
          [=](A a, int64_t o) { return grad[o] * norm_gradient<Norm::kTwo>(a, y[o], A(2)); });
    }
#pragma omp simd
    for (int64_t o = 0; o < out_row(); ++o) grad[o] = y[o] == A(0) ? A(0) : grad[o] / y[o];
    spread([=](A a, int64_t o) { return a * grad[o]; });
  }

  void pool(const A* a, A* y, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) pool_row(a + 2 * r * in_row(), y + r * out_row());
  }

  void unpool(const A* a, const A* y, A* grad, A* ga, const Part& part) const {
    // What is left over beside and below the windows is in none.
    if (part.in_size != 4 * part.out_size) std::fill(ga, ga + part.in_size, A(0));
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t i = 2 * r * in_row(), o = r * out_row();
      unpool_row(a + i, y + o, grad + o, ga + i);
    }
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

  // map[i] -= mean[its pixel], for the output of a part.
  void subtract(A* map, const Part& part, const A* mean) const {
    mean += channels_last ? part.out / g().C : part.out % pixels();
    const int64_t n = inner();
    if (n == 1) {
#pragma omp simd
      for (int64_t q = 0; q < part.out_size; ++q) map[q] -= mean[q];
      return;
    }
    for (int64_t q = 0; q < part.out_size / n; ++q) {
      A* pixel = map + q * n;
#pragma omp simd
      for (int64_t l = 0; l < n; ++l) pixel[l] -= mean[q];
    }
  }
};

// map: of the image's output; planes: three of its planes.
template <typename T, typename A = opmath_t<T>>
void forward_image(const Problem<T>& problem, const T* x, T* z, A* map, A* planes) {
  const int64_t HW = problem.pixels();
  A *sum = planes, *mean = planes + HW, *plane = planes + 2 * HW;
  problem.over_parts(8, [&](const Part& part) {
    const auto a = scratch<A>(part.in_size);
    activate(problem.arguments.activation, x + part.in, a.get(), part.in_size);
    problem.pool(a.get(), map + part.out, part.rows);
  });
  problem.add_channels(map, sum);
  problem.mean_of(sum, mean, plane);
  problem.over_parts(1, [&](const Part& part) {
    problem.subtract(map + part.out, part, mean);
    convert(map + part.out, z + part.out, part.out_size);
  });
}

template <typename T, typename A = opmath_t<T>>
void backward_image(const Problem<T>& problem, const T* g, const T* x, T* gx, A* map, A* planes) {
  const int64_t HW = problem.pixels();
  A *sum = planes, *mean = planes + HW, *plane = planes + 2 * HW;
  const A* grads = load(g, map, problem.out_size());
  problem.add_channels(grads, sum);
  problem.adjoint_mean_of(sum, mean, plane);
  const ActivationKind activation = problem.arguments.activation;
  problem.over_parts(16, [&](const Part& part) {
    const int64_t size = part.in_size, pooled = part.out_size;
    const auto buffer = scratch<A>(2 * (size + pooled));
    A *a = buffer.get(), *ga = a + size, *y = ga + size, *gp = y + pooled;
    std::copy_n(grads + part.out, pooled, gp);
    problem.subtract(gp, part, mean);
    activate(activation, x + part.in, a, size);
    problem.pool(a, y, part.rows);
    problem.unpool(a, y, gp, ga, part);
    activate_backward(activation, a, ga, gx + part.in, size);
  });
}

// Runs body(problem, image, map, planes) for every image.
template <typename T, typename F>
void for_each_image(const char* op, const Images& x, const Tensor& kernel,
                    const StageArguments& arguments, const F& body) {
  using A = opmath_t<T>;
  const PoolGeometry& g = arguments.geometry;
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

// ------------------------------------------------------------------------------------- operators

struct Backend {
  static std::optional<Tensor> fused(const char* op, const Images& x, const Tensor& kernel,
                                     const StageArguments& arguments) {
    if (!is_tiled_by_twos(arguments)) return {};
    Tensor output = new_pooled(x, arguments.geometry);
    dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T* in = x.data.const_data_ptr<T>();
      T* out = output.mutable_data_ptr<T>();
      for_each_image<T>(op, x, kernel, arguments, [&](const auto& problem, int64_t n, auto... on) {
        forward_image(problem, in + n * problem.in_size(), out + n * problem.out_size(), on...);
      });
    });
    return output;
  }

  static std::optional<Tensor> fused_backward(const char* op, const Tensor& grad_output,
                                              const Images& x, const Tensor& kernel,
                                              const StageArguments& arguments) {
    if (!is_tiled_by_twos(arguments)) return {};
    Tensor grad_input = empty_images(x, x.H, x.W);
    dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T* go = grad_output.const_data_ptr<T>();
      const T* in = x.data.const_data_ptr<T>();
      T* gi = grad_input.mutable_data_ptr<T>();
      for_each_image<T>(op, x, kernel, arguments, [&](const auto& problem, int64_t n, auto... on) {
        backward_image(problem, go + n * problem.out_size(), in + n * problem.in_size(),
                       gi + n * problem.in_size(), on...);
      });
    });
    return grad_input;
  }

  static void activate(ActivationKind activation, const Tensor& x, Tensor& a) {
    dispatch_floating("stage2d", x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T* in = x.const_data_ptr<T>();
      auto* out = a.mutable_data_ptr<opmath_t<T>>();
      parallel_for(x.numel(), 8, [=](int64_t begin, int64_t end) {
        cpu::activate(activation, in + begin, out + begin, end - begin);
      });
    });
  }

  static void activate_backward(ActivationKind activation, const Tensor& a, Tensor& grad_a,
                                Tensor& grad_x) {
    dispatch_floating("stage2d", grad_x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = opmath_t<T>;
      const A* value = a.const_data_ptr<A>();
      A* grad = grad_a.mutable_data_ptr<A>();
      T* to = grad_x.mutable_data_ptr<T>();
      parallel_for(a.numel(), 1, [=](int64_t begin, int64_t end) {
        cpu::activate_backward(activation, value + begin, grad + begin, to + begin, end - begin);
      });
    });
  }

  static constexpr auto lp_pool2d = &cpu::lp_pool2d;
  static constexpr auto lp_pool2d_backward = &cpu::lp_pool2d_backward;
  static constexpr auto subtractive_norm2d = &cpu::subtractive_norm2d;
  static constexpr auto subtractive_norm2d_backward = &cpu::subtractive_norm2d_backward;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  StageOperators<Backend>::register_all(m);
}

}  // namespace mnist_ops::cpu
