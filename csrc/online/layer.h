// What a layer of the engine is, and the rule by which parameters change.
#pragma once

#include "formulas.h"
#include "network_text.h"
#include "simd.h"

namespace mnist_ops::online {

// A map and the gradient with respect to it.
template <typename T>
struct Map {
  Shape shape;
  T* value;
  T* grad;                    // nullptr where no gradient is wanted
  int64_t lanes = kLanes<T>;  // 1: pixels lie next to each other (an image of one channel)

  int64_t blocks() const { return divide_up(shape.C, lanes); }
  int64_t block() const { return shape.pixels() * lanes; }
  T* value_of(int64_t b) const { return value + b * block(); }
  T* grad_of(int64_t b) const { return grad + b * block(); }

  // body(offset in the map, index in the order (c, h, w)) for every element.
  template <typename F>
  MNIST_OPS_HD void each_element(const F& body) const {
    const int64_t pixels = shape.pixels();
    for (int64_t c = 0; c < shape.C; ++c) {
      const int64_t first = c / lanes * block() + c % lanes;
      for (int64_t p = 0; p < pixels; ++p) body(first + p * lanes, c * pixels + p);
    }
  }
};

// The update of n parameters from their gradients; v is nullptr where there is no momentum.
template <typename T>
void update_row(const Update<T>& update, T* w, T* v, const T* g, int64_t n) {
  const T step = update.rate, decay = update.weight_decay;
  if (update.plain()) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = plain_step(w[i], g[i], step);
  } else if (update.momentum == T(0)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = decayed_step(w[i], g[i], step, decay);
  } else {
    const T m = update.first ? T(0) : update.momentum, k = update.first ? T(1) : update.keep;
    const T now = update.nesterov ? T(1) : T(0), later = update.nesterov ? update.momentum : T(1);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) momentum_step(w[i], v[i], g[i], step, decay, m, k, now, later);
  }
}

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
  Layer(const Map<T>& input, const Map<T>& output) : in(input), out(output) {}
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

  // Layers that keep parameters in an order of their own read them before a run of samples, and
  // write them back after it.
  virtual void move_parameters(bool /*back*/) {}

  Map<T> in, out;
};

}  // namespace mnist_ops::online
