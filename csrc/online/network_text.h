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

#include "formulas.h"

#include <charconv>
#include <cmath>
#include <sstream>

namespace mnist_ops::online {

// One image's map of C channels, or a vector of C features as a map of one pixel.
struct Shape {
  int64_t C = 1, H = 1, W = 1;
  bool flat = false;  // a vector: what Linear and LogSoftmax take

  int64_t pixels() const { return H * W; }
  int64_t numel() const { return C * H * W; }
  std::string text() const {
    return flat ? message_of("(", C, ",)") : message_of("(", C, ", ", H, ", ", W, ")");
  }
};

// The windows of a convolution or a pooling.
struct Window {
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
};

enum class Kind {
  kConv2d,
  kLinear,
  kActivation,
  kDropout,
  kFlatten,
  kLogSoftmax,
  kSubtractiveNorm2d,
  kPool2d,
  kIdentity,
};

// A layer of the text. Those that do nothing, as the flattening of a vector, are left out.
struct LayerSpec {
  Kind kind;
  ActivationKind activation = ActivationKind::kIdentity;
  LogSoftmaxKind log_softmax = LogSoftmaxKind::kNone;
  PoolKind pool = PoolKind::kLp;
  Shape in{}, out{};
  Window window{};
  int64_t weight = -1, bias = -1;  // indices among the parameters; -1: there is none
  int64_t kernel = -1;             // index among the normalizations' kernels
  double number = 1.0;             // norm_type, dropout's p, log_softmax's beta
  int64_t first_uniform = 0;       // of dropout's random numbers for one sample
  bool count_padding = false;
  int64_t divisor = 0;
  // Whether a layer before this one has parameters: a gradient with respect to the input is wanted.
  bool gradient = false;
};

struct NetworkSpec {
  Shape input, output;
  std::vector<LayerSpec> layers;
  int64_t uniforms = 0;  // dropout's random numbers for one sample
};

// The word that begins a line, and how many numbers follow: real ones, then integers.
struct Word {
  const char* text;
  int reals, integers;
  LayerSpec layer;
};
inline const Word kWords[] = {
    {"conv2d", 0, 6, {.kind = Kind::kConv2d}},
    {"linear", 0, 2, {.kind = Kind::kLinear}},
    {"identity", 0, 0, {.kind = Kind::kIdentity}},
    {"tanh", 0, 0, {.kind = Kind::kActivation, .activation = ActivationKind::kTanh}},
    {"relu", 0, 0, {.kind = Kind::kActivation, .activation = ActivationKind::kRelu}},
    {"sigmoid", 0, 0, {.kind = Kind::kActivation, .activation = ActivationKind::kSigmoid}},
    {"flatten", 0, 0, {.kind = Kind::kFlatten}},
    {"log_softmax", 1, 0, {.kind = Kind::kLogSoftmax, .log_softmax = LogSoftmaxKind::kExact}},
    {"log_softmax_torch7",
     0,
     0,
     {.kind = Kind::kLogSoftmax, .log_softmax = LogSoftmaxKind::kTorch7}},
    {"lp_pool2d", 1, 7, {.kind = Kind::kPool2d, .pool = PoolKind::kLp}},
    {"max_pool2d", 0, 7, {.kind = Kind::kPool2d, .pool = PoolKind::kMax}},
    {"avg_pool2d", 0, 9, {.kind = Kind::kPool2d, .pool = PoolKind::kAverage}},
    {"subtractive_norm2d", 0, 0, {.kind = Kind::kSubtractiveNorm2d}},
    {"dropout", 1, 0, {.kind = Kind::kDropout}},
};

class NetworkReader {
 public:
  // kernels: how many there are, of the normalizations.
  NetworkReader(const char* op, const std::vector<Tensor>& parameters, std::size_t kernels)
      : op_(op), parameters_(parameters), kernels_(kernels) {}

  NetworkSpec read(const std::string& text, const Shape& input) {
    spec_.input = spec_.output = input;
    check_size(input, std::string(op_) + ": images");
    std::istringstream lines(text);
    bool any = false;
    for (std::string line; std::getline(lines, line); any = true) add(line);
    MNIST_OPS_CHECK(any, op_, ": the network has no layers");
    const std::size_t given = parameters_.size();
    MNIST_OPS_CHECK(next_parameter_ == given && next_kernel_ == kernels_, op_, ": ", given,
                    " parameters and ", kernels_, " kernels were given, the layers have ",
                    next_parameter_, " and ", next_kernel_);
    MNIST_OPS_CHECK(spec_.output.flat, layer_, ": the network must end in a vector of scores, ",
                    "got a map of ", spec_.output.text());
    MNIST_OPS_CHECK(next_parameter_ > 0, op_, ": the network has no parameters to train");
    return spec_;
  }

 private:
  void add(const std::string& line) {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind;
    const Word* known = std::find_if(std::begin(kWords), std::end(kWords),
                                     [&](const Word& word) { return kind == word.text; });
    MNIST_OPS_CHECK(known != std::end(kWords), op_, ": there is no layer '", kind,
                    "' in this engine");
    LayerSpec layer = known->layer;
    int64_t n[9] = {};
    if (known->reals != 0) layer.number = number<double>(words, line);
    for (int i = 0; i < known->integers; ++i) n[i] = number<int64_t>(words, line);
    if (layer.kind == Kind::kIdentity) return;
    std::getline(words >> std::ws, name);
    layer_ = std::string(op_) + ": layer '" + name + "' (" + kind + ")";
    layer.in = layer.out = spec_.output;
    layer.gradient = next_parameter_ > 0;
    if (!fill(layer, n, line)) return;
    check_size(layer.out, layer_);
    spec_.output = layer.out;
    spec_.layers.push_back(layer);
  }

  template <typename V>
  V number(std::istringstream& words, const std::string& line) const {
    std::string word;
    words >> word;
    V value{};
    const char* const end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data(), end, value);
    MNIST_OPS_CHECK(error == std::errc{} && stop == end, op_, ": the network's line '", line,
                    "' has no number where one must be");
    return value;
  }

  // Fills in what follows from the line's integers and the layer's input; false: it does nothing.
  bool fill(LayerSpec& layer, const int64_t (&n)[9], const std::string& line) {
    const Shape& in = layer.in;
    const auto possible = [&](bool arguments) {
      MNIST_OPS_CHECK(arguments, layer_, ": impossible arguments in '", line, "'");
    };
    switch (layer.kind) {
      case Kind::kConv2d: {
        expect_map(in);
        const int64_t limit = int64_t{1} << 20;  // keeps every product clear of overflow
        possible(n[0] > 0 && n[1] > 0 && n[2] > 0 && n[3] >= 0 && n[4] >= 0 && n[1] < limit &&
                 n[2] < limit && n[3] < limit && n[4] < limit);
        layer.window = {n[1], n[2], 1, 1, n[3], n[4]};
        layer.out = {n[0], in.H + 2 * n[3] - n[1] + 1, in.W + 2 * n[4] - n[2] + 1, false};
        MNIST_OPS_CHECK(layer.out.H > 0 && layer.out.W > 0, layer_, ": a kernel of (", n[1], ", ",
                        n[2], ") does not fit into its input of ", in.text());
        layer.weight = parameter({n[0], in.C, n[1], n[2]}, in);
        if (n[5] != 0) layer.bias = parameter({n[0]}, in);
        break;
      }
      case Kind::kLinear:
        expect_vector(in);
        possible(n[0] > 0);
        layer.out = {n[0], 1, 1, true};
        layer.weight = parameter({n[0], in.C}, in);
        if (n[1] != 0) layer.bias = parameter({n[0]}, in);
        break;
      case Kind::kDropout:
        MNIST_OPS_CHECK(layer.number >= 0 && layer.number < 1, layer_,
                        ": p must be in [0, 1), got ", layer.number);
        layer.first_uniform = spec_.uniforms;
        spec_.uniforms += in.numel();
        break;
      case Kind::kFlatten:
        layer.out = {in.numel(), 1, 1, true};
        return !in.flat;
      case Kind::kLogSoftmax:
        MNIST_OPS_CHECK(std::isfinite(layer.number), layer_, ": beta must be finite, got ",
                        layer.number);
        expect_vector(in);
        break;
      case Kind::kSubtractiveNorm2d:
        expect_map(in);
        MNIST_OPS_CHECK(next_kernel_ < kernels_, layer_, ": its kernel was not given");
        layer.kernel = static_cast<int64_t>(next_kernel_++);
        break;
      case Kind::kPool2d: {
        expect_map(in);
        const bool ceil_mode = n[6] != 0;
        check_pool_arguments(op_,
                             {layer.number, {n[0], n[1]}, {n[2], n[3]}, {n[4], n[5]}, ceil_mode});
        layer.window = {n[0], n[1], n[2], n[3], n[4], n[5]};
        layer.count_padding = n[7] != 0;
        layer.divisor = n[8];
        layer.out = {in.C, pooled_size(in.H, n[0], n[2], n[4], ceil_mode),
                     pooled_size(in.W, n[1], n[3], n[5], ceil_mode), false};
        MNIST_OPS_CHECK(layer.out.H > 0 && layer.out.W > 0, layer_, ": kernel_size (", n[0], ", ",
                        n[1], ") does not fit into its input of ", in.text());
        const int64_t limit = int64_t{1} << 31;  // of what the GPU's program holds
        possible(n[0] * n[1] < limit && n[8] > -limit && n[8] < limit);
        break;
      }
      case Kind::kActivation:
      case Kind::kIdentity:
        break;
    }
    return true;
  }

  // The index of the next parameter, which must have this shape.
  int64_t parameter(const std::vector<int64_t>& shape, const Shape& in) {
    MNIST_OPS_CHECK(next_parameter_ < parameters_.size(), layer_,
                    ": its parameters were not given");
    const Tensor& tensor = parameters_[next_parameter_];
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    MNIST_OPS_CHECK(tensor.sizes().equals(shape), layer_, ": expected a parameter of (", text,
                    ") for its input of ", in.text(), ", got ", shape_string(tensor));
    return static_cast<int64_t>(next_parameter_++);
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
  NetworkSpec spec_;
  std::string layer_;  // the one being added, for messages
  std::size_t kernels_, next_parameter_ = 0, next_kernel_ = 0;
};

}  // namespace mnist_ops::online
