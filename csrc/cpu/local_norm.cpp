// Local normalization on the CPU.
//
// Bound by memory: subtractive reads the input twice (once for the mean, once to subtract) and
// writes once; the second reading comes from cache where an image fits into it. The blurs touch one
// plane per image, 1/C of the data. Reductions over channels add whole planes into one (NCHW) or
// along a pixel (NHWC), always in the order of the channels.
//
// With at least as many images as threads each thread takes whole images; with fewer, the rows of
// each image are shared out, step by step. Results do not depend on the number of threads.
//
// Squares leave the range of the type that computes long before their roots do. An image for which
// that happens (trusted() and what follows) is computed again in a wider type: whatever the type
// holds has its right result, and the digits of other images do not change.

#include "../local_norm.h"

#include "blur.h"

#include <atomic>
#include <optional>

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // pixels handled at a time: the planes' parts stay in L1

// The type in which the squares and third powers of A are far from the ends of the range. Where
// long double is no wider than double (not on x86 nor AArch64 with Linux), nothing is won.
template <typename A>
using Wider = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// ------------------------------------------------------------------- sums over channels, and back

// In NHWC a pixel's own numbers are loaded before the loop over its channels: indexed inside it,
// GCC gathers them for every channel, which took half of the time.

// sums[k][p] = sum over channels of terms_k(a, b, mean[p]), for the pixels [begin, end).
template <bool kChannelsLast, typename A, typename... F>
void reduce_channels(const A* a, const A* b, const A* mean, int64_t C, int64_t HW, int64_t begin,
                     int64_t end, A* const* sums, const F&... terms) {
  if constexpr (kChannelsLast) {
    for (int64_t p = begin; p < end; ++p) {
      const A *as = a + p * C, *bs = b + p * C;
      const A m = mean[p];
      int k = 0;
      const auto add_up = [&](const auto& term) {
        A sum = A(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) sum += term(as[c], bs[c], m);
        sums[k++][p] = sum;
      };
      (add_up(terms), ...);
    }
  } else {
    for (int64_t p0 = begin; p0 < end; p0 += kChunk) {
      const int64_t n = std::min(kChunk, end - p0);
      for (int64_t c = 0; c < C; ++c) {
        const A *as = a + c * HW + p0, *bs = b + c * HW + p0;
        int k = 0;
        const auto add_up = [&](const auto& term) {
          A* sum = sums[k++] + p0;
          if (c == 0) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) sum[j] = term(as[j], bs[j], mean[p0 + j]);
          } else {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) sum[j] += term(as[j], bs[j], mean[p0 + j]);
          }
        };
        (add_up(terms), ...);
      }
    }
  }
}

// out = value(a, b, planes[p]...) in every channel, for the pixels [begin, end).
template <bool kChannelsLast, typename A, typename F, typename... Planes>
void map_channels(const A* a, const A* b, A* out, int64_t C, int64_t HW, int64_t begin, int64_t end,
                  const F& value, const Planes*... planes) {
  if constexpr (kChannelsLast) {
    for (int64_t p = begin; p < end; ++p) {
      const auto pixel = [=](Planes... numbers) {
#pragma omp simd
        for (int64_t i = p * C; i < (p + 1) * C; ++i) out[i] = value(a[i], b[i], numbers...);
      };
      pixel(planes[p]...);
    }
  } else {
    for (int64_t p0 = begin; p0 < end; p0 += kChunk) {
      const int64_t n = std::min(kChunk, end - p0);
      for (int64_t c = 0; c < C; ++c) {
        const int64_t i = c * HW + p0;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[i + j] = value(a[i + j], b[i + j], planes[p0 + j]...);
      }
    }
  }
}

// -------------------------------------------------------------------------------------- one image

template <typename A>
struct Problem {
  int64_t C, HW;
  const Blur<A>& blur;
  LocalNormOptions options;
  bool last = false;  // no wider type is left: what came is the result

  // The pixels of one image, shared out over the threads where they are free.
  template <typename F>
  void over_pixels(const F& body) const {
    parallel_for(HW, 2 * C, body);
  }
  // Work on single planes.
  template <typename F>
  void over_plane(const F& body) const {
    parallel_for(HW, 2, body);
  }

  // What a plane of squares must reach for none of its digits to be lost. Below it, the type that
  // computes has lost some of the squares that count, or will.
  static constexpr A kSmallest = std::numeric_limits<A>::min() / std::numeric_limits<A>::epsilon();

  // Whether bad(p) is false for every pixel.
  template <typename F>
  bool none(const F& bad) const {
    if (last) return true;
    std::atomic<bool> found{false};
    over_plane([&](int64_t begin, int64_t end) {
      bool any = false;
      for (int64_t p = begin; p < end; ++p) any |= bad(p);
      if (any) found.store(true, std::memory_order_relaxed);
    });
    return !found;
  }

  // Whether a plane holds finite numbers alone.
  bool finite(const A* plane) const {
    return none([=](int64_t p) { return !(std::abs(plane[p]) <= std::numeric_limits<A>::max()); });
  }

  // Whether the deviations that follow from a blurred sum of squares are right: a small sum may be
  // wrong if its deviation is below the threshold anyway.
  bool trusted(const A* blurred) const {
    const A channels = static_cast<A>(C), threshold = static_cast<A>(options.threshold);
    const A* coef = blur.coef.data();
    return finite(blurred) && none([=](int64_t p) {
             return blurred[p] < kSmallest &&
                    !(std::abs(local_deviation(kSmallest, channels, coef[p])) < threshold);
           });
  }
};

// mean[p] = est(x) / coef from sum[p], the sum over channels; scratch is a plane.
template <typename A>
void mean_from_sum(const Problem<A>& problem, const A* sum, A* mean, A* scratch) {
  problem.blur.apply(sum, mean, scratch, false);
  const A channels = static_cast<A>(problem.C);
  const A* coef = problem.blur.coef.data();
  problem.over_plane([=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) mean[p] = local_mean(mean[p], channels, coef[p]);
  });
}

// The subtractive gradient's plane (*)^T(sum / coef) / C, in place of sum.
template <typename A>
void adjoint_mean(const Problem<A>& problem, A* sum, A* out, A* scratch) {
  const A channels = static_cast<A>(problem.C);
  const A* coef = problem.blur.coef.data();
  problem.over_plane([=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) sum[p] /= coef[p];
  });
  problem.blur.apply(sum, out, scratch, true);
  problem.over_plane([=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) out[p] /= channels;
  });
}

// These return false where A's range was not enough: then they are called again with a wider A.
template <bool kChannelsLast, typename A>
bool forward_image(const Problem<A>& problem, const A* x, A* y, A* planes) {
  const int64_t C = problem.C, HW = problem.HW;
  A *sum = planes, *scratch = planes + HW, *mean = planes + 2 * HW, *d = planes + 3 * HW;
  const bool divides = problem.options.kind != LocalNorm::kSubtractive;
  const bool subtracts = problem.options.kind != LocalNorm::kDivisive;

  if (subtracts) {
    problem.over_pixels([=](int64_t begin, int64_t end) {
      reduce_channels<kChannelsLast>(x, x, mean, C, HW, begin, end, &sum,
                                     [](A value, A, A) { return value; });
    });
    mean_from_sum(problem, sum, mean, scratch);
    if (!problem.finite(mean)) return false;
  } else {
    std::fill(mean, mean + HW, A(0));
  }
  if (divides) {
    problem.over_pixels([=](int64_t begin, int64_t end) {
      reduce_channels<kChannelsLast>(x, x, mean, C, HW, begin, end, &sum,
                                     [](A value, A, A m) { return (value - m) * (value - m); });
    });
    problem.blur.apply(sum, d, scratch, false);
    if (!problem.trusted(d)) return false;
    const A channels = static_cast<A>(C);
    const A threshold = static_cast<A>(problem.options.threshold);
    const A value = static_cast<A>(problem.options.value);
    const A* coef = problem.blur.coef.data();
    problem.over_plane([=](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        d[p] = divisor(local_deviation(d[p], channels, coef[p]), threshold, value);
      }
    });
  }
  problem.over_pixels([=](int64_t begin, int64_t end) {
    if (divides) {
      map_channels<kChannelsLast>(
          x, x, y, C, HW, begin, end, [](A value, A, A m, A by) { return (value - m) / by; }, mean,
          d);
    } else {
      map_channels<kChannelsLast>(
          x, x, y, C, HW, begin, end, [](A value, A, A m) { return value - m; }, mean);
    }
  });
  return true;
}

template <bool kChannelsLast, typename A>
bool subtractive_backward_image(const Problem<A>& problem, const A* g, A* gx, A* planes) {
  const int64_t C = problem.C, HW = problem.HW;
  A *sum = planes, *scratch = planes + HW, *t = planes + 2 * HW;
  problem.over_pixels([=](int64_t begin, int64_t end) {
    reduce_channels<kChannelsLast>(g, g, t, C, HW, begin, end, &sum,
                                   [](A grad, A, A) { return grad; });
  });
  adjoint_mean(problem, sum, t, scratch);
  if (!problem.finite(t)) return false;
  problem.over_pixels([=](int64_t begin, int64_t end) {
    map_channels<kChannelsLast>(
        g, g, gx, C, HW, begin, end, [](A grad, A, A s) { return grad - s; }, t);
  });
  return true;
}

// Divisive and contrastive: z = x - mean, with mean = 0 for the former. s is computed again from
// the input, in the pass over it that q needs anyway; nothing was saved by the forward.
template <bool kChannelsLast, typename A>
bool divisive_backward_image(const Problem<A>& problem, const A* g, const A* x, A* gx, A* planes) {
  const int64_t C = problem.C, HW = problem.HW;
  A *sum = planes, *scratch = planes + HW, *mean = planes + 2 * HW, *d = planes + 3 * HW,
    *q = planes + 4 * HW, *squares = planes + 5 * HW, *grads = planes + 6 * HW,
    *b = planes + 7 * HW, *t = planes + 8 * HW;
  const bool contrastive = problem.options.kind == LocalNorm::kContrastive;
  std::fill(mean, mean + HW, A(0));
  if (contrastive) {
    problem.over_pixels([=](int64_t begin, int64_t end) {
      reduce_channels<kChannelsLast>(x, x, mean, C, HW, begin, end, &sum,
                                     [](A value, A, A) { return value; });
    });
    mean_from_sum(problem, sum, mean, scratch);
    if (!problem.finite(mean)) return false;
  }
  problem.over_pixels([=](int64_t begin, int64_t end) {
    A* const sums[3] = {q, squares, grads};
    reduce_channels<kChannelsLast>(
        g, x, mean, C, HW, begin, end, sums,
        [](A grad, A value, A m) { return grad * (value - m); },
        [](A, A value, A m) { return (value - m) * (value - m); },
        [](A grad, A, A) { return grad; });
  });
  problem.blur.apply(squares, d, scratch, false);
  if (!problem.trusted(d)) return false;
  const A channels = static_cast<A>(C);
  const A threshold = static_cast<A>(problem.options.threshold);
  const A value = static_cast<A>(problem.options.value);
  const A* coef = problem.blur.coef.data();
  problem.over_plane([=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const A s = local_deviation(d[p], channels, coef[p]);
      q[p] = divisor_gradient(q[p], s, coef[p], threshold);
      d[p] = divisor(s, threshold, value);
    }
  });
  // Gradients have a range of their own.
  const bool in_range = problem.none([=](int64_t p) {
    const A h = std::abs(q[p]);
    return !(h <= 1 / Problem<A>::kSmallest) || (h > A(0) && h < Problem<A>::kSmallest);
  });
  if (!in_range) return false;
  problem.blur.apply(q, b, scratch, true);
  problem.over_plane([=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      b[p] /= channels;
      // sum over channels of the divisive gradient, for the subtractive one
      sum[p] = grads[p] / d[p] - (sum[p] - channels * mean[p]) * b[p];
    }
  });
  if (contrastive) {
    adjoint_mean(problem, sum, t, scratch);
  } else {
    std::fill(t, t + HW, A(0));
  }
  problem.over_pixels([=](int64_t begin, int64_t end) {
    map_channels<kChannelsLast>(
        g, x, gx, C, HW, begin, end,
        [](A grad, A in, A m, A by, A slope, A s) { return grad / by - (in - m) * slope - s; },
        mean, d, b, t);
  });
  return true;
}

// ------------------------------------------------------------------------------------- operators

template <typename From, typename To>
void convert_all(const From* from, To* to, int64_t count) {
  parallel_for(count, 1, [=](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<To, opmath_t<From>> || std::is_same_v<From, opmath_t<To>>) {
      convert(from + begin, to + begin, end - begin);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        to[i] = static_cast<To>(static_cast<opmath_t<To>>(static_cast<opmath_t<From>>(from[i])));
      }
    }
  });
}

// Memory for one image at a time, in the type that computes.
template <typename A>
struct Workspace {
  Problem<A> problem;
  std::vector<A> planes, converted;

  Workspace(const Images& images, const Blur<A>& blur, const LocalNormOptions& options,
            int64_t n_planes, bool last)
      : problem{images.C, images.H * images.W, blur, options, last},
        planes(n_planes * problem.HW) {}

  // body(problem, a, b, out, planes), with copies of the images where they are of another type.
  template <typename T, typename F>
  bool run(const T* a, const T* b, T* out, const F& body) {
    if constexpr (std::is_same_v<T, A>) {
      return body(problem, a, b, out, planes.data());
    } else {
      const int64_t n = problem.C * problem.HW;
      converted.resize(a == b ? 2 * n : 3 * n);
      A *in_a = converted.data(), *in_b = a == b ? in_a : in_a + n, *result = in_b + n;
      const A *first = in_a, *second = in_b;
      convert_all(a, in_a, n);
      if (a != b) convert_all(b, in_b, n);
      if (!body(problem, first, second, result, planes.data())) return false;
      convert_all(result, out, n);
      return true;
    }
  }
};

// Runs body(problem, a, b, out, planes) for every image, and where it returns false again in the
// wider type.
template <typename T, typename F>
void for_each_image(const char* op, const Images& images, const Tensor& kernel,
                    const LocalNormOptions& options, int64_t planes, const T* a, const T* b, T* out,
                    const F& body) {
  if (images.data.numel() == 0) return;
  using A = opmath_t<T>;
  const Blur<A> blur(op, kernel, images.H, images.W);
  const auto run = [&](int64_t begin, int64_t end) {
    Workspace<A> usual(images, blur, options, planes, false);
    std::optional<Blur<Wider<A>>> wide_blur;  // few calls need it
    std::optional<Workspace<Wider<A>>> wide;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n * images.stride_n();
      if (usual.run(a + i, b + i, out + i, body)) continue;
      if (!wide) {
        wide_blur.emplace(op, kernel, images.H, images.W);
        wide.emplace(images, *wide_blur, options, planes, true);
      }
      wide->run(a + i, b + i, out + i, body);
    }
  };
  if (images.N >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_for(images.N, 4 * images.stride_n(), run);
  } else {
    run(0, images.N);
  }
}

Tensor forward(const char* op, const Tensor& input, const Tensor& kernel,
               const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options, input.scalar_type());
  Tensor output = empty_images(x, x.H, x.W);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* in = x.data.const_data_ptr<T>();
    for_each_image(op, x, kernel, options, 4, in, in, output.mutable_data_ptr<T>(),
                   [&](const auto& problem, auto* image, auto*, auto* out, auto* planes) {
                     return x.channels_last ? forward_image<true>(problem, image, out, planes)
                                            : forward_image<false>(problem, image, out, planes);
                   });
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Tensor& input,
                const Tensor& kernel, const LocalNormOptions& options) {
  const Images x = images_of(op, "input", input);
  check_norm_kernel(op, kernel, input);
  check_norm_thresholds(op, options, input.scalar_type());
  check_like(op, "grad_output", grad_output, "input", input);
  const Tensor grad = dense(grad_output, x.channels_last);
  Tensor grad_input = empty_images(x, x.H, x.W);
  const bool subtractive = options.kind == LocalNorm::kSubtractive;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* go = grad.const_data_ptr<T>();
    const T* in = subtractive ? go : x.data.const_data_ptr<T>();
    for_each_image(op, x, kernel, options, 9, go, in, grad_input.mutable_data_ptr<T>(),
                   [&](const auto& problem, auto* g, auto* image, auto* gx, auto* planes) {
                     const auto run = [&](auto layout) {
                       constexpr bool kLast = decltype(layout)::value;
                       if (subtractive) {
                         return subtractive_backward_image<kLast>(problem, g, gx, planes);
                       }
                       return divisive_backward_image<kLast>(problem, g, image, gx, planes);
                     };
                     return x.channels_last ? run(std::true_type{}) : run(std::false_type{});
                   });
  });
  return grad_input;
}

using Operators = LocalNormOperators<&forward, &backward>;

}  // namespace

Tensor subtractive_norm2d(const char* op, const Tensor& input, const Tensor& kernel) {
  return forward(op, input, kernel, {LocalNorm::kSubtractive, 0, 0});
}

Tensor subtractive_norm2d_backward(const char* op, const Tensor& grad, const Tensor& kernel) {
  return backward(op, grad, grad, kernel, {LocalNorm::kSubtractive, 0, 0});
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cpu
