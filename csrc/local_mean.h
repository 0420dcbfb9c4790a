// Weighted means of neighbourhoods: each plane correlated with a kernel, whatever lies beyond the
// border.
//
// With u the kernel divided by its sum and s(i) the pixel that stands for pixel i,
//   y(h, w) = sum over a, b of u(a, b) x(s(h + a - r_h), s(w + b - r_w))
// s(i) lies no further from the centre than i does. So along one dimension the mean of pixel i is
// one over the pixels i - r to i + r in every mode, with weights that depend on i near the border
// (Band), and so is its adjoint. The kernels know no border: they take tables of weights.
//
// A 1-D kernel is a band along the rows and one along the columns; renormalized, each is divided by
// what its taps on the image sum to. A 2-D kernel is a sum of as many pairs of bands as it has
// rows: its row a along the rows, a single tap, 1 at a, along the columns.
#pragma once

#include "local_norm.h"

#include <string>

namespace mnist_ops {

enum class Border { kRenormalized, kZeros, kReflect, kReplicate };

// The weights along one dimension of `size` pixels.
struct Band {
  int64_t size, taps;
  Border border;
  bool adjoint;

  // The pixel that stands for pixel i; -1: none does.
  MNIST_OPS_HD int64_t source(int64_t i) const {
    if (i >= 0 && i < size) return i;
    if (border == Border::kReflect) return i < 0 ? -i : 2 * (size - 1) - i;
    if (border == Border::kReplicate) return i < 0 ? 0 : size - 1;
    return -1;
  }

  // The weight of pixel i + d - taps / 2 in the result of pixel i, with tap(k) the kernel's and
  // what all of them sum to.
  template <typename Tap>
  MNIST_OPS_HD double weight(int64_t i, int64_t d, double total, const Tap& tap) const {
    const int64_t other = i + d - taps / 2;
    const int64_t centre = adjoint ? other : i, wanted = adjoint ? i : other;
    if (other < 0 || other >= size) return 0;
    double sum = 0, inside = 0;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t from = source(centre + k - taps / 2);
      if (from == wanted) sum += tap(k);
      if (from >= 0) inside += tap(k);
    }
    return sum / (border == Border::kRenormalized ? inside : total);
  }
};

// Both dimensions.
struct MeanBands {
  Band columns, rows;  // along the height, along the width
  bool separable;
  int64_t pairs;

  MNIST_OPS_HD int64_t column_weights() const { return pairs * columns.taps * columns.size; }
  MNIST_OPS_HD int64_t row_weights() const { return pairs * rows.taps * rows.size; }

  // The weights of pair a, from the kernel's values and what they sum to.
  MNIST_OPS_HD double column_weight(const double* values, double sum, int64_t a, int64_t d,
                                    int64_t h) const {
    const bool one = !separable;
    return columns.weight(h, d, one ? 1.0 : sum,
                          [=](int64_t k) { return one ? (k == a ? 1.0 : 0.0) : values[k]; });
  }
  MNIST_OPS_HD double row_weight(const double* values, double sum, int64_t a, int64_t d,
                                 int64_t w) const {
    const double* const row = values + a * rows.taps;
    return rows.weight(w, d, sum, [=](int64_t k) { return row[k]; });
  }
};

// ----------------------------------------------------------------------------- checks

inline Border border_of(const char* op, const std::string& name) {
  if (name == "renormalized") return Border::kRenormalized;
  if (name == "zeros") return Border::kZeros;
  if (name == "reflect") return Border::kReflect;
  MNIST_OPS_CHECK(name == "replicate", op,
                  ": padding_mode must be 'renormalized', 'zeros', 'reflect' or 'replicate', got '",
                  name, "'");
  return Border::kReplicate;
}

inline MeanBands mean_bands(const char* op, const Images& x, const Tensor& kernel,
                            const std::string& padding_mode, bool adjoint) {
  check_norm_kernel(op, kernel, x.data);
  const Border border = border_of(op, padding_mode);
  const bool separable = kernel.dim() == 1;
  const int64_t taps_h = kernel.size(0), taps_w = kernel.size(kernel.dim() - 1);
  MNIST_OPS_CHECK(separable || border != Border::kRenormalized, op,
                  ": only a separable kernel, of 1 dimension, can be renormalized, got the shape ",
                  shape_string(kernel));
  MNIST_OPS_CHECK(
      border != Border::kReflect || x.data.numel() == 0 || (taps_h / 2 < x.H && taps_w / 2 < x.W),
      op, ": kernel ", shape_string(kernel), " is too large to reflect images of (", x.H, ", ", x.W,
      ")");
  return {{x.H, taps_h, border, adjoint},
          {x.W, taps_w, border, adjoint},
          separable,
          separable ? 1 : taps_h};
}

// ----------------------------------------------------------------------------- operators

// The operators of one backend, given its means(op, images, kernel, bands).
template <auto means>
struct LocalMeanOperators {
  static Tensor run(const char* op, const Tensor& tensor, const char* name, const Tensor& kernel,
                    const std::string& padding_mode, bool adjoint) {
    const Images x = images_of(op, name, tensor);
    return means(op, x, kernel, mean_bands(op, x, kernel, padding_mode, adjoint));
  }

  static Tensor forward(const Tensor& input, const Tensor& kernel, std::string padding_mode) {
    return run("local_mean2d", input, "input", kernel, padding_mode, false);
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& kernel,
                         std::string padding_mode) {
    return run("local_mean2d_backward", grad_output, "grad_output", kernel, padding_mode, true);
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("local_mean2d", TORCH_BOX(&LocalMeanOperators::forward));
    m.impl("local_mean2d_backward", TORCH_BOX(&LocalMeanOperators::backward));
  }
};

}  // namespace mnist_ops
