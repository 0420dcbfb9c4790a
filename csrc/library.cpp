// Every operator's schema: the table of contents of csrc/.
//
// A family lives in five places under one name: its lines here, <family>.h (checks, shapes and the
// arithmetic both backends share), cpu/<family>.cpp, cuda/<family>.cu, and
// mnist_ops/ops/<family>.py (public function, fake kernel, autograd, vmap, autocast).
//
// "_backward" takes the gradient with respect to the output and gives the one with respect to the
// input. Where the derivative of that is again an operator of this list, no other is needed: the
// gradient of subtractive_norm2d_backward is subtractive_norm2d.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mnist_ops, m) {
  // lp_pool
  m.def(
      "lp_pool2d(Tensor input, float norm_type, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode) -> Tensor");
  m.def(
      "lp_pool2d_backward(Tensor grad_output, Tensor input, Tensor output, float norm_type, "
      "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode) -> Tensor");
  m.def(
      "lp_pool2d_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, "
      "Tensor output, float norm_type, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode) -> (Tensor, Tensor)");

  // with a p for each channel, which has a gradient of its own
  m.def(
      "lp_pool2d_tensor_p(Tensor input, Tensor norm_type, int[] kernel_size, int[] stride, "
      "int[] padding, bool ceil_mode, bool average) -> Tensor");
  m.def(
      "lp_pool2d_tensor_p_backward(Tensor grad_output, Tensor input, Tensor norm_type, "
      "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool average) "
      "-> (Tensor grad_input, Tensor grad_norm_type)");

  // local_norm
  m.def("subtractive_norm2d(Tensor input, Tensor kernel) -> Tensor");
  m.def("subtractive_norm2d_backward(Tensor grad_output, Tensor kernel) -> Tensor");
  m.def(
      "divisive_norm2d(Tensor input, Tensor kernel, float threshold, float threshold_value) "
      "-> Tensor");
  m.def(
      "divisive_norm2d_backward(Tensor grad_output, Tensor input, Tensor kernel, "
      "float threshold, float threshold_value) -> Tensor");
  m.def(
      "contrastive_norm2d(Tensor input, Tensor kernel, float threshold, float threshold_value) "
      "-> Tensor");
  m.def(
      "contrastive_norm2d_backward(Tensor grad_output, Tensor input, Tensor kernel, "
      "float threshold, float threshold_value) -> Tensor");

  // local_mean
  m.def("local_mean2d(Tensor input, Tensor kernel, str padding_mode) -> Tensor");
  m.def("local_mean2d_backward(Tensor grad_output, Tensor kernel, str padding_mode) -> Tensor");

  // stage: activation, LP pooling and subtractive normalization in one
  m.def(
      "stage2d(Tensor input, Tensor kernel, str activation, float norm_type, int[] kernel_size, "
      "int[] stride, int[] padding, bool ceil_mode) -> Tensor");
  m.def(
      "stage2d_backward(Tensor grad_output, Tensor input, Tensor kernel, str activation, "
      "float norm_type, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode) -> Tensor");

  m.def("activate(Tensor input, str activation) -> Tensor");
  m.def("activate_backward(Tensor grad_output, Tensor output, str activation) -> Tensor");

  // sigmoid
  m.def("sigmoid(Tensor input) -> Tensor");
  m.def("sigmoid_backward(Tensor grad_output, Tensor output) -> Tensor");

  // softmax
  m.def("softmax(Tensor input, int dim, float beta) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, int dim, float beta) -> Tensor");
  m.def("log_softmax(Tensor input, int dim, float beta) -> Tensor");
  m.def("log_softmax_backward(Tensor grad_output, Tensor output, int dim, float beta) -> Tensor");
  m.def(
      "softmax_nll(Tensor input, Tensor target, Tensor? weight, float beta, str reduction, "
      "int ignore_index, float label_smoothing) -> (Tensor loss, Tensor total)");
  m.def(
      "softmax_nll_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor total, "
      "Tensor? weight, float beta, str reduction, int ignore_index, float label_smoothing) "
      "-> Tensor");

  // online: a stretch of training with batch size 1, in place on the parameters
  m.def(
      "online_sgd(Tensor(a!)[] parameters, Tensor(b!)[] velocities, str network, "
      "Tensor[] kernels, Tensor images, Tensor labels, Tensor order, Tensor uniform, int loss, "
      "int step, float lr, float lr_decay, float weight_decay, float momentum, float dampening, "
      "bool nesterov, bool started, int threads) -> (Tensor losses, Tensor predictions)");
  // the same on CUDA for several models of one shape; settings has a row for each of them: lr,
  // lr_decay, weight_decay, momentum, dampening, steps made before, whether velocities are there
  m.def(
      "online_sgd_models(Tensor(a!)[] parameters, Tensor(b!)[] velocities, str network, "
      "Tensor[] kernels, Tensor images, Tensor labels, Tensor order, Tensor uniform, int loss, "
      "Tensor settings, bool nesterov) "
      "-> (Tensor losses, Tensor predictions)");
}
