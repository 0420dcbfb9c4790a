// Local normalization: subtractive, divisive, contrastive (divisive after subtractive).
//
// With u the kernel divided by its sum, (*) the zero-padded 'same' cross-correlation of one plane
// with u, and coef = (*) of a plane of ones:
//   mean         est(x) = (*)(sum over c of x_c) / C, one plane for all channels
//   subtractive  y_c = x_c - est(x) / coef
//   divisive     y_c = x_c / d, with s = sqrt(est(x^2)) / coef and d = s where s > threshold,
//                else d = value
// The blur commutes with the sum over channels, so one plane is blurred, not C of them.
//
// Gradients, with (*)^T the correlation with the flipped kernel, the adjoint of (*):
//   subtractive  gx_c = g_c - (*)^T(sum_c g_c / coef) / C
//   divisive     gx_c = g_c / d - x_c B,   B = (*)^T(h) / C,
//                h = sum_c g_c x_c / (s^3 coef^2) where s > threshold and s > 0, else 0
//   contrastive  the divisive gradient at z = subtractive(x), then the subtractive one, for which
//                sum_c gz_c = (sum_c g_c) / d - (sum_c z_c) B needs no further pass.
//
// A 1-D kernel k means the 2-D kernel outer(k, k), applied as rows then columns.
//
// Bit for bit. In float32 with one channel the CPU kernel gives the very images that the original
// system gave: the kernel is normalised in float64 and rounded once, rows are multiplied and added
// in order of the taps, columns by fused multiply-adds in the same order.
#pragma once

#include "common.h"

#include <cmath>

namespace mnist_ops {

enum class LocalNorm { kSubtractive, kDivisive, kContrastive };

struct LocalNormOptions {
  LocalNorm kind;
  double threshold, value;
};

// ----------------------------------------------------------------------------- arithmetic, shared

// est(x) / coef of one pixel from the blurred sum over channels.
template <typename A>
MNIST_OPS_HD A local_mean(A blurred, A channels, A coef) {
  return blurred / channels / coef;
}

// s of one pixel from the blurred sum of squares.
template <typename A>
MNIST_OPS_HD A local_deviation(A blurred, A channels, A coef) {
  return std::sqrt(blurred / channels) / coef;
}

// What the channels are divided by.
template <typename A>
MNIST_OPS_HD A divisor(A s, A threshold, A value) {
  // A NaN is not above the threshold, but must not be hidden by the value either.
  return s > threshold || s != s ? s : value;
}

// h of one pixel; q is the sum over channels of gradient times input. Divided step by step: s^3
// would leave float32's range for deviations that are still in it.
template <typename A>
MNIST_OPS_HD A divisor_gradient(A q, A s, A coef, A threshold) {
  if (s > threshold && s > A(0)) {
    const A scaled = s * coef;
    return q / scaled / scaled / s;
  }
  return s != s ? s : A(0);
}

// ----------------------------------------------------------------------------- checks

inline void check_norm_kernel(const char* op, const Tensor& kernel, const Tensor& input) {
  MNIST_OPS_CHECK(kernel.dim() == 1 || kernel.dim() == 2, op,
                  ": kernel must have 1 dimension (separable) or 2, got the shape ",
                  shape_string(kernel));
  for (int64_t d = 0; d < kernel.dim(); ++d) {
    MNIST_OPS_CHECK(kernel.size(d) % 2 == 1, op, ": kernel sizes must be odd, got ",
                    shape_string(kernel));
  }
  const ScalarType dtype = kernel.scalar_type();
  MNIST_OPS_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  op, ": kernel must be a floating-point tensor, got ",
                  torch::headeronly::toString(dtype));
  MNIST_OPS_CHECK(kernel.device() == input.device(), op,
                  ": kernel must be on the device of input: they are on different devices");
}

inline void check_norm_thresholds(const char* op, const LocalNormOptions& o, ScalarType dtype) {
  if (o.kind == LocalNorm::kSubtractive) return;
  MNIST_OPS_CHECK(o.threshold >= 0 && std::isfinite(o.threshold), op,
                  ": threshold must be >= 0 and finite, got ", o.threshold);
  MNIST_OPS_CHECK(o.value > 0 && std::isfinite(o.value), op,
                  ": threshold_value must be > 0 and finite, got ", o.value);
  // What pixels are divided by, in the type that computes.
  const double value = dtype == ScalarType::Double ? o.value : static_cast<float>(o.value);
  MNIST_OPS_CHECK(value > 0 && std::isfinite(value), op, ": threshold_value ", o.value, " is ",
                  value, " in float32, in which ", torch::headeronly::toString(dtype),
                  " is computed");
}

// The kernel as contiguous float64, whatever it came as: it is normalised in float64.
inline Tensor kernel_in_double(const Tensor& kernel) {
  return contiguous_of(converted(in_storage(kernel), ScalarType::Double));
}

// What a kernel is divided by.
inline double kernel_sum(const char* op, const Tensor& kernel_in_double) {
  const double* values = kernel_in_double.const_data_ptr<double>();
  double sum = 0;
  for (int64_t i = 0; i < kernel_in_double.numel(); ++i) sum += values[i];
  MNIST_OPS_CHECK(std::isfinite(sum) && sum != 0, op,
                  ": the kernel's sum must be finite and not 0, got ", sum);
  return sum;
}

// ----------------------------------------------------------------------------- operators

// The operators of one backend, given its forward(op, input, kernel, options) and
// backward(op, grad_output, input, kernel, options).
template <auto forward, auto backward>
struct LocalNormOperators {
  static Tensor subtractive(const Tensor& input, const Tensor& kernel) {
    return forward("subtractive_norm2d", input, kernel, {LocalNorm::kSubtractive, 0, 0});
  }

  static Tensor subtractive_backward(const Tensor& grad_output, const Tensor& kernel) {
    // Linear: the gradient does not depend on the input.
    return backward("subtractive_norm2d_backward", grad_output, grad_output, kernel,
                    {LocalNorm::kSubtractive, 0, 0});
  }

  template <LocalNorm kind>
  struct Dividing {  // divisive, contrastive
    static constexpr bool kDivisive = kind == LocalNorm::kDivisive;

    static Tensor run(const Tensor& input, const Tensor& kernel, double threshold, double value) {
      return forward(kDivisive ? "divisive_norm2d" : "contrastive_norm2d", input, kernel,
                     {kind, threshold, value});
    }

    static Tensor run_backward(const Tensor& grad_output, const Tensor& input, const Tensor& kernel,
                               double threshold, double value) {
      return backward(kDivisive ? "divisive_norm2d_backward" : "contrastive_norm2d_backward",
                      grad_output, input, kernel, {kind, threshold, value});
    }
  };

  static void register_all(torch::stable::detail::StableLibrary& m) {
    using Divisive = Dividing<LocalNorm::kDivisive>;
    using Contrastive = Dividing<LocalNorm::kContrastive>;
    m.impl("subtractive_norm2d", TORCH_BOX(&subtractive));
    m.impl("subtractive_norm2d_backward", TORCH_BOX(&subtractive_backward));
    m.impl("divisive_norm2d", TORCH_BOX(&Divisive::run));
    m.impl("divisive_norm2d_backward", TORCH_BOX(&Divisive::run_backward));
    m.impl("contrastive_norm2d", TORCH_BOX(&Contrastive::run));
    m.impl("contrastive_norm2d_backward", TORCH_BOX(&Contrastive::run_backward));
  }
};

// For other operators (stage.cpp, stage.cu), which are named in messages.
namespace cpu {
Tensor subtractive_norm2d(const char* op, const Tensor& input, const Tensor& kernel);
Tensor subtractive_norm2d_backward(const char* op, const Tensor& grad, const Tensor& kernel);
}  // namespace cpu
namespace cuda {
Tensor subtractive_norm2d(const char* op, const Tensor& input, const Tensor& kernel);
Tensor subtractive_norm2d_backward(const char* op, const Tensor& grad, const Tensor& kernel);
}  // namespace cuda

}  // namespace mnist_ops
