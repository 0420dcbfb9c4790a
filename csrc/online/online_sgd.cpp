// online_sgd: a stretch of training with batch size 1, sample after sample, in one call.
//
// The network comes as text, one layer a line: its kind, its numbers, its name in the module
//   conv2d      out_channels kernel_h kernel_w padding_h padding_w bias
//   linear      out_features bias
//   identity | tanh | relu | sigmoid | flatten | log_softmax_torch7
//   log_softmax beta
//   lp_pool2d   norm_type kernel_h kernel_w stride_h stride_w padding_h padding_w ceil_mode
//   max_pool2d  as lp_pool2d, without norm_type
//   avg_pool2d  as max_pool2d, then count_include_pad divisor (0: the window's size)
//   subtractive_norm2d
//   dropout     p
// Every buffer is planned before the first sample; the loop over samples allocates nothing and
// cannot fail. What a step costs is in its convolutions (convolution.h says how they run) but for
// about a tenth.

#include "convolution.h"
#include "linear.h"
#include "losses.h"
#include "norm.h"
#include "pointwise.h"
#include "pooling.h"

#include <sstream>

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

// A layer's line of the text, and where it takes its parameters and kernel from.
class Reader {
 public:
  explicit Reader(const std::string& line) : text_(line), line_(line) { text_ >> kind; }

  template <typename V = int64_t>
  V number() {
    V value{};
    std::string word;
    text_ >> word;
    std::size_t read = 0;
    try {
      // Not by a stream, which reads no "inf".
      if constexpr (std::is_same_v<V, double>) {
        value = std::stod(word, &read);
      } else {
        value = std::stoll(word, &read);
      }
    } catch (const std::logic_error&) {
      read = 0;
    }
    MNIST_OPS_CHECK(read > 0 && read == word.size(), kOp, ": the network's line '", line_,
                    "' has no number where one must be");
    return value;
  }

  PoolArguments pooling(double p) {
    PoolArguments a{p, {}, {}, {}, false};
    for (auto* pair : {&a.kernel, &a.stride, &a.padding}) {
      pair->push_back(number());
      pair->push_back(number());
    }
    a.ceil_mode = number() != 0;
    return a;
  }

  // "layer 'conv1' (conv2d)", for messages; to be called after the numbers were read.
  std::string layer() {
    std::string name;
    std::getline(text_ >> std::ws, name);
    return std::string(kOp) + ": layer '" + name + "' (" + kind + ")";
  }

  std::string kind;

 private:
  std::istringstream text_;
  std::string line_;
};

template <typename T>
class Network {
 public:
  Network(const std::string& text, const std::vector<Tensor>& parameters,
          const std::vector<Tensor>& velocities, const std::vector<Tensor>& kernels,
          const Tensor& images, const Settings& settings)
      : settings_(settings), workers_{settings.threads} {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      parameters_.push_back(torch::stable::contiguous(parameters[i]));
      if (!velocities.empty()) velocities_.push_back(torch::stable::contiguous(velocities[i]));
    }
    Shape shape{1, 1, 1, false};
    for (int64_t d = 1; d < images.dim(); ++d) {
      (d == images.dim() - 3   ? shape.C
       : d == images.dim() - 2 ? shape.H
                               : shape.W) = images.size(d);
    }
    if (images.dim() == 2) shape = {images.size(1), 1, 1, true};

    std::istringstream lines(text);
    std::vector<std::string> all;
    for (std::string line; std::getline(lines, line);) all.push_back(line);
    MNIST_OPS_CHECK(!all.empty(), kOp, ": the network has no layers");
    // An image of one channel stays as it is where a convolution reads it; otherwise it takes a
    // whole block like all other maps.
    const bool image = all[0].rfind("conv2d ", 0) == 0 && shape.C == 1;
    Map<T> map{shape, nullptr, nullptr, image ? 1 : kLanes<T>};
    map.value = allocate(map.blocks() * map.block());
    input_ = map;
    for (const std::string& line : all) map = add(line, map, kernels);
    MNIST_OPS_CHECK(next_parameter_ == parameters_.size() && next_kernel_ == kernels.size(), kOp,
                    ": ", parameters_.size(), " parameters and ", kernels.size(),
                    " kernels were given, the layers have ", next_parameter_, " and ",
                    next_kernel_);
    MNIST_OPS_CHECK(map.shape.flat, layer_name_, ": the network must end in a vector of scores, ",
                    "got a map of ", map.shape.text());
    MNIST_OPS_CHECK(trained_, kOp, ": the network has no parameters to train");
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
    const auto copy = [](Tensor& to, const Tensor& from) {
      if (to.data_ptr() != from.data_ptr()) torch::stable::copy_(to, from);
    };
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      copy(parameters[i], parameters_[i]);
      if (!velocities_.empty()) copy(velocities[i], velocities_[i]);
    }
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

  Parameter<T> parameter(const std::vector<int64_t>& shape) {
    MNIST_OPS_CHECK(next_parameter_ < parameters_.size(), layer_name_,
                    ": its parameters were not given");
    const Tensor& tensor = parameters_[next_parameter_];
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string text;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      fits = fits && tensor.size(d) == shape[d];
      text += (d ? ", " : "") + std::to_string(shape[d]);
    }
    MNIST_OPS_CHECK(fits, layer_name_, ": expected a parameter of (", text, ") for its input of ",
                    input_text_, ", got ", shape_string(tensor));
    Parameter<T> result;
    result.value = parameters_[next_parameter_].template mutable_data_ptr<T>();
    if (!velocities_.empty()) {
      MNIST_OPS_CHECK(same_shape(velocities_[next_parameter_], tensor), layer_name_,
                      ": velocities must have the shapes of their parameters");
      result.velocity = velocities_[next_parameter_].template mutable_data_ptr<T>();
    }
    ++next_parameter_;
    return result;
  }

  template <typename L, typename... Args>
  Map<T> push(const Map<T>& in, const Map<T>& out, const Args&... args) {
    layers_.push_back(std::make_unique<L>(in, out, args...));
    return out;
  }

  Shape pooled(const Map<T>& in, const PoolArguments& a) {
    check_pool_arguments(kOp, a);
    const Shape& s = in.shape;
    const Shape out{s.C, pooled_size(s.H, a.kernel[0], a.stride[0], a.padding[0], a.ceil_mode),
                    pooled_size(s.W, a.kernel[1], a.stride[1], a.padding[1], a.ceil_mode), false};
    MNIST_OPS_CHECK(out.H > 0 && out.W > 0, layer_name_, ": kernel_size (", a.kernel[0], ", ",
                    a.kernel[1], ") does not fit into its input of ", s.text());
    return out;
  }

  void expect_map(const Map<T>& in) const {
    MNIST_OPS_CHECK(!in.shape.flat, layer_name_, ": expected a map (C, H, W), got a vector of ",
                    in.shape.C, " features");
  }
  void expect_vector(const Map<T>& in) const {
    MNIST_OPS_CHECK(in.shape.flat, layer_name_, ": expected a vector, got a map of ",
                    in.shape.text(), "; put a Flatten before it");
  }

  Map<T> add(const std::string& line, const Map<T>& in, const std::vector<Tensor>& kernels) {
    Reader reader(line);
    const std::string& kind = reader.kind;
    input_text_ = in.shape.text();
    // Layers before the first parameters need no gradient.
    const bool grad = trained_;
    if (kind == "conv2d") {
      const ConvolutionOptions o{reader.number(), reader.number(), reader.number(), reader.number(),
                                 reader.number()};
      const bool bias = reader.number() != 0;
      layer_name_ = reader.layer();
      expect_map(in);
      const int64_t limit = int64_t{1} << 20;  // keeps every product clear of overflow
      MNIST_OPS_CHECK(o.outputs > 0 && o.kernel_h > 0 && o.kernel_w > 0 && o.padding_h >= 0 &&
                          o.padding_w >= 0 && o.kernel_h < limit && o.kernel_w < limit &&
                          o.padding_h < limit && o.padding_w < limit,
                      layer_name_, ": impossible arguments in '", line, "'");
      const Shape shape{o.outputs, in.shape.H + 2 * o.padding_h - o.kernel_h + 1,
                        in.shape.W + 2 * o.padding_w - o.kernel_w + 1, false};
      MNIST_OPS_CHECK(shape.H > 0 && shape.W > 0, layer_name_, ": a kernel of (", o.kernel_h, ", ",
                      o.kernel_w, ") does not fit into its input of ", in.shape.text());
      const Parameter<T> weight = parameter({o.outputs, in.shape.C, o.kernel_h, o.kernel_w});
      const Parameter<T> none{};
      const Parameter<T> bias_parameter = bias ? parameter({o.outputs}) : none;
      trained_ = true;
      const Map<T> out = new_map(shape, true);
      layers_.push_back(std::make_unique<Convolution<T>>(o, in, out, weight, bias_parameter));
      return out;
    }
    if (kind == "linear") {
      const int64_t outputs = reader.number();
      const bool bias = reader.number() != 0;
      layer_name_ = reader.layer();
      expect_vector(in);
      MNIST_OPS_CHECK(outputs > 0, layer_name_, ": impossible arguments in '", line, "'");
      const Parameter<T> weight = parameter({outputs, in.shape.C});
      const Parameter<T> none{};
      const Parameter<T> bias_parameter = bias ? parameter({outputs}) : none;
      trained_ = true;
      return push<Linear<T>>(in, new_map({outputs, 1, 1, true}, true), weight, bias_parameter);
    }
    if (kind == "tanh" || kind == "relu" || kind == "sigmoid") {
      layer_name_ = reader.layer();
      const Map<T> out = same_map(in);
      if (kind == "tanh") return push<Activation<T, ActivationKind::kTanh>>(in, out);
      if (kind == "relu") return push<Activation<T, ActivationKind::kRelu>>(in, out);
      return push<Activation<T, ActivationKind::kSigmoid>>(in, out);
    }
    if (kind == "identity") return in;
    if (kind == "dropout") {
      const double p = reader.number<double>();
      layer_name_ = reader.layer();
      MNIST_OPS_CHECK(p >= 0 && p < 1, layer_name_, ": p must be in [0, 1), got ", p);
      const int64_t first = uniforms_;
      uniforms_ += in.shape.C * in.shape.pixels();
      return push<Dropout<T>>(in, same_map(in), p, first);
    }
    if (kind == "flatten") {
      layer_name_ = reader.layer();
      if (in.shape.flat) return in;
      return push<Flatten<T>>(in, new_map({in.shape.C * in.shape.pixels(), 1, 1, true}, grad));
    }
    if (kind == "log_softmax" || kind == "log_softmax_torch7") {
      const double beta = kind == "log_softmax" ? reader.number<double>() : 1.0;
      layer_name_ = reader.layer();
      expect_vector(in);
      const Map<T> out = new_map(in.shape, grad);
      if (kind == "log_softmax") return push<LogSoftmax<T>>(in, out, beta);
      return push<Torch7LogSoftmax<T>>(in, out);
    }
    if (kind == "subtractive_norm2d") {
      layer_name_ = reader.layer();
      expect_map(in);
      MNIST_OPS_CHECK(next_kernel_ < kernels.size(), layer_name_, ": its kernel was not given");
      check_norm_kernel(kOp, kernels[next_kernel_], kernels[next_kernel_]);
      return push<SubtractiveNorm<T>>(in, same_map(in), kernels[next_kernel_++]);
    }
    if (kind == "lp_pool2d" || kind == "max_pool2d" || kind == "avg_pool2d") {
      const PoolArguments a = reader.pooling(kind[0] == 'l' ? reader.number<double>() : 1.0);
      const bool count_padding = kind[0] == 'a' && reader.number() != 0;
      const int64_t divisor = kind[0] == 'a' ? reader.number() : 0;
      layer_name_ = reader.layer();
      expect_map(in);
      const Map<T> out = new_map(pooled(in, a), grad);
      if (kind[0] == 'm') return push<MaxPooling<T>>(in, out, a);
      if (kind[0] == 'a') return push<AveragePooling<T>>(in, out, a, count_padding, divisor);
      switch (norm_of(a.p)) {
        case Norm::kOne:
          return push<LpPooling<T, Norm::kOne>>(in, out, a);
        case Norm::kTwo:
          return push<LpPooling<T, Norm::kTwo>>(in, out, a);
        case Norm::kInf:
          return push<LpPooling<T, Norm::kInf>>(in, out, a);
        case Norm::kGeneral:
          return push<LpPooling<T, Norm::kGeneral>>(in, out, a);
      }
    }
    MNIST_OPS_CHECK(false, kOp, ": there is no layer '", kind, "' in this engine");
    return in;
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
  std::string layer_name_, input_text_;  // the layer being added
  std::size_t next_parameter_ = 0, next_kernel_ = 0;
  int64_t uniforms_ = 0;
  bool trained_ = false;  // a layer with parameters was added
};

ScalarType check_parameters(const std::vector<Tensor>& parameters,
                            const std::vector<Tensor>& velocities) {
  MNIST_OPS_CHECK(!parameters.empty(), kOp, ": the network has no parameters");
  MNIST_OPS_CHECK(velocities.empty() || velocities.size() == parameters.size(), kOp,
                  ": expected one velocity for each of ", parameters.size(), " parameters, got ",
                  velocities.size());
  const ScalarType dtype = parameters[0].scalar_type();
  MNIST_OPS_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, kOp,
                  ": parameters must be float64 or float32, got ",
                  torch::headeronly::toString(dtype));
  for (const auto* tensors : {&parameters, &velocities}) {
    for (const Tensor& tensor : *tensors) {
      MNIST_OPS_CHECK(tensor.scalar_type() == dtype && tensor.is_cpu(), kOp,
                      ": parameters and velocities must all be ",
                      torch::headeronly::toString(dtype), " tensors on the CPU");
    }
  }
  return dtype;
}

std::tuple<Tensor, Tensor> online_sgd(std::vector<Tensor> parameters,
                                      std::vector<Tensor> velocities, std::string network,
                                      std::vector<Tensor> kernels, Tensor images, Tensor labels,
                                      Tensor order, Tensor uniform, int64_t loss, int64_t step,
                                      double lr, double lr_decay, double weight_decay,
                                      double momentum, double dampening, bool nesterov,
                                      bool started, int64_t threads) {
  const ScalarType dtype = check_parameters(parameters, velocities);
  MNIST_OPS_CHECK(images.dim() == 2 || images.dim() == 4, kOp,
                  ": images must be (N, C, H, W) or (N, features), got the shape ",
                  shape_string(images));
  MNIST_OPS_CHECK(
      images.scalar_type() == ScalarType::Double || images.scalar_type() == ScalarType::Float, kOp,
      ": images must be float64 or float32, got ",
      torch::headeronly::toString(images.scalar_type()));
  MNIST_OPS_CHECK(labels.dim() == 1 && labels.scalar_type() == ScalarType::Long &&
                      labels.size(0) == images.size(0),
                  kOp, ": labels must be int64 (", images.size(0), ",), got ",
                  torch::headeronly::toString(labels.scalar_type()), " ", shape_string(labels));
  MNIST_OPS_CHECK(order.dim() == 1 && order.scalar_type() == ScalarType::Long, kOp,
                  ": order must be int64 (M,), got ",
                  torch::headeronly::toString(order.scalar_type()), " ", shape_string(order));
  MNIST_OPS_CHECK(images.is_cpu() && labels.is_cpu() && order.is_cpu() && uniform.is_cpu(), kOp,
                  ": images, labels, order and uniform must be on the CPU");
  MNIST_OPS_CHECK(loss >= 0 && loss <= 2, kOp, ": loss must be 0, 1 or 2, got ", loss);
  MNIST_OPS_CHECK((momentum != 0) == !velocities.empty(), kOp,
                  ": velocities go with a momentum, and only with one");
  MNIST_OPS_CHECK(threads >= 1 && step >= 0, kOp, ": threads must be >= 1 and step >= 0, got ",
                  threads, " and ", step);
  const Tensor pictures = torch::stable::contiguous(images);
  const Tensor classes = torch::stable::contiguous(labels);
  const Tensor sequence = torch::stable::contiguous(order);
  const Tensor numbers = torch::stable::contiguous(uniform);
  const int64_t count = sequence.numel();
  const int64_t* indices = sequence.const_data_ptr<int64_t>();
  const int64_t* targets = classes.const_data_ptr<int64_t>();

  Tensor losses = torch::stable::new_empty(parameters[0], {count});
  Tensor predictions = torch::stable::new_empty(order, {count});
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
  if (dtype == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {losses, predictions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("online_sgd", TORCH_BOX(&online_sgd));
}

}  // namespace mnist_ops::online
