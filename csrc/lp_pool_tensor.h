// LP pooling with a p for each channel, in a tensor that has a gradient of its own.
//
// With m the window's largest magnitude, s = |x| / m, S the sum of s^p over the window, and n = 1
// or, for the mean, the number of its pixels that lie on the image,
//   y = m (S / n)^(1/p)
//   dy/dx = sign(x) s^(p-1) (S / n)^(1/p) / S = sign(x) (|x| / y)^(p-1) / n
//   dy/dp = y / (p^2 n) times the sum of e^z z,  z = ln(n s^p / S) = p ln s - ln(S / n).
// s lies in [0, 1] and S is at least 1, whatever the magnitude of x: no power overflows, and what
// underflows does not count. For the mean e^z sums to n, and q(z) = e^z z - (e^z - 1) is added in
// place of e^z z: z has both signs there, and for small p the sum is p times smaller than its
// terms, while q is never negative. An error of S then counts in its square alone. p = inf needs no
// case of its own: s^p is 1 for the largest elements, 0 for the others. Conventions as in
// lp_pool.h.
#pragma once

#include "elementary.h"
#include "lp_pool.h"

#include <utility>

namespace mnist_ops {

// ----------------------------------------------------------------------------- arithmetic, shared

// p in the range of usable_norm_type, where products with the logarithms are in range; NaN for what
// is not above 0: who looks at values on a device has to wait for it.
template <typename A>
MNIST_OPS_HD A usable_power(A p) {
  constexpr A kMost = std::is_same_v<A, float> ? A(0x1p28) : A(0x1p57);
  constexpr A kLeast = std::is_same_v<A, float> ? A(1e-10) : A(1e-20);
  const A above = p < kLeast ? kLeast : p;
  const A inside = above > kMost ? kMost : above;
  return p > A(0) ? inside : std::numeric_limits<A>::quiet_NaN();
}

// How many pixels of a window lie on the image.
template <typename A, typename I>
MNIST_OPS_HD A pixels_of_window(const PoolGeometryOf<I>& g, I oh, I ow) {
  return static_cast<A>(g.last_row(oh) - g.first_row(oh)) *
         static_cast<A>(g.last_column(ow) - g.first_column(ow));
}

// q(z) for |z| <= 1/2, where 1 + (z - 1) e^z cancels: the sum of z^k / (k (k-2)!) from k = 2.
template <typename A, int... terms>
MNIST_OPS_HD A divergence_near_zero(A z, std::integer_sequence<int, terms...>) {
  constexpr int kLast = sizeof...(terms) + 1;
  A sum = A(1);
  ((sum = elementary::fmadd(sum * z, A(kLast - terms) / A((kLast - terms) * (kLast - terms) - 1),
                            A(1))),
   ...);
  return z * z / 2 * sum;
}

// m, S, n and p of a window, and the sum that is in its dy/dp.
template <typename A>
struct PowerWindow {
  A largest, powers, count, p, divergences = A(0);

  // Others are 0, infinite or NaN, and so is the result.
  MNIST_OPS_HD bool has_scale() const {
    return largest > A(0) && largest <= std::numeric_limits<A>::max();
  }
  // Of y / m, which for small p may be out of range where y is not.
  MNIST_OPS_HD A square_root() const { return elementary::power(powers / count, A(0.5) / p); }
  MNIST_OPS_HD A value() const {
    const A root = square_root();
    return has_scale() ? largest * root * root : largest * p;
  }
  // share(grad) factor()^2 is grad dy/dx but for sign(x) s^(p-1).
  MNIST_OPS_HD A share(A grad) const { return has_scale() ? grad / powers : grad; }
  MNIST_OPS_HD A factor() const { return has_scale() ? square_root() : A(1); }
  // ln(S / n) and n / S, for divergence().
  MNIST_OPS_HD A shift() const { return elementary::log(powers / count); }
  MNIST_OPS_HD A scale() const { return count / powers; }
  MNIST_OPS_HD A power_gradient() const {
    const A gradient = value() * (divergences / p / p / count);
    const A other = largest == A(0) ? A(0) : std::numeric_limits<A>::quiet_NaN();
    return has_scale() ? gradient : other;
  }
};

// An element's part of `divergences`, from s and s^p; without the mean n is 1, and so it is for one
// pixel, where both are 0.
template <typename A>
MNIST_OPS_HD A divergence(const elementary::Quotient<A>& s, A power, A p, A count, A shift,
                          A scale) {
  using Terms = std::make_integer_sequence<int, std::is_same_v<A, float> ? 8 : 15>;
  const A z = elementary::fmadd(p, elementary::log(s), -shift), e = power * scale;
  const A far = A(1) + (z - A(1)) * e, near = divergence_near_zero(z, Terms{});
  const A q = std::abs(z) < (e > A(0) ? A(0.5) : A(0)) ? near : far;
  return count > A(1) ? q : z * e;
}

// sign(x) (|x| / divisor)^(p-1).
template <typename A>
MNIST_OPS_HD A power_slope(A x, A divisor, A p) {
  const elementary::Quotient<A> s(magnitude(x), divisor);
  const A size = elementary::power(s, p - A(1));
  const A slope = s.value != s.value ? s.value : x < A(0) ? -size : size;
  return x == A(0) ? A(0) : slope;
}

// ----------------------------------------------------------------------------- operators

// The operators of one backend, given pooled(x, geometry, p, average) and
// gradients(grad_output, x, geometry, p, average), which gives those of x and of p.
template <auto pooled, auto gradients>
struct TensorPoolOperators {
  using Sizes = std::vector<int64_t>;

  static Tensor powers_of(const char* op, const Tensor& norm_type, const Images& x) {
    MNIST_OPS_CHECK(norm_type.dim() == 1 && norm_type.size(0) == x.C, op,
                    ": norm_type must have one element for each of ", x.C,
                    " channels, got the shape ", shape_string(norm_type));
    const ScalarType dtype = type_to_compute_in(x.data);
    MNIST_OPS_CHECK(norm_type.scalar_type() == dtype, op, ": norm_type must have the dtype ",
                    torch::headeronly::toString(dtype), ", which input is computed in, got ",
                    torch::headeronly::toString(norm_type.scalar_type()));
    MNIST_OPS_CHECK(norm_type.device() == x.data.device(), op,
                    ": norm_type and input are on different devices");
    return contiguous_of(norm_type);
  }

  static Tensor forward(const Tensor& input, const Tensor& norm_type, Sizes kernel, Sizes stride,
                        Sizes padding, bool ceil_mode, bool average) {
    const char* op = "lp_pool2d_tensor_p";
    const Images x = images_of(op, "input", input);
    const PoolGeometry g = pool_geometry(op, x, {1, kernel, stride, padding, ceil_mode});
    return pooled(x, g, powers_of(op, norm_type, x), average);
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& norm_type, Sizes kernel, Sizes stride,
                                             Sizes padding, bool ceil_mode, bool average) {
    const char* op = "lp_pool2d_tensor_p_backward";
    const Images x = images_of(op, "input", input);
    const PoolGeometry g = pool_geometry(op, x, {1, kernel, stride, padding, ceil_mode});
    const Tensor p = powers_of(op, norm_type, x);
    return gradients(pooled_like(op, "grad_output", grad_output, x, g), x, g, p, average);
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("lp_pool2d_tensor_p", TORCH_BOX(&TensorPoolOperators::forward));
    m.impl("lp_pool2d_tensor_p_backward", TORCH_BOX(&TensorPoolOperators::backward));
  }
};

}  // namespace mnist_ops
