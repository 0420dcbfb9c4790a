// The network's text, read once for both engines: the CPU's layers and the GPU's program are built
// from the same list, and what does not fit is refused in the same words.
//
// One layer a line: its kind, its numbers, its name in the module
//   conv2d      out_channels kernel_h kernel_w padding_h padding_w bias
//   linear      out_features bias
//   identity | tanh | relu | sigmoid | flatten | log_softmax_torch7
//   log_softmax beta
//   lp_pool2d   norm_type kernel_h kernel_w stride_h stride_w padding_h padding_w ceil_mode
//   max_pool2d  as lp_pool2d, without norm_type
//   avg_pool2d  as max_pool2d, then count_include_pad divisor (0: the window's size)
//   subtractive_norm2d
//   dropout     p
#pragma once

#include "../local_norm.h"
#include "../lp_pool.h"

#include <cmath>
#include <sstream>

namespace mnist_ops::online {

// One image's map of C channels, or a vector of C features as a map of one pixel.
struct Shape {
  int64_t C, H, W;
  bool flat;  // a vector: what Linear and LogSoftmax take

  int64_t pixels() const { return H * W; }
  int64_t numel() const { return C * H * W; }
  std::string text() const {
    std::string result("(");
    result.append(std::to_string(C));
    if (!flat) {
      result.append(", ").append(std::to_string(H)).append(", ").append(std::to_string(W));
    }
    return result.append(flat ? ",)" : ")");
  }
};

struct ConvolutionOptions {
  int64_t outputs, kernel_h, kernel_w, padding_h, padding_w;
};

enum class Kind {
  kConv2d,
  kLinear,
  kTanh,
  kRelu,
  kSigmoid,
  kDropout,
  kFlatten,
  kLogSoftmax,
  kTorch7LogSoftmax,
  kSubtractiveNorm2d,
  kLpPool2d,
  kMaxPool2d,
  kAvgPool2d,
};

// A layer of the text. Those that do nothing, as the flattening of a vector, are left out.
struct LayerSpec {
  Kind kind;
  Shape in, out;
  ConvolutionOptions convolution{};
  int64_t weight = -1, bias = -1;  // indices among the parameters; -1: there is none
  int64_t kernel = -1;             // index among the normalizations' kernels
  double number = 1.0;             // dropout's p, log_softmax's beta
  int64_t first_uniform = 0;       // of dropout's random numbers for one sample
  PoolArguments pooling{};
  bool count_padding = false;
  int64_t divisor = 0;
  // Whether a layer before this one has parameters: a gradient with respect to the input is wanted.
  bool gradient = false;

  bool has_parameters() const { return weight >= 0; }
};

struct NetworkSpec {
  Shape input, output;
  std::vector<LayerSpec> layers;
  int64_t uniforms = 0;  // dropout's random numbers for one sample
};

// A line of the text.
class LineReader {
 public:
  LineReader(const char* op, const std::string& line) : op_(op), text_(line), line_(line) {
    text_ >> kind;
  }

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
    MNIST_OPS_CHECK(read > 0 && read == word.size(), op_, ": the network's line '", line_,
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
    return std::string(op_) + ": layer '" + name + "' (" + kind + ")";
  }

  std::string kind;

 private:
  const char* op_;
  std::istringstream text_;
  std::string line_;
};

class NetworkReader {
 public:
  NetworkReader(const char* op, const std::vector<Tensor>& parameters,
                const std::vector<Tensor>& kernels)
      : op_(op), parameters_(parameters), kernels_(kernels) {}

  NetworkSpec read(const std::string& text, const Shape& input) {
    spec_.input = spec_.output = input;
    check_size(input, std::string(op_) + ": images");
    std::istringstream lines(text);
    bool any = false;
    for (std::string line; std::getline(lines, line); any = true) add(line);
    MNIST_OPS_CHECK(any, op_, ": the network has no layers");
    const std::size_t given = parameters_.size(), kernels_given = kernels_.size();
    MNIST_OPS_CHECK(next_parameter_ == given && next_kernel_ == kernels_given, op_, ": ", given,
                    " parameters and ", kernels_given, " kernels were given, the layers have ",
                    next_parameter_, " and ", next_kernel_);
    MNIST_OPS_CHECK(spec_.output.flat, layer_, ": the network must end in a vector of scores, ",
                    "got a map of ", spec_.output.text());
    MNIST_OPS_CHECK(trained_, op_, ": the network has no parameters to train");
    return spec_;
  }

 private:
  void add(const std::string& line) {
    LineReader reader(op_, line);
    const std::string& kind = reader.kind;
    const Shape in = spec_.output;
    LayerSpec layer{};
    layer.in = layer.out = in;
    layer.gradient = trained_;
    if (kind == "conv2d") {
      layer.kind = Kind::kConv2d;
      layer.convolution = {reader.number(), reader.number(), reader.number(), reader.number(),
                           reader.number()};
      const ConvolutionOptions& o = layer.convolution;
      const bool bias = reader.number() != 0;
      layer_ = reader.layer();
      expect_map(in);
      const int64_t limit = int64_t{1} << 20;  // keeps every product clear of overflow
      MNIST_OPS_CHECK(o.outputs > 0 && o.kernel_h > 0 && o.kernel_w > 0 && o.padding_h >= 0 &&
                          o.padding_w >= 0 && o.kernel_h < limit && o.kernel_w < limit &&
                          o.padding_h < limit && o.padding_w < limit,
                      layer_, ": impossible arguments in '", line, "'");
      layer.out = {o.outputs, in.H + 2 * o.padding_h - o.kernel_h + 1,
                   in.W + 2 * o.padding_w - o.kernel_w + 1, false};
      MNIST_OPS_CHECK(layer.out.H > 0 && layer.out.W > 0, layer_, ": a kernel of (", o.kernel_h,
                      ", ", o.kernel_w, ") does not fit into its input of ", in.text());
      layer.weight = parameter({o.outputs, in.C, o.kernel_h, o.kernel_w}, in);
      if (bias) layer.bias = parameter({o.outputs}, in);
    } else if (kind == "linear") {
      layer.kind = Kind::kLinear;
      const int64_t outputs = reader.number();
      const bool bias = reader.number() != 0;
      layer_ = reader.layer();
      expect_vector(in);
      MNIST_OPS_CHECK(outputs > 0, layer_, ": impossible arguments in '", line, "'");
      layer.out = {outputs, 1, 1, true};
      layer.weight = parameter({outputs, in.C}, in);
      if (bias) layer.bias = parameter({outputs}, in);
    } else if (kind == "tanh" || kind == "relu" || kind == "sigmoid") {
      layer.kind = kind == "tanh" ? Kind::kTanh : kind == "relu" ? Kind::kRelu : Kind::kSigmoid;
      layer_ = reader.layer();
    } else if (kind == "identity") {
      return;
    } else if (kind == "dropout") {
      layer.kind = Kind::kDropout;
      layer.number = reader.number<double>();
      layer_ = reader.layer();
      MNIST_OPS_CHECK(layer.number >= 0 && layer.number < 1, layer_, ": p must be in [0, 1), got ",
                      layer.number);
      layer.first_uniform = spec_.uniforms;
      spec_.uniforms += in.numel();
    } else if (kind == "flatten") {
      layer.kind = Kind::kFlatten;
      layer_ = reader.layer();
      if (in.flat) return;
      layer.out = {in.numel(), 1, 1, true};
    } else if (kind == "log_softmax" || kind == "log_softmax_torch7") {
      const bool exact = kind == "log_softmax";
      layer.kind = exact ? Kind::kLogSoftmax : Kind::kTorch7LogSoftmax;
      if (exact) layer.number = reader.number<double>();
      layer_ = reader.layer();
      MNIST_OPS_CHECK(std::isfinite(layer.number), layer_, ": beta must be finite, got ",
                      layer.number);
      expect_vector(in);
    } else if (kind == "subtractive_norm2d") {
      layer.kind = Kind::kSubtractiveNorm2d;
      layer_ = reader.layer();
      expect_map(in);
      MNIST_OPS_CHECK(next_kernel_ < kernels_.size(), layer_, ": its kernel was not given");
      check_norm_kernel(op_, kernels_[next_kernel_], parameters_[0]);
      layer.kernel = static_cast<int64_t>(next_kernel_++);
    } else if (kind == "lp_pool2d" || kind == "max_pool2d" || kind == "avg_pool2d") {
      layer.kind = kind[0] == 'l'   ? Kind::kLpPool2d
                   : kind[0] == 'm' ? Kind::kMaxPool2d
                                    : Kind::kAvgPool2d;
      layer.pooling = reader.pooling(kind[0] == 'l' ? reader.number<double>() : 1.0);
      layer.count_padding = kind[0] == 'a' && reader.number() != 0;
      layer.divisor = kind[0] == 'a' ? reader.number() : 0;
      layer_ = reader.layer();
      expect_map(in);
      layer.out = pooled(in, layer.pooling);
      const int64_t limit = int64_t{1} << 31;  // of what the GPU's program holds
      MNIST_OPS_CHECK(layer.pooling.kernel[0] * layer.pooling.kernel[1] < limit &&
                          layer.divisor > -limit && layer.divisor < limit,
                      layer_, ": impossible arguments in '", line, "'");
    } else {
      MNIST_OPS_CHECK(false, op_, ": there is no layer '", kind, "' in this engine");
    }
    check_size(layer.out, layer_);
    spec_.output = layer.out;
    spec_.layers.push_back(layer);
  }

  // The index of the next parameter, which must have this shape.
  int64_t parameter(const std::vector<int64_t>& shape, const Shape& in) {
    MNIST_OPS_CHECK(next_parameter_ < parameters_.size(), layer_,
                    ": its parameters were not given");
    const Tensor& tensor = parameters_[next_parameter_];
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string text;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      fits = fits && tensor.size(d) == shape[d];
      text += (d ? ", " : "") + std::to_string(shape[d]);
    }
    MNIST_OPS_CHECK(fits, layer_, ": expected a parameter of (", text, ") for its input of ",
                    in.text(), ", got ", shape_string(tensor));
    trained_ = true;
    return static_cast<int64_t>(next_parameter_++);
  }

  Shape pooled(const Shape& in, const PoolArguments& a) const {
    check_pool_arguments(op_, a);
    const Shape out{in.C, pooled_size(in.H, a.kernel[0], a.stride[0], a.padding[0], a.ceil_mode),
                    pooled_size(in.W, a.kernel[1], a.stride[1], a.padding[1], a.ceil_mode), false};
    MNIST_OPS_CHECK(out.H > 0 && out.W > 0, layer_, ": kernel_size (", a.kernel[0], ", ",
                    a.kernel[1], ") does not fit into its input of ", in.text());
    return out;
  }

  // A map has elements, and so few that no product of sizes overflows.
  static void check_size(const Shape& map, const std::string& whose) {
    const int64_t limit = int64_t{1} << 40;
    MNIST_OPS_CHECK(map.C > 0 && map.H > 0 && map.W > 0 && map.C < limit && map.H < limit &&
                        map.W < limit && map.H <= limit / map.W && map.C <= limit / map.pixels(),
                    whose, ": expected between 1 and 2^40 elements, got a map of ", map.text());
  }

  void expect_map(const Shape& in) const {
    MNIST_OPS_CHECK(!in.flat, layer_, ": expected a map (C, H, W), got a vector of ", in.C,
                    " features");
  }
  void expect_vector(const Shape& in) const {
    MNIST_OPS_CHECK(in.flat, layer_, ": expected a vector, got a map of ", in.text(),
                    "; put a Flatten before it");
  }

  const char* op_;
  const std::vector<Tensor>& parameters_;
  const std::vector<Tensor>& kernels_;
  NetworkSpec spec_;
  std::string layer_;  // the one being added, for messages
  std::size_t next_parameter_ = 0, next_kernel_ = 0;
  bool trained_ = false;  // a layer with parameters was added
};

// What both engines ask of their operators' arguments.
inline void check_online_arguments(const char* op, const std::vector<Tensor>& parameters,
                                   const Tensor& images, const Tensor& labels, int64_t loss) {
  const auto is_float = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double || tensor.scalar_type() == ScalarType::Float;
  };
  const auto name_of = [](const Tensor& tensor) {
    return torch::headeronly::toString(tensor.scalar_type());
  };
  MNIST_OPS_CHECK(!parameters.empty(), op, ": the network has no parameters");
  MNIST_OPS_CHECK(is_float(parameters[0]), op, ": parameters must be float64 or float32, got ",
                  name_of(parameters[0]));
  MNIST_OPS_CHECK(images.dim() == 2 || images.dim() == 4, op,
                  ": images must be (N, C, H, W) or (N, features), got the shape ",
                  shape_string(images));
  MNIST_OPS_CHECK(is_float(images), op, ": images must be float64 or float32, got ",
                  name_of(images));
  MNIST_OPS_CHECK(labels.dim() == 1 && labels.scalar_type() == ScalarType::Long &&
                      labels.size(0) == images.size(0),
                  op, ": labels must be int64 (", images.size(0), ",), got ", name_of(labels), " ",
                  shape_string(labels));
  MNIST_OPS_CHECK(loss >= 0 && loss <= 2, op, ": loss must be 0, 1 or 2, got ", loss);
}

// Dense tensors to train in, of which those that are copies go back at the end.
inline std::vector<Tensor> dense_to_write(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(contiguous_to_write(tensor));
  return result;
}
inline void copy_back(std::vector<Tensor>& tensors, const std::vector<Tensor>& dense) {
  for (std::size_t i = 0; i < dense.size(); ++i) {
    if (tensors[i].data_ptr() != dense[i].data_ptr()) torch::stable::copy_(tensors[i], dense[i]);
  }
}

// The shape of one sample of images (N, C, H, W) or (N, features).
inline Shape sample_shape(const Tensor& images) {
  if (images.dim() == 2) return {images.size(1), 1, 1, true};
  return {images.size(1), images.size(2), images.size(3), false};
}

}  // namespace mnist_ops::online
