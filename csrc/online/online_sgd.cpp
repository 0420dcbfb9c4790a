// online_sgd: a stretch of training with batch size 1, sample after sample, in one call.
//
// network_text.h says how the network comes as text.
//
// Every buffer is planned before the first sample; the loop over samples allocates nothing and
// cannot fail. What a step costs is in its convolutions (convolution.h says how they run) but for
// about a tenth.

#include "call.h"
#include "convolution.h"
#include "linear.h"
#include "losses.h"
#include "norm.h"
#include "pointwise.h"
#include "pooling.h"

namespace mnist_ops::online {
namespace {

constexpr const char* kOp = "online_sgd";

template <typename T>
class Network {
 public:
  Network(const Call& call, int64_t threads) : call_(call), workers_{threads} {
    // An image of one channel stays as it is where a convolution reads it; otherwise it takes a
    // whole block like all other maps.
    const NetworkSpec& spec = call.spec;
    const bool image = spec.layers[0].kind == Kind::kConv2d && spec.input.C == 1;
    output_ = input_ = new_map(spec.input, false, image ? 1 : kLanes<T>);
    for (const LayerSpec& layer : spec.layers) output_ = add(layer, output_);
    plan();
  }

  // Trains on all samples of the call; settings: of formulas.h.
  template <typename I>
  void run(const double* settings, bool nesterov, T* losses, int64_t* predictions) {
    for (auto& layer : layers_) layer->move_parameters(false);
    const I* images = call_.images.template const_data_ptr<I>();
    const int64_t* order = call_.order.template const_data_ptr<int64_t>();
    const double* uniform = call_.uniform.template const_data_ptr<double>();
    for (int64_t i = 0; i < call_.count; ++i) {
      const Step<T> step{update_of_step<T>(settings, settings[kSteps], i, nesterov),
                         uniform + i * call_.spec.uniforms};
      read_image(images + order[i] * input_.shape.numel());
      forward(step);
      const int64_t classes = output_.shape.C;
      predictions[i] = predicted_class(output_.value, classes);
      losses[i] = loss_and_gradient(static_cast<Loss>(call_.loss), output_.value, classes,
                                    call_.targets[i], output_.grad);
      backward(step);
    }
    for (auto& layer : layers_) layer->move_parameters(true);
  }

 private:
  // The chain of local layers behind (forward) or before (backward) a layer that needs whole maps.
  struct Phase {
    Layer<T>* head = nullptr;
    std::vector<Layer<T>*> chain;
    Layer<T>* updated = nullptr;
    int64_t blocks = 0;
  };

  T* allocate(int64_t size) {
    buffers_.emplace_back(size);
    return buffers_.back().data();
  }

  Map<T> new_map(const Shape& shape, bool with_grad, int64_t lanes = kLanes<T>) {
    Map<T> map{shape, nullptr, nullptr, lanes};
    map.value = allocate(map.blocks() * map.block());
    if (with_grad) map.grad = allocate(map.blocks() * map.block());
    return map;
  }

  // The output of a layer that may work in place.
  Map<T> same_map(const Map<T>& in) {
    const bool separate = layers_.empty() || layers_.back()->needs_output();
    Map<T> map = in;
    if (separate) map.value = allocate(map.blocks() * map.block());
    return map;
  }

  // The parameter with this index, or none.
  Parameter<T> parameter(int64_t index) {
    if (index < 0) return {};
    const auto data = [&](const std::vector<Tensor>& tensors) {
      return tensors.empty() ? nullptr : static_cast<T*>(tensors[index].data_ptr());
    };
    return {data(call_.parameters), data(call_.velocities)};
  }

  template <typename L, typename... Args>
  Map<T> push(const Map<T>& in, const Map<T>& out, const Args&... args) {
    layers_.push_back(std::make_unique<L>(in, out, args...));
    return out;
  }

  Map<T> add(const LayerSpec& layer, const Map<T>& in) {
    const Parameter<T> weight = parameter(layer.weight), bias = parameter(layer.bias);
    switch (layer.kind) {
      case Kind::kConv2d:
        return push<Convolution<T>>(in, new_map(layer.out, true), layer.window, weight, bias);
      case Kind::kLinear:
        return push<Linear<T>>(in, new_map(layer.out, true), weight, bias);
      case Kind::kActivation:
        return dispatch_activation(layer.activation, [&](auto tag) {
          return push<Activation<T, decltype(tag)::value>>(in, same_map(in));
        });
      case Kind::kDropout:
        return push<Dropout<T>>(in, same_map(in), layer.number, layer.first_uniform);
      case Kind::kSubtractiveNorm2d:
        return push<SubtractiveNorm<T>>(in, same_map(in), call_.kernels[layer.kernel]);
      default:
        break;
    }
    // Layers before the first parameters need no gradient.
    const Map<T> out = new_map(layer.out, layer.gradient);
    if (layer.kind == Kind::kFlatten) return push<Flatten<T>>(in, out);
    if (layer.log_softmax == LogSoftmaxKind::kExact) {
      return push<LogSoftmax<T>>(in, out, layer.number);
    }
    if (layer.log_softmax == LogSoftmaxKind::kTorch7) return push<Torch7LogSoftmax<T>>(in, out);
    if (layer.pool == PoolKind::kMax) return push<MaxPooling<T>>(in, out, layer);
    if (layer.pool == PoolKind::kAverage) return push<AveragePooling<T>>(in, out, layer);
    dispatch_norm(layer.number,
                  [&](auto norm) { push<LpPooling<T, decltype(norm)::value>>(in, out, layer); });
    return out;
  }

  void plan() {
    for (auto& layer : layers_) {
      if (!layer->local() || forward_.empty()) {
        forward_.push_back(
            {layer->local() ? nullptr : layer.get(), {}, nullptr, layer->out.blocks()});
        if (!layer->local()) continue;
      }
      forward_.back().chain.push_back(layer.get());
    }
    std::size_t first = 0;  // the first layer with parameters
    while (!layers_[first]->has_parameters()) ++first;
    backward_.push_back({nullptr, {}, nullptr, output_.blocks()});
    for (std::size_t i = layers_.size(); i-- > first;) {
      Layer<T>* layer = layers_[i].get();
      if (layer->local()) {
        backward_.back().chain.push_back(layer);
        continue;
      }
      backward_.back().updated = layer->has_parameters() ? layer : nullptr;
      // The first layer's own gradients are all made by its update, but for Linear's.
      backward_.push_back({layer, {}, nullptr, layer->in.grad ? layer->in.blocks() : 0});
    }
  }

  void forward(const Step<T>& step) {
    for (const Phase& phase : forward_) {
      if (phase.head) phase.head->prepare_forward(step, workers_);
      for (Layer<T>* layer : phase.chain) layer->prepare_forward(step, workers_);
      workers_(phase.blocks, [&](int64_t b) {
        if (phase.head) phase.head->forward(b);
        for (Layer<T>* layer : phase.chain) layer->forward(b);
      });
    }
  }

  void backward(const Step<T>& step) {
    for (const Phase& phase : backward_) {
      if (phase.head) phase.head->prepare_backward(step, workers_);
      workers_(phase.blocks, [&](int64_t b) {
        if (phase.head) phase.head->backward(b);
        for (Layer<T>* layer : phase.chain) layer->backward(b);
        if (phase.updated) phase.updated->update(b, step);
      });
    }
  }

  template <typename I>
  void read_image(const I* image) {
    input_.each_element(
        [&](int64_t at, int64_t i) { input_.value[at] = static_cast<T>(image[i]); });
  }

  const Call& call_;
  Workers workers_;
  std::vector<Buffer<T>> buffers_;
  std::vector<std::unique_ptr<Layer<T>>> layers_;
  std::vector<Phase> forward_, backward_;
  Map<T> input_{}, output_{};
};

std::tuple<Tensor, Tensor> online_sgd(std::vector<Tensor> parameters,
                                      std::vector<Tensor> velocities, std::string network,
                                      std::vector<Tensor> kernels, Tensor images, Tensor labels,
                                      Tensor order, Tensor uniform, int64_t loss, int64_t step,
                                      double lr, double lr_decay, double weight_decay,
                                      double momentum, double dampening, bool nesterov,
                                      bool started, int64_t threads) {
  MNIST_OPS_CHECK(order.dim() == 1 && order.scalar_type() == ScalarType::Long, kOp,
                  ": order must be int64 (M,), got ",
                  torch::headeronly::toString(order.scalar_type()), " ", shape_string(order));
  MNIST_OPS_CHECK(threads >= 1 && threads <= (1 << 20), kOp, ": threads must be in [1, 2^20], got ",
                  threads);
  // A step is counted in float64.
  MNIST_OPS_CHECK(step >= 0 && step <= (int64_t{1} << 53), kOp, ": step must be in [0, 2^53], got ",
                  step);
  for (const double number : {lr, lr_decay, weight_decay, momentum, dampening}) {
    MNIST_OPS_CHECK(std::isfinite(number), kOp,
                    ": lr, lr_decay, weight_decay, momentum and dampening must be finite, got ",
                    number);
  }
  Call call{kOp, 1, parameters, velocities, kernels, images, labels, order, uniform, loss};
  call.prepare(network, momentum != 0);
  const double settings[kSettings] = {
      lr, lr_decay, weight_decay, momentum, dampening, static_cast<double>(step), 1.0 * started};
  Tensor losses = new_tensor(parameters[0], {call.count});
  Tensor predictions = new_tensor(order, {call.count});
  int64_t* predicted = predictions.mutable_data_ptr<int64_t>();
  dispatch_computed(parameters[0], [&](auto element) {
    using T = decltype(element);
    Network<T> net(call, threads);
    dispatch_computed(images, [&](auto pixel) {
      net.template run<decltype(pixel)>(settings, nesterov, losses.mutable_data_ptr<T>(),
                                        predicted);
    });
  });
  call.finish(parameters, velocities);
  return {losses, predictions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("online_sgd", TORCH_BOX(&online_sgd));
}

}  // namespace mnist_ops::online
