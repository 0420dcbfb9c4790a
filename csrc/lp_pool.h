// LP pooling: y = (sum over the window of |x|^p)^(1/p), windows clipped to the image.
//
// Checks, shapes, and the arithmetic of one window and of one input element, for both backends. The
// CUDA kernels are these functions with one thread per result; the CPU kernels use them for every
// norm that is not 1 or 2, and vectorised rows for those two.
//
// Numerics. For p = 2 the plain sum of squares is used where it can be trusted and the window is
// divided by its largest element where it cannot (overflow, underflow); for general p always.
// Gradients are written with r = |x| / y, which lies in [0, 1]: dy/dx = sign(x) r^(p-1). Powers
// below 2 of a quotient are in range where the quotient is not: it is held with a scale.
// Conventions where the derivative is not defined: 0 where x = 0 and where y = 0; for p = inf the
// gradient is shared evenly among equal maxima (the limit p -> inf).
#pragma once

#include "common.h"
#include "elementary.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

namespace mnist_ops {

enum class Norm { kOne, kTwo, kInf, kGeneral };

inline Norm norm_of(double p) {
  if (p == 1.0) return Norm::kOne;
  if (p == 2.0) return Norm::kTwo;
  return p == std::numeric_limits<double>::infinity() ? Norm::kInf : Norm::kGeneral;
}

// Calls body with the norm's tag, so that each norm is compiled on its own.
template <Norm N>
struct NormTag {
  static constexpr Norm value = N;
};

template <typename F>
void dispatch_norm(double p, F&& body) {
  switch (norm_of(p)) {
    case Norm::kOne:
      return body(NormTag<Norm::kOne>{});
    case Norm::kTwo:
      return body(NormTag<Norm::kTwo>{});
    case Norm::kInf:
      return body(NormTag<Norm::kInf>{});
    case Norm::kGeneral:
      return body(NormTag<Norm::kGeneral>{});
  }
}

// How windows lie on an image, and how far neighbours are apart in memory. I is the type of
// indices: int64_t, or int32_t on CUDA where every offset fits, which halves the cost of finding a
// window.
template <typename I>
struct PoolGeometryOf {
  I N, C, H, W, OH, OW;
  I kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  // Of the input; the output has the same memory layout.
  I in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;

  MNIST_OPS_HD I input_offset(I n, I c) const { return n * in_n + c * in_c; }
  MNIST_OPS_HD I output_offset(I n, I c) const { return n * out_n + c * out_c; }

  // The rows [first, last) of the window with index o along one dimension, clipped to the image.
  MNIST_OPS_HD I first_row(I oh) const { return clip(oh * stride_h - padding_h, H); }
  MNIST_OPS_HD I last_row(I oh) const { return clip(oh * stride_h - padding_h + kernel_h, H); }
  MNIST_OPS_HD I first_column(I ow) const { return clip(ow * stride_w - padding_w, W); }
  MNIST_OPS_HD I last_column(I ow) const { return clip(ow * stride_w - padding_w + kernel_w, W); }

  // The windows [first, last) that hold the element with index i along one dimension.
  MNIST_OPS_HD I first_window(I ih) const {
    return window_from(ih + padding_h, kernel_h, stride_h);
  }
  MNIST_OPS_HD I last_window(I ih) const { return lesser((ih + padding_h) / stride_h + 1, OH); }
  MNIST_OPS_HD I first_window_column(I iw) const {
    return window_from(iw + padding_w, kernel_w, stride_w);
  }
  MNIST_OPS_HD I last_window_column(I iw) const {
    return lesser((iw + padding_w) / stride_w + 1, OW);
  }

 private:
  MNIST_OPS_HD static I lesser(I a, I b) { return a < b ? a : b; }
  MNIST_OPS_HD static I clip(I i, I size) { return i < 0 ? 0 : lesser(i, size); }
  MNIST_OPS_HD static I window_from(I i, I kernel, I stride) {
    return i < kernel ? 0 : (i - kernel) / stride + 1;
  }
};

using PoolGeometry = PoolGeometryOf<int64_t>;

// ----------------------------------------------------------------------------- arithmetic, shared

// Square sums between these are as good as scaled ones: nothing that counts was lost to underflow,
// nothing overflowed. (Subnormal squares lose relative precision only below the lower bound.)
template <typename T>
struct SafeSquares;
template <>
struct SafeSquares<float> {
  static constexpr float lower = 1e-30f, upper = 1e37f;
};
template <>
struct SafeSquares<double> {
  static constexpr double lower = 1e-280, upper = 1e307;
};

// Norms above this divide any gradient that one may expect (below 1e20 in float32) without
// overflow.
template <typename T>
struct SafeNorm {
  static constexpr T lower = std::is_same_v<T, float> ? T(1e-15) : T(1e-140);
};

template <typename T>
MNIST_OPS_HD bool is_safe_square_sum(T sum) {
  return sum >= SafeSquares<T>::lower && sum <= SafeSquares<T>::upper;
}

// The opposite as a number, 0 where it is safe: a sum of these is vectorised, a conjunction is not.
template <typename T>
MNIST_OPS_HD T unsafety_of_square_sum(T sum) {
  const T below = sum >= SafeSquares<T>::lower ? T(0) : T(1);
  const T above = sum <= SafeSquares<T>::upper ? T(0) : T(1);
  return below + above;
}

template <typename T>
MNIST_OPS_HD T magnitude(T x) {
  return x < T(0) ? -x : x;  // NaN stays NaN
}

template <typename T>
MNIST_OPS_HD T sign_of(T x) {
  const T negative = x < T(0) ? T(-1) : T(0);
  return x > T(0) ? T(1) : negative;
}

// r^p for r >= 0, by multiplication where p is 1 to 4 (as it is for p = 3, 4 and their gradients).
template <typename T>
MNIST_OPS_HD T raised(T r, T p) {
  if (p == T(2)) return r * r;
  if (p == T(3)) return r * (r * r);
  if (p == T(4)) return (r * r) * (r * r);
  return p == T(1) ? r : std::pow(r, p);
}

// (size / divisor)^p, whatever the quotient.
template <typename T>
MNIST_OPS_HD T raised_quotient(T size, T divisor, T p) {
  const elementary::Quotient<T> r(size, divisor);
  if (!r.is_tiny || p >= T(2)) return raised(size / divisor, p);
  const T factor = std::exp2(p * (r.log2_of_scale / T(2)));
  return raised(r.value, p) * factor * factor;
}

// A sum that keeps its digits however many terms it has: blocks of terms, in order, whose sums are
// added in float64. Up to one block it is the plain sum, bit for bit; loops of fixed order may add
// as many terms themselves.
constexpr int64_t kBlockTerms = 64;

template <typename A>
class BlockSum {
 public:
  MNIST_OPS_HD void add(A term) {
    block_ += term;
    if (++terms_ == kBlockTerms) {
      total_ += static_cast<double>(block_);
      block_ = A(0), terms_ = 0;
    }
  }
  MNIST_OPS_HD A value() const { return static_cast<A>(total_ + static_cast<double>(block_)); }

 private:
  double total_ = 0;
  A block_ = A(0);
  int terms_ = 0;
};

// Largest magnitude of a window; NaN if there is one in it.
template <typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A window_max(const T* plane, const PoolGeometryOf<I>& g, I oh, I ow) {
  A largest = A(0);
  for (I ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (I iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      const A x = magnitude(static_cast<A>(plane[ih * g.in_h + iw * g.in_w]));
      if (x > largest || x != x) largest = x;  // nothing is above NaN: it stays
    }
  }
  return largest;
}

// The sum over a window of (|x| / largest)^p.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A scaled_power_sum(const T* plane, const PoolGeometryOf<I>& g, A p, A largest, I oh,
                                I ow) {
  BlockSum<A> sum;
  for (I ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (I iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      const A size = magnitude(static_cast<A>(plane[ih * g.in_h + iw * g.in_w]));
      const A r = size / largest;
      sum.add(norm == Norm::kTwo ? r * r : raised_quotient(size, largest, p));
    }
  }
  return sum.value();
}

// The p-norm of a window, by way of its largest element.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A scaled_window_norm(const T* plane, const PoolGeometryOf<I>& g, A p, I oh, I ow) {
  const A largest = window_max(plane, g, oh, ow);
  // Zero, infinity, NaN: the norm is the same, and dividing by it would make NaN of it.
  if (norm == Norm::kInf || !(largest > A(0)) || largest > std::numeric_limits<A>::max()) {
    return largest;
  }
  const A sum = scaled_power_sum<norm>(plane, g, p, largest, oh, ow);
  return largest * (norm == Norm::kTwo ? std::sqrt(sum) : std::pow(sum, A(1) / p));
}

// y of one window: plane points at the channel's first element.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A window_norm(const T* plane, const PoolGeometryOf<I>& g, A p, I oh, I ow) {
  if constexpr (norm == Norm::kInf || norm == Norm::kGeneral) {
    return scaled_window_norm<norm>(plane, g, p, oh, ow);
  } else {
    BlockSum<A> terms;
    for (I ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
      for (I iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
        const A x = static_cast<A>(plane[ih * g.in_h + iw * g.in_w]);
        terms.add(norm == Norm::kTwo ? x * x : magnitude(x));
      }
    }
    const A sum = terms.value();
    if (norm == Norm::kOne) return sum;
    return is_safe_square_sum(sum) ? std::sqrt(sum) : scaled_window_norm<norm>(plane, g, p, oh, ow);
  }
}

// How many elements of a window have its largest magnitude.
template <typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A window_ties(const T* plane, const PoolGeometryOf<I>& g, A y, I oh, I ow) {
  I ties = 0;  // float32 would stop at 2^24
  for (I ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (I iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      ties += I(magnitude(static_cast<A>(plane[ih * g.in_h + iw * g.in_w])) == y);
    }
  }
  return static_cast<A>(ties);
}

// dy/dx for an element x of a window with norm y. For p = inf the caller divides by the ties.
template <Norm norm, typename A>
MNIST_OPS_HD A norm_gradient(A x, A y, A p) {
  if constexpr (norm == Norm::kOne) {
    return sign_of(x);
  } else if constexpr (norm == Norm::kTwo) {
    return y == A(0) ? A(0) : x / y;
  } else if constexpr (norm == Norm::kInf) {
    if (y != y) return y;
    return magnitude(x) == y ? sign_of(x) : A(0);
  } else {
    if (y == A(0) || x == A(0)) return A(0);
    // Where y overflowed r is 0, and the slope 0 or, for p < 1, infinite.
    return sign_of(x) * raised_quotient(magnitude(x), y, p - A(1));
  }
}

// For p beyond this r^(p-1) magnifies the rounding of y too much: the window is looked at again.
constexpr int kSharpPower = 1024;

// The slopes of a window's elements. For such a p r is s S^(-1/p), with m the window's largest
// magnitude, s = |x| / m and S the sum of s^p; elsewhere the divisor is y and S is 1.
template <Norm norm, typename A>
struct WindowSlopes {
  A p, divisor, sum = A(1);

  template <typename T, typename I>
  MNIST_OPS_HD WindowSlopes(const T* plane, const PoolGeometryOf<I>& g, A y, A norm_type, I oh,
                            I ow)
      : p(norm_type), divisor(y) {
    if constexpr (norm == Norm::kGeneral) {
      if (!(p > A(kSharpPower)) || y == A(0)) return;
      const A largest = window_max(plane, g, oh, ow);
      if (!(largest <= std::numeric_limits<A>::max())) return;
      divisor = largest;
      sum = scaled_power_sum<norm>(plane, g, p, largest, oh, ow);
    }
  }

  // dy/dx = sign(x) r^(p-1).
  MNIST_OPS_HD A at(A x) const {
    const A slope = norm_gradient<norm>(x, divisor, p);
    return norm == Norm::kGeneral && sum != A(1) ? slope * std::pow(sum, A(1) / p - A(1)) : slope;
  }

  // r^(p-2); at r = 0 it is 0 for p > 2, and for p < 2, where it is infinite, by convention.
  MNIST_OPS_HD A curvature(A x) const {
    if (norm != Norm::kGeneral) return A(1);
    const A power = x == A(0) ? A(0) : raised_quotient(magnitude(x), divisor, p - A(2));
    return sum != A(1) ? power * std::pow(sum, A(2) / p - A(1)) : power;
  }
};

// The gradient of one input element: the sum over the windows that hold it, in a fixed order.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A input_gradient(const T* grad_plane, const T* in_plane, const T* out_plane,
                              const PoolGeometryOf<I>& g, A p, I ih, I iw) {
  const A x = static_cast<A>(in_plane[ih * g.in_h + iw * g.in_w]);
  BlockSum<A> sum;
  for (I oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
    for (I ow = g.first_window_column(iw); ow < g.last_window_column(iw); ++ow) {
      const I o = oh * g.out_h + ow * g.out_w;
      const A y = static_cast<A>(out_plane[o]);
      A slope = WindowSlopes<norm, A>(in_plane, g, y, p, oh, ow).at(x);
      if constexpr (norm == Norm::kInf) {
        if (slope != A(0) && slope == slope) slope /= window_ties(in_plane, g, y, oh, ow);
      }
      sum.add(static_cast<A>(grad_plane[o]) * slope);
    }
  }
  return sum.value();
}

// Double backward, first part: D = sum over the window of v * dy/dx, the gradient with respect to
// grad_output, where v is the gradient with respect to grad_input.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A directional_derivative(const T* v_plane, const T* in_plane, A y,
                                      const PoolGeometryOf<I>& g, A p, I oh, I ow) {
  const WindowSlopes<norm, A> slopes(in_plane, g, y, p, oh, ow);
  BlockSum<A> terms;
  for (I ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (I iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      const I i = ih * g.in_h + iw * g.in_w;
      terms.add(static_cast<A>(v_plane[i]) * slopes.at(static_cast<A>(in_plane[i])));
    }
  }
  const A sum = terms.value();
  if (norm != Norm::kInf || y != y || y == A(0)) return sum;
  return sum / window_ties(in_plane, g, y, oh, ow);
}

// Double backward, second part: with r = |x| / y, the gradient with respect to x is
//   (p - 1) sum over windows of g / y * (v r^(p-2) - D sign(x) r^(p-1)).
// It is 0 for p = 1 and p = inf, which are piecewise linear. directional holds D.
template <Norm norm, typename T, typename I, typename A = opmath_t<T>>
MNIST_OPS_HD A second_gradient(const T* v_plane, const T* grad_plane, const T* in_plane,
                               const T* out_plane, const T* directional, const PoolGeometryOf<I>& g,
                               A p, I ih, I iw) {
  if constexpr (norm == Norm::kOne || norm == Norm::kInf) {
    return A(0);
  } else {
    const I i = ih * g.in_h + iw * g.in_w;
    const A x = static_cast<A>(in_plane[i]);
    const A v = static_cast<A>(v_plane[i]);
    BlockSum<A> sum;
    for (I oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
      for (I ow = g.first_window_column(iw); ow < g.last_window_column(iw); ++ow) {
        const I o = oh * g.out_h + ow * g.out_w;
        const A y = static_cast<A>(out_plane[o]);
        if (y == A(0)) continue;
        const WindowSlopes<norm, A> slopes(in_plane, g, y, p, oh, ow);
        const A change = v * slopes.curvature(x) - static_cast<A>(directional[o]) * slopes.at(x);
        sum.add(static_cast<A>(grad_plane[o]) / y * change);
      }
    }
    return (p - A(1)) * sum.value();
  }
}

// ----------------------------------------------------------------------------- checks and shapes

inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                           bool ceil_mode) {
  const int64_t span = size + 2 * padding - kernel;
  if (span < 0) return 0;
  int64_t pooled = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // The last window must start inside the image or its left padding.
  if (ceil_mode && (pooled - 1) * stride >= size + padding) --pooled;
  return pooled;
}

struct PoolArguments {
  double p;
  std::vector<int64_t> kernel, stride, padding;
  bool ceil_mode;
};

// p as the kernels take it, in the type that a dtype is computed in. What is beyond that type's
// largest number is infinity, what is no normal number in it an error. In between there are p whose
// results are those of another p in every digit, and whose powers could leave the range: above
// 2^28 (float64: 2^57) (1 - eps)^p is 0 as for p = inf, and for p below 1e-10 (1e-20) every
// |x|^p is 1.
inline double usable_norm_type(const char* op, double p, ScalarType dtype) {
  MNIST_OPS_CHECK(p > 0, op, ": norm_type must be > 0, got ", p);
  const bool wide = dtype == ScalarType::Double;
  const double least =
      wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  MNIST_OPS_CHECK(p >= least, op, ": norm_type must be at least ", least,
                  ", the smallest normal number of ", (wide ? "float64" : "float32"), ", got ", p);
  if (p > (wide ? 0x1p57 : 0x1p28)) return std::numeric_limits<double>::infinity();
  return std::max(p, wide ? 1e-20 : 1e-10);
}

inline void check_pool_arguments(const char* op, const PoolArguments& a) {
  MNIST_OPS_CHECK(a.p > 0, op, ": norm_type must be > 0, got ", a.p);
  MNIST_OPS_CHECK(a.kernel.size() == 2 && a.stride.size() == 2 && a.padding.size() == 2, op,
                  ": kernel_size, stride and padding must have two elements");
  for (int d = 0; d < 2; ++d) {
    // 2^31 - 1 is no image's size, and keeps every product below clear of overflow.
    MNIST_OPS_CHECK(a.kernel[d] > 0 && a.kernel[d] < (int64_t{1} << 31), op,
                    ": kernel_size must be at least 1 and below 2^31, got ", a.kernel[d]);
    MNIST_OPS_CHECK(a.stride[d] > 0 && a.stride[d] < (int64_t{1} << 31), op,
                    ": stride must be at least 1 and below 2^31, got ", a.stride[d]);
    MNIST_OPS_CHECK(a.padding[d] >= 0 && a.padding[d] <= a.kernel[d] / 2, op,
                    ": padding must be between 0 and half of kernel_size, got ", a.padding[d],
                    " with kernel_size ", a.kernel[d]);
  }
}

// Whether a tensor of these sizes has so few elements, empty dimensions aside, that they and their
// bytes are counted in 64 bits.
inline bool is_countable(std::initializer_list<int64_t> sizes) {
  int64_t room = int64_t{1} << 59;
  for (const int64_t size : sizes) room /= std::max<int64_t>(size, 1);
  return room > 0;
}

inline PoolGeometry pool_geometry(const char* op, const Images& input, const PoolArguments& a) {
  check_pool_arguments(op, a);
  dispatch_floating(op, input.data.scalar_type(), [](auto) {});  // before memory is taken
  PoolGeometry g{};
  MNIST_OPS_CHECK(is_countable({input.N, input.C, input.H, input.W}), op,
                  ": input has too large a shape, ", shape_string(input.data));
  g.N = input.N, g.C = input.C, g.H = input.H, g.W = input.W;
  g.kernel_h = a.kernel[0], g.kernel_w = a.kernel[1];
  g.stride_h = a.stride[0], g.stride_w = a.stride[1];
  g.padding_h = a.padding[0], g.padding_w = a.padding[1];
  g.OH = pooled_size(g.H, g.kernel_h, g.stride_h, g.padding_h, a.ceil_mode);
  g.OW = pooled_size(g.W, g.kernel_w, g.stride_w, g.padding_w, a.ceil_mode);
  MNIST_OPS_CHECK(g.OH > 0 && g.OW > 0, op, ": kernel_size (", g.kernel_h, ", ", g.kernel_w,
                  ") does not fit into an image of (", g.H, ", ", g.W, ") with padding (",
                  g.padding_h, ", ", g.padding_w, ")");
  MNIST_OPS_CHECK(is_countable({g.N, g.C, g.OH, g.OW}), op,
                  ": the output would have too large a shape, (", g.N, ", ", g.C, ", ", g.OH, ", ",
                  g.OW, ")");
  g.in_n = input.stride_n(), g.in_c = input.stride_c();
  g.in_h = input.stride_h(), g.in_w = input.stride_w();
  g.out_n = g.C * g.OH * g.OW;
  g.out_c = input.channels_last ? 1 : g.OH * g.OW;
  g.out_h = input.channels_last ? g.C * g.OW : g.OW;
  g.out_w = input.channels_last ? g.C : 1;
  return g;
}

// A new tensor with the shape of the output. Filled, with zeros, where no window holds an element:
// what is padded to an image of no pixels.
inline Tensor new_pooled(const Images& input, const PoolGeometry& g) {
  Tensor pooled = empty_images(input, g.OH, g.OW);
  if (input.data.numel() == 0) torch::stable::zero_(pooled);
  return pooled;
}

// A tensor with the shape of the output, in the layout of the input.
inline Tensor pooled_like(const char* op, const char* name, const Tensor& tensor,
                          const Images& input, const PoolGeometry& g) {
  const int64_t d = tensor.dim();
  MNIST_OPS_CHECK(d == (input.batched ? 4 : 3) && (!input.batched || tensor.size(0) == g.N) &&
                      tensor.size(d - 3) == g.C && tensor.size(d - 2) == g.OH &&
                      tensor.size(d - 1) == g.OW,
                  op, ": ", name, " must have the shape of the output, (",
                  (input.batched ? std::to_string(g.N) + ", " : ""), g.C, ", ", g.OH, ", ", g.OW,
                  "), got ", shape_string(tensor));
  MNIST_OPS_CHECK(tensor.scalar_type() == input.data.scalar_type(), op, ": ", name,
                  " must have the dtype of input, ",
                  torch::headeronly::toString(input.data.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  MNIST_OPS_CHECK(tensor.device() == input.data.device(), op, ": ", name,
                  " and input are on different devices");
  return dense(tensor, input.channels_last);
}

// ----------------------------------------------------------------------------- operators

// The operators of one backend, given, for checked arguments, dense tensors in the layout of x and
// p as usable_norm_type gives it,
//   pooled(x, geometry, p),
//   pool_gradient(grad_output, x, output, geometry, p) and
//   pool_second(direction, grad_output, x, output, geometry, p, by_grad, by_input), all tensors in
//   the type to compute in, which writes the derivatives of the gradient in that direction with
//   respect to grad_output and to x.
template <auto pooled, auto pool_gradient, auto pool_second>
struct PoolOperators {
  using Sizes = std::vector<int64_t>;

  static Tensor forward(const Tensor& input, double p, Sizes kernel, Sizes stride, Sizes padding,
                        bool ceil_mode) {
    const char* op = "lp_pool2d";
    const Images x = images_of(op, "input", input);
    const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
    return pooled(x, g, usable_norm_type(op, p, input.scalar_type()));
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& output,
                         double p, Sizes kernel, Sizes stride, Sizes padding, bool ceil_mode) {
    const char* op = "lp_pool2d_backward";
    const Images x = images_of(op, "input", input);
    const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
    p = usable_norm_type(op, p, input.scalar_type());
    const Tensor y = pooled_like(op, "output", output, x, g);
    return pool_gradient(pooled_like(op, "grad_output", grad_output, x, g), x, y, g, p);
  }

  static std::tuple<Tensor, Tensor> double_backward(const Tensor& grad_grad_input,
                                                    const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& output, double p, Sizes kernel,
                                                    Sizes stride, Sizes padding, bool ceil_mode) {
    const char* op = "lp_pool2d_double_backward";
    const Images x = images_of(op, "input", input);
    const PoolGeometry g = pool_geometry(op, x, {p, kernel, stride, padding, ceil_mode});
    p = usable_norm_type(op, p, input.scalar_type());
    check_like(op, "grad_grad_input", grad_grad_input, "input", input);
    const ScalarType stored = input.scalar_type(), dtype = type_to_compute_in(input);
    const Tensor direction = converted(dense(grad_grad_input, x.channels_last), dtype);
    const Tensor y = converted(pooled_like(op, "output", output, x, g), dtype);
    const Tensor grad = converted(pooled_like(op, "grad_output", grad_output, x, g), dtype);
    Images image = x;
    image.data = converted(x.data, dtype);
    Tensor by_grad = new_pooled(image, g), by_input = empty_images(image, g.H, g.W);
    if (x.data.numel() != 0) pool_second(direction, grad, image, y, g, p, by_grad, by_input);
    return {converted(by_grad, stored), converted(by_input, stored)};
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("lp_pool2d", TORCH_BOX(&PoolOperators::forward));
    m.impl("lp_pool2d_backward", TORCH_BOX(&PoolOperators::backward));
    m.impl("lp_pool2d_double_backward", TORCH_BOX(&PoolOperators::double_backward));
  }
};

// For other operators (stage.cpp, stage.cu), as PoolOperators takes them.
namespace cpu {
Tensor lp_pool2d(const Images& x, const PoolGeometry& geometry, double p);
Tensor lp_pool2d_backward(const Tensor& grad_output, const Images& x, const Tensor& output,
                          const PoolGeometry& geometry, double p);
}  // namespace cpu
namespace cuda {
Tensor lp_pool2d(const Images& x, const PoolGeometry& geometry, double p);
Tensor lp_pool2d_backward(const Tensor& grad_output, const Images& x, const Tensor& output,
                          const PoolGeometry& geometry, double p);
}  // namespace cuda

}  // namespace mnist_ops
