// What the operators of both engines are given, checked and made dense.
#pragma once

#include "../local_norm.h"
#include "network_text.h"

namespace mnist_ops::online {

inline Tensor on_host(const Tensor& tensor) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU, 0);
  return contiguous_of(tensor.is_cpu() ? tensor : torch::stable::to(in_storage(tensor), host));
}

// Steps of some models of one shape. The lists have the tensors of one model after the other.
struct Call {
  const char* op;
  int64_t models;
  std::vector<Tensor> parameters, velocities, kernels;
  Tensor images, labels, order, uniform;  // order: int64
  int64_t loss;

  // By prepare():
  int64_t count = 0;  // steps of each model
  NetworkSpec spec{};
  std::vector<int64_t> targets{};  // the labels in the order of use

  // Checks everything, before anything has changed. What is not dense becomes a dense copy; kernels
  // become float64 on the host.
  void prepare(const std::string& network, bool momentum) {
    check_types();
    MNIST_OPS_CHECK(momentum == !velocities.empty(), op,
                    ": velocities go with a momentum, and only with one");
    const auto first_of = [&](const std::vector<Tensor>& tensors) {
      return std::vector<Tensor>(tensors.begin(), tensors.begin() + tensors.size() / models);
    };
    const std::vector<Tensor> own = first_of(parameters), own_kernels = first_of(kernels);
    MNIST_OPS_CHECK(
        parameters.size() == own.size() * models && kernels.size() == own_kernels.size() * models &&
            (velocities.empty() || velocities.size() == parameters.size()),
        op, ": expected the parameters, velocities and kernels of ", models, " models, got ",
        parameters.size(), ", ", velocities.size(), " and ", kernels.size());
    const bool flat = images.dim() == 2;
    const int64_t H = flat ? 1 : images.size(2), W = flat ? 1 : images.size(3);
    spec = NetworkReader(op, own, own_kernels.size()).read(network, {images.size(1), H, W, flat});
    check_shapes(parameters, own);
    check_shapes(velocities, own);
    check_shapes(kernels, own_kernels);
    for (Tensor& kernel : kernels) {
      check_norm_kernel(op, kernel, parameters[0]);
      kernel = kernel_in_double(on_host(kernel));
    }
    const int64_t numbers = order.numel() * spec.uniforms;
    MNIST_OPS_CHECK(uniform.scalar_type() == ScalarType::Double && uniform.numel() == numbers, op,
                    ": dropout needs ", numbers, " float64 numbers, got ", uniform.numel());
    for (Tensor* tensor : {&images, &order, &uniform}) *tensor = contiguous_of(*tensor);
    count = order.numel() / models;
    find_targets();
    for (auto* tensors : {&parameters, &velocities}) {
      for (Tensor& tensor : *tensors) tensor = contiguous_to_write(tensor);
    }
  }

  // Copies back to the caller's tensors what was not dense in them.
  void finish(std::vector<Tensor>& callers_parameters, std::vector<Tensor>& callers_velocities) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      copy_back(callers_parameters[i], parameters[i]);
      if (!velocities.empty()) copy_back(callers_velocities[i], velocities[i]);
    }
  }

 private:
  static void copy_back(Tensor& tensor, const Tensor& dense) {
    if (tensor.data_ptr() != dense.data_ptr()) torch::stable::copy_(tensor, dense);
  }

  void check_types() const {
    const auto is_float = [](const Tensor& tensor) {
      return tensor.scalar_type() == ScalarType::Double ||
             tensor.scalar_type() == ScalarType::Float;
    };
    const auto name_of = [](const Tensor& tensor) {
      return torch::headeronly::toString(tensor.scalar_type());
    };
    MNIST_OPS_CHECK(!parameters.empty(), op, ": the network has no parameters");
    const Tensor& first = parameters[0];
    MNIST_OPS_CHECK(is_float(first), op, ": parameters must be float64 or float32, got ",
                    name_of(first));
    for (const auto* tensors : {&parameters, &velocities}) {
      for (const Tensor& tensor : *tensors) {
        MNIST_OPS_CHECK(
            tensor.scalar_type() == first.scalar_type() && tensor.device() == first.device(), op,
            ": parameters and velocities must all be ", name_of(first), " tensors on one device");
      }
    }
    MNIST_OPS_CHECK(images.dim() == 2 || images.dim() == 4, op,
                    ": images must be (N, C, H, W) or (N, features), got the shape ",
                    shape_string(images));
    MNIST_OPS_CHECK(is_float(images), op, ": images must be float64 or float32, got ",
                    name_of(images));
    MNIST_OPS_CHECK(labels.dim() == 1 && labels.scalar_type() == ScalarType::Long &&
                        labels.size(0) == images.size(0),
                    op, ": labels must be int64 (", images.size(0), ",), got ", name_of(labels),
                    " ", shape_string(labels));
    for (const Tensor* tensor : {&images, &labels, &order, &uniform}) {
      MNIST_OPS_CHECK(tensor->device() == first.device(), op,
                      ": images, labels, order and uniform must be on the parameters' device");
    }
    MNIST_OPS_CHECK(loss >= 0 && loss <= 2, op, ": loss must be 0, 1 or 2, got ", loss);
  }

  void check_shapes(const std::vector<Tensor>& tensors, const std::vector<Tensor>& of_one) const {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& like = of_one[i % of_one.size()];
      MNIST_OPS_CHECK(same_shape(tensors[i], like), op,
                      ": all models must have parameters and kernels of the same shapes, and ",
                      "velocities those of their parameters; got ", shape_string(tensors[i]),
                      " and ", shape_string(like));
    }
  }

  void find_targets() {
    const Tensor classes = on_host(labels), samples = on_host(order);
    const int64_t* class_of = classes.const_data_ptr<int64_t>();
    const int64_t* indices = samples.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < order.numel(); ++i) {
      const int64_t sample = indices[i];
      MNIST_OPS_CHECK(sample >= 0 && sample < images.size(0), op, ": order must be in [0, ",
                      images.size(0), "), got ", sample, " at position ", i % count);
      targets.push_back(class_of[sample]);
      MNIST_OPS_CHECK(targets[i] >= 0 && targets[i] < spec.output.C, op, ": labels must be in [0, ",
                      spec.output.C, "), got ", targets[i], " at position ", sample);
    }
  }
};

}  // namespace mnist_ops::online
