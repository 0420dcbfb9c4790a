// A stage of the networks in one operator: activation, LP pooling, subtractive normalization.
//
//   a = act(x),  y = lp_pool2d(a),  z_c = y_c - (*)(sum over c of y_c) / C / coef
//
// with (*) and coef as in local_norm.h, and backwards, from the gradient g with respect to z,
//
//   gp_c = g_c - (*)^T(sum over c of g_c / coef) / C,  gx = act'(a) sum over windows of gp dy/da
//
// The backward pass is given x and nothing else: a and y are computed again from it, which is
// cheaper than to write and read them. Half types stay in float32 from x to z.
//
// The arithmetic is that of activation.h, lp_pool.h and local_norm.h, which the layers of the
// online-SGD engine share.
#pragma once

#include "activation.h"
#include "local_norm.h"
#include "lp_pool.h"

#include <string>

namespace mnist_ops {

// ----------------------------------------------------------------------------- checks and shapes

inline ActivationKind activation_kind(const char* op, const std::string& name) {
  if (name == "tanh") return ActivationKind::kTanh;
  if (name == "relu") return ActivationKind::kRelu;
  if (name == "sigmoid") return ActivationKind::kSigmoid;
  MNIST_OPS_CHECK(name == "identity", op,
                  ": activation must be 'tanh', 'relu', 'sigmoid' or 'identity', got '", name, "'");
  return ActivationKind::kIdentity;
}

// Windows on some channels of one image that lie side by side at each pixel (one channel: planes),
// dense: where a part of the image was copied to.
template <typename I>
PoolGeometryOf<I> block_geometry(PoolGeometryOf<I> g, I lanes) {
  g.N = 1, g.C = lanes;
  g.in_n = g.H * g.W * lanes, g.in_c = 1, g.in_h = g.W * lanes, g.in_w = lanes;
  g.out_n = g.OH * g.OW * lanes, g.out_c = 1, g.out_h = g.OW * lanes, g.out_w = lanes;
  return g;
}

// The arguments of both directions, checked.
struct StageArguments {
  ActivationKind activation;
  double p;
  PoolGeometry geometry;
};

inline StageArguments stage_arguments(const char* op, const Images& input, const Tensor& kernel,
                                      const std::string& activation, const PoolArguments& pool) {
  check_norm_kernel(op, kernel, input.data);
  return {activation_kind(op, activation), usable_norm_type(op, pool.p, input.data.scalar_type()),
          pool_geometry(op, input, pool)};
}

// The operators of one backend, given its forward(op, images, kernel, arguments) and
// backward(op, grad_output, images, kernel, arguments); grad_output has the layout of the input.
template <auto forward, auto backward>
struct StageOperators {
  static Tensor stage2d(const Tensor& input, const Tensor& kernel, std::string activation, double p,
                        std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, bool ceil_mode) {
    const char* op = "stage2d";
    const Images x = images_of(op, "input", input);
    return forward(
        op, x, kernel,
        stage_arguments(op, x, kernel, activation, {p, kernel_size, stride, padding, ceil_mode}));
  }

  static Tensor stage2d_backward(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& kernel, std::string activation, double p,
                                 std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, bool ceil_mode) {
    const char* op = "stage2d_backward";
    const Images x = images_of(op, "input", input);
    const StageArguments arguments =
        stage_arguments(op, x, kernel, activation, {p, kernel_size, stride, padding, ceil_mode});
    return backward(op, pooled_like(op, "grad_output", grad_output, x, arguments.geometry), x,
                    kernel, arguments);
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("stage2d", TORCH_BOX(&StageOperators::stage2d));
    m.impl("stage2d_backward", TORCH_BOX(&StageOperators::stage2d_backward));
  }
};

}  // namespace mnist_ops
