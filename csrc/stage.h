// A stage of the networks in one operator: activation, LP pooling, subtractive normalization.
//
//   a = act(x),  y = lp_pool2d(a),  z_c = y_c - (*)(sum over c of y_c) / C / coef
//
// with (*) and coef as in local_norm.h, and backwards, from the gradient g with respect to z,
//
//   gp_c = g_c - (*)^T(sum over c of g_c / coef) / C,  gx = act'(a) sum over windows of gp dy/da
//
// The backward pass is given x and nothing else: a and y are computed again from it, which is
// cheaper on CUDA than to write and read them. Half types stay in float32 from x to z.
//
// The arithmetic is that of activation.h, lp_pool.h and local_norm.h, which the layers of the
// online-SGD engine share.
#pragma once

#include "activation.h"
#include "local_norm.h"
#include "lp_pool.h"

#include <optional>
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

// The operators of one backend. fused() and fused_backward(), if it has them, do a whole stage, or
// nothing where they have no kernel for it. There, and where it has not, its operators for the
// three steps run one after the other on images_at_once(); between them everything is in the type
// to compute in: half types are rounded once here, too.
template <typename Backend>
struct StageOperators {
  static Tensor stage2d(const Tensor& input, const Tensor& kernel, std::string activation, double p,
                        std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, bool ceil_mode) {
    const char* op = "stage2d";
    const Images x = images_of(op, "input", input);
    const StageArguments arguments =
        stage_arguments(op, x, kernel, activation, {p, kernel_size, stride, padding, ceil_mode});
    if (x.data.numel() == 0) return new_pooled(x, arguments.geometry);
    if constexpr (requires { Backend::fused; }) {
      if (const auto output = Backend::fused(op, nullptr, x, kernel, arguments)) return *output;
    }
    std::optional<Tensor> output;
    each_part(x, arguments, [&](const Images& a, const PoolGeometry& g, int64_t first) {
      const Tensor y = Backend::lp_pool2d(a, g, arguments.p);
      const Tensor z = Backend::subtractive_norm2d(op, y, kernel);
      if (a.N == x.N) {
        output = converted(z, x.data.scalar_type());
        return;
      }
      if (!output) output = new_pooled(x, arguments.geometry);
      Tensor to = some_of(*output, first, a);
      torch::stable::copy_(to, z);
    });
    return *output;
  }

  static Tensor stage2d_backward(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& kernel, std::string activation, double p,
                                 std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, bool ceil_mode) {
    const char* op = "stage2d_backward";
    const Images x = images_of(op, "input", input);
    const StageArguments arguments =
        stage_arguments(op, x, kernel, activation, {p, kernel_size, stride, padding, ceil_mode});
    Tensor grad_z = pooled_like(op, "grad_output", grad_output, x, arguments.geometry);
    if (x.data.numel() == 0) return empty_images(x, x.H, x.W);
    if constexpr (requires { Backend::fused_backward; }) {
      const auto grad = Backend::fused_backward(op, &grad_z, x, kernel, arguments);
      if (grad) return *grad;
    }
    Tensor grad_input = empty_images(x, x.H, x.W);
    each_part(x, arguments, [&](const Images& a, const PoolGeometry& g, int64_t first) {
      const Tensor y = Backend::lp_pool2d(a, g, arguments.p);
      const Tensor grad = converted(some_of(grad_z, first, a), a.data.scalar_type());
      const Tensor grad_y = Backend::subtractive_norm2d_backward(op, grad, kernel);
      const Tensor grad_a = Backend::lp_pool2d_backward(grad_y, a, y, g, arguments.p);
      Tensor grad_x = some_of(grad_input, first, a);
      Backend::activate_backward(arguments.activation, a.data, grad_a, grad_x);
    });
    return grad_input;
  }

  // body(act(images), their geometry, the first one's place) for all images, some at a time, which
  // take each other's place in memory.
  template <typename F>
  static void each_part(const Images& x, const StageArguments& arguments, const F& body) {
    Images a = x;
    a.N = std::min(Backend::images_at_once(x), x.N);
    Tensor images = x.data, memory = empty_images(a, x.H, x.W, type_to_compute_in(x.data));
    PoolGeometry g = arguments.geometry;
    for (int64_t first = 0; first < x.N; first += g.N) {
      a.N = g.N = std::min(a.N, x.N - first);
      a.data = some_of(memory, 0, a);
      Backend::activate(arguments.activation, some_of(images, first, a), a.data);
      body(a, g, first);
    }
  }

  static Tensor some_of(Tensor& images, int64_t first, const Images& some) {
    if (!some.batched) return images;
    return torch::stable::narrow(images, 0, first, some.N);
  }

  // The first step alone, for who keeps its result: act(input) in the type to compute in.
  static Tensor activate(const Tensor& input, std::string activation) {
    const char* op = "activate";
    const Images x = images_of(op, "input", input);
    Tensor output = empty_images(x, x.H, x.W, type_to_compute_in(x.data));
    Backend::activate(activation_kind(op, activation), x.data, output);
    return output;
  }

  static Tensor activate_backward(const Tensor& grad_output, const Tensor& output,
                                  std::string activation) {
    const char* op = "activate_backward";
    check_like(op, "grad_output", grad_output, "output", output);
    MNIST_OPS_CHECK(output.scalar_type() == type_to_compute_in(output), op,
                    ": output must be float64 or float32, got ",
                    torch::headeronly::toString(output.scalar_type()));
    const Images a = images_of(op, "output", output);
    Tensor grad_input = empty_images(a, a.H, a.W);
    Backend::activate_backward(activation_kind(op, activation), a.data,
                               dense(grad_output, a.channels_last), grad_input);
    return grad_input;
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("stage2d", TORCH_BOX(&StageOperators::stage2d));
    m.impl("stage2d_backward", TORCH_BOX(&StageOperators::stage2d_backward));
    m.impl("activate", TORCH_BOX(&StageOperators::activate));
    m.impl("activate_backward", TORCH_BOX(&StageOperators::activate_backward));
  }
};

}  // namespace mnist_ops
