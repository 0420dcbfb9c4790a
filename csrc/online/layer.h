// What a layer of the engine is, and the rule by which parameters change.
#pragma once

#include "simd.h"

namespace mnist_ops::online {

// One image's map of C channels, or a vector of C features as a map of one pixel.
struct Shape {
  int64_t C, H, W;
  bool flat;  // a vector: what Linear and LogSoftmax take

  int64_t pixels() const { return H * W; }
  std::string text() const {
    std::string result("(");
    result.append(std::to_string(C));
    if (!flat) {
      result.append(", ").append(std::to_string(H)).append(", ").append(std::to_string(W));
    }
    return result.append(flat ? ",)" : ")");
  }
};

template <typename T>
int64_t block_count(const Shape& shape) {
  return divide_up(shape.C, kLanes<T>);
}
template <typename T>
int64_t block_size(const Shape& shape) {
  return shape.pixels() * kLanes<T>;
}

// A map and the gradient with respect to it.
template <typename T>
struct Map {
  Shape shape;
  T* value;
  T* grad;                    // nullptr where no gradient is wanted
  int64_t lanes = kLanes<T>;  // 1: pixels lie next to each other (an image of one channel)

  int64_t blocks() const { return divide_up(shape.C, lanes); }
  int64_t block() const { return shape.pixels() * lanes; }
};

// Plain SGD as in Torch7's optim.sgd, the arithmetic of mnist_ops.optim.Torch7SGD:
//   g += decay w;  v = momentum v + (1 - dampening) g, v = g in the first step;
//   w -= rate (g + momentum v | v | g)     Nesterov, momentum, neither
template <typename T>
struct Update {
  T rate, weight_decay, momentum, keep;  // keep = 1 - dampening
  bool first, nesterov;

  bool plain() const { return weight_decay == T(0) && momentum == T(0); }

  // New values of n parameters from their gradients; v is nullptr where there is no momentum.
  void row(T* w, T* v, const T* g, int64_t n) const {
    const T step = rate, decay = weight_decay;  // locals: w might be this object, for all C++ knows
    if (plain()) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] = cpu::fmadd(-step, g[i], w[i]);
    } else if (momentum == T(0)) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] -= step * (g[i] + decay * w[i]);
    } else {
      const T m = first ? T(0) : momentum, k = first ? T(1) : keep;
      const T now = nesterov ? T(1) : T(0), later = nesterov ? momentum : T(1);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T gradient = g[i] + decay * w[i];
        v[i] = m * v[i] + k * gradient;
        w[i] -= step * (now * gradient + later * v[i]);
      }
    }
  }
};

// What changes from step to step.
template <typename T>
struct Step {
  Update<T> update;
  const double* uniform;  // dropout's random numbers for this sample
};

// Shares loops out over the threads of torch; one thread runs them in place.
struct Workers {
  int64_t threads = 1;

  template <typename F>
  void operator()(int64_t count, const F& body) const {
    if (threads <= 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    torch::stable::parallel_for(0, count, divide_up(count, threads),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) body(i);
                                });
  }

  // body(begin, end) over [0, count) in one piece a thread, cut at multiples of unit.
  template <typename F>
  void ranges(int64_t count, int64_t unit, const F& body) const {
    const int64_t units = divide_up(count, unit), piece = divide_up(units, threads) * unit;
    (*this)(divide_up(count, piece),
            [&](int64_t i) { body(i * piece, std::min(count, (i + 1) * piece)); });
  }
};

// A parameter of the module and its velocity, both dense.
template <typename T>
struct Parameter {
  T* value = nullptr;
  T* velocity = nullptr;  // nullptr without momentum
};

// A layer works on blocks of channels. A local layer's block needs that block only, so that the
// blocks of a chain of local layers can be taken one after the other while they are in cache, and
// by different threads. All others first see the whole map, in the prepare functions.
template <typename T>
class Layer {
 public:
  virtual ~Layer() = default;

  virtual bool local() const { return false; }
  virtual bool has_parameters() const { return false; }
  // Whether backward reads this layer's output: the next layer must not work in place then.
  virtual bool needs_output() const { return false; }

  virtual void prepare_forward(const Step<T>&, const Workers&) {}
  virtual void forward(int64_t /*block*/) {}
  virtual void prepare_backward(const Step<T>&, const Workers&) {}
  virtual void backward(int64_t /*block*/) {}
  // Applies the gradient of the parameters that belong to one block of the output.
  virtual void update(int64_t /*block*/, const Step<T>&) {}

  // Parameters are read before a run of samples and written back after it by the layers that keep
  // them in an order of their own.
  virtual void read_parameters() {}
  virtual void write_parameters() {}

  Map<T> in, out;
};

}  // namespace mnist_ops::online
