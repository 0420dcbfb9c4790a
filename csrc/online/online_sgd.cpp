// online_sgd: a stretch of training with batch size 1, sample after sample, in one call.
//
// network_text.h says how the network comes as text.
//
// Every buffer is planned before the first sample; the loop over samples allocates nothing and
// cannot fail. What a step costs is in its convolutions (convolution.h says how they run) but for
// about a tenth.

#include "convolution.h"
#include "linear.h"
#include "losses.h"
#include "norm.h"
#include "pointwise.h"
#include "pooling.h"

namespace mnist_ops::online {
namespace {

constexpr const char* kOp = "online_sgd";

struct Settings {
  Loss loss;
  int64_t step;  // steps made before
  double lr, lr_decay, weight_decay, momentum, dampening;
  bool nesterov;
  bool started;  // the velocities hold those of an earlier step
  int64_t threads;
};

template <typename T>
class Network {
 public:
  Network(const std::string& network, const std::vector<Tensor>& parameters,
          const std::vector<Tensor>& velocities, const std::vector<Tensor>& kernels,
          const Tensor& images, const Settings& settings)
      : settings_(settings),
        workers_{settings.threads},
        parameters_(dense_to_write(parameters)),
        velocities_(dense_to_write(velocities)) {
    const NetworkSpec spec =
        NetworkReader(kOp, parameters_, kernels).read(network, sample_shape(images));
    uniforms_ = spec.uniforms;
    // An image of one channel stays as it is where a convolution reads it; otherwise it takes a
    // whole block like all other maps.
    const bool image = spec.layers[0].kind == Kind::kConv2d && spec.input.C == 1;
    Map<T> map{spec.input, nullptr, nullptr, image ? 1 : kLanes<T>};
    map.value = allocate(map.blocks() * map.block());
    input_ = map;
    for (const LayerSpec& layer : spec.layers) map = add(layer, map, kernels);
    output_ = map;
    plan();
  }

  int64_t classes() const { return output_.shape.C; }
  int64_t uniforms() const { return uniforms_; }

  // Trains on count samples; pixels are those of one image.
  template <typename I>
  void run(const I* images, const int64_t* labels, const int64_t* order, int64_t count,
           const double* uniform, T* losses, int64_t* predictions) {
    for (auto& layer : layers_) layer->read_parameters();
    Step<T> step{};
    Update<T>& update = step.update;
    update.weight_decay = static_cast<T>(settings_.weight_decay);
    update.momentum = static_cast<T>(settings_.momentum);
    update.keep = static_cast<T>(1.0 - settings_.dampening);
    update.nesterov = settings_.nesterov;
    const int64_t numel = input_.shape.C * input_.shape.pixels();
    for (int64_t i = 0; i < count; ++i) {
      const double t = static_cast<double>(settings_.step + i);
      update.rate = static_cast<T>(settings_.lr / (1.0 + t * settings_.lr_decay));
      update.first = i == 0 && !settings_.started;
      step.uniform = uniform + i * uniforms_;
      read_image(images + order[i] * numel);
      forward(step);
      predictions[i] = predicted_class(output_.value, classes());
      losses[i] = loss_and_gradient(settings_.loss, output_.value, classes(), labels[order[i]],
                                    output_.grad);
      backward(step);
    }
    for (auto& layer : layers_) layer->write_parameters();
  }

  // Copies back what was not dense in the caller's tensors.
  void finish(std::vector<Tensor>& parameters, std::vector<Tensor>& velocities) {
    copy_back(parameters, parameters_);
    copy_back(velocities, velocities_);
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

  Map<T> new_map(const Shape& shape, bool with_grad) {
    Map<T> map{shape, nullptr, nullptr, kLanes<T>};
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
    Parameter<T> result;
    if (index < 0) return result;
    result.value = parameters_[index].template mutable_data_ptr<T>();
    if (!velocities_.empty()) {
      MNIST_OPS_CHECK(same_shape(velocities_[index], parameters_[index]), kOp,
                      ": velocities must have the shapes of their parameters");
      result.velocity = velocities_[index].template mutable_data_ptr<T>();
    }
    return result;
  }

  template <typename L, typename... Args>
  Map<T> push(const Map<T>& in, const Map<T>& out, const Args&... args) {
    layers_.push_back(std::make_unique<L>(in, out, args...));
    return out;
  }

  Map<T> add(const LayerSpec& layer, const Map<T>& in, const std::vector<Tensor>& kernels) {
    const Parameter<T> weight = parameter(layer.weight), bias = parameter(layer.bias);
    switch (layer.kind) {
      case Kind::kConv2d:
        return push<Convolution<T>>(in, new_map(layer.out, true), layer.convolution, weight, bias);
      case Kind::kLinear:
        return push<Linear<T>>(in, new_map(layer.out, true), weight, bias);
      case Kind::kTanh:
        return push<Activation<T, ActivationKind::kTanh>>(in, same_map(in));
      case Kind::kRelu:
        return push<Activation<T, ActivationKind::kRelu>>(in, same_map(in));
      case Kind::kSigmoid:
        return push<Activation<T, ActivationKind::kSigmoid>>(in, same_map(in));
      case Kind::kDropout:
        return push<Dropout<T>>(in, same_map(in), layer.number, layer.first_uniform);
      case Kind::kSubtractiveNorm2d:
        return push<SubtractiveNorm<T>>(in, same_map(in), kernels[layer.kernel]);
      default:
        break;
    }
    // Layers before the first parameters need no gradient.
    const Map<T> out = new_map(layer.out, layer.gradient);
    switch (layer.kind) {
      case Kind::kFlatten:
        return push<Flatten<T>>(in, out);
      case Kind::kLogSoftmax:
        return push<LogSoftmax<T>>(in, out, layer.number);
      case Kind::kTorch7LogSoftmax:
        return push<Torch7LogSoftmax<T>>(in, out);
      case Kind::kMaxPool2d:
        return push<MaxPooling<T>>(in, out, layer.pooling);
      case Kind::kAvgPool2d:
        return push<AveragePooling<T>>(in, out, layer.pooling, layer.count_padding, layer.divisor);
      default:
        break;
    }
    dispatch_norm(layer.pooling.p, [&](auto norm) {
      push<LpPooling<T, decltype(norm)::value>>(in, out, layer.pooling);
    });
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
    const int64_t pixels = input_.shape.pixels(), lanes = input_.lanes;
    for (int64_t c = 0; c < input_.shape.C; ++c, image += pixels) {
      T* to = input_.value + c / lanes * input_.block() + c % lanes;
      for (int64_t p = 0; p < pixels; ++p) to[p * lanes] = static_cast<T>(image[p]);
    }
  }

  Settings settings_;
  Workers workers_;
  std::vector<Tensor> parameters_, velocities_;
  std::vector<Buffer<T>> buffers_;
  std::vector<std::unique_ptr<Layer<T>>> layers_;
  std::vector<Phase> forward_, backward_;
  Map<T> input_{}, output_{};
  int64_t uniforms_ = 0;
};

std::tuple<Tensor, Tensor> online_sgd(std::vector<Tensor> parameters,
                                      std::vector<Tensor> velocities, std::string network,
                                      std::vector<Tensor> kernels, Tensor images, Tensor labels,
                                      Tensor order, Tensor uniform, int64_t loss, int64_t step,
                                      double lr, double lr_decay, double weight_decay,
                                      double momentum, double dampening, bool nesterov,
                                      bool started, int64_t threads) {
  check_online_arguments(kOp, parameters, images, labels, loss);
  MNIST_OPS_CHECK(velocities.empty() || velocities.size() == parameters.size(), kOp,
                  ": expected one velocity for each of ", parameters.size(), " parameters, got ",
                  velocities.size());
  const ScalarType dtype = parameters[0].scalar_type();
  for (const auto* tensors : {&parameters, &velocities}) {
    for (const Tensor& tensor : *tensors) {
      MNIST_OPS_CHECK(tensor.scalar_type() == dtype && tensor.is_cpu(), kOp,
                      ": parameters and velocities must all be ",
                      torch::headeronly::toString(dtype), " tensors on the CPU");
    }
  }
  MNIST_OPS_CHECK(order.dim() == 1 && order.scalar_type() == ScalarType::Long, kOp,
                  ": order must be int64 (M,), got ",
                  torch::headeronly::toString(order.scalar_type()), " ", shape_string(order));
  MNIST_OPS_CHECK(images.is_cpu() && labels.is_cpu() && order.is_cpu() && uniform.is_cpu(), kOp,
                  ": images, labels, order and uniform must be on the CPU");
  MNIST_OPS_CHECK((momentum != 0) == !velocities.empty(), kOp,
                  ": velocities go with a momentum, and only with one");
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
  const Tensor pictures = contiguous_of(images);
  const Tensor classes = contiguous_of(labels);
  const Tensor sequence = contiguous_of(order);
  const Tensor numbers = contiguous_of(uniform);
  const int64_t count = sequence.numel();
  const int64_t* indices = sequence.const_data_ptr<int64_t>();
  const int64_t* targets = classes.const_data_ptr<int64_t>();

  Tensor losses = new_tensor(parameters[0], {count});
  Tensor predictions = new_tensor(order, {count});
  const auto run = [&](auto element) {
    using T = decltype(element);
    Network<T> net(network, parameters, velocities, kernels, pictures,
                   Settings{static_cast<Loss>(loss), step, lr, lr_decay, weight_decay, momentum,
                            dampening, nesterov, started, threads});
    for (int64_t i = 0; i < count; ++i) {
      MNIST_OPS_CHECK(indices[i] >= 0 && indices[i] < images.size(0), kOp,
                      ": order must be in [0, ", images.size(0), "), got ", indices[i],
                      " at position ", i);
      const int64_t target = targets[indices[i]];
      MNIST_OPS_CHECK(target >= 0 && target < net.classes(), kOp, ": labels must be in [0, ",
                      net.classes(), "), got ", target, " at position ", indices[i]);
    }
    MNIST_OPS_CHECK(
        numbers.scalar_type() == ScalarType::Double && numbers.numel() == count * net.uniforms(),
        kOp, ": dropout needs ", count * net.uniforms(), " float64 numbers, got ", numbers.numel());
    const double* u = numbers.const_data_ptr<double>();
    T* loss_of = losses.mutable_data_ptr<T>();
    int64_t* predicted = predictions.mutable_data_ptr<int64_t>();
    if (pictures.scalar_type() == ScalarType::Double) {
      net.run(pictures.const_data_ptr<double>(), targets, indices, count, u, loss_of, predicted);
    } else {
      net.run(pictures.const_data_ptr<float>(), targets, indices, count, u, loss_of, predicted);
    }
    net.finish(parameters, velocities);
  };
  dispatch_computed(parameters[0], run);
  return {losses, predictions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("online_sgd", TORCH_BOX(&online_sgd));
}

}  // namespace mnist_ops::online
