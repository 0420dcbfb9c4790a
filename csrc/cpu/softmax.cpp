// Softmax, log-softmax and softmax + NLL on the CPU.
//
// Bound by the exponential (one an element; none in the log-softmax's second pass), then by memory:
// each element is read once and written once, rows and blocks of rows staying in cache between the
// passes over them. Where the dimension is innermost in memory the loops run along it; elsewhere
// they run across, over a block of neighbouring lines at a time.

#include "../softmax.h"

#include "common.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kLines = 64;  // lines of a block, where the dimension is not innermost

// A view of `lines` neighbouring lines of `size` elements, as a matrix [size][lines] in A.
// Lines are neighbours in memory if inner > 1; along a single line everything is contiguous.
template <typename A>
struct Block {
  int64_t size, lines;
  A* values;
  A *largest, *sum;  // one for each line

  void find_largest() {
    if (lines == 1) {
      // A maximum that passes over NaN is no reduction to the compiler: several at once, by hand.
      constexpr int64_t kParts = 32;
      A parts[kParts];
      std::fill(parts, parts + kParts, -std::numeric_limits<A>::infinity());
      const A* const x = values;
      const int64_t whole = size / kParts * kParts;
      for (int64_t i = 0; i < whole; i += kParts) {
#pragma omp simd
        for (int64_t j = 0; j < kParts; ++j) parts[j] = x[i + j] > parts[j] ? x[i + j] : parts[j];
      }
      A m = parts[0];
      for (int64_t j = 1; j < kParts; ++j) m = parts[j] > m ? parts[j] : m;
      for (int64_t i = whole; i < size; ++i) m = x[i] > m ? x[i] : m;
      largest[0] = m;
    } else {
      std::copy(values, values + lines, largest);
      for (int64_t i = 1; i < size; ++i) {
        const A* x = values + i * lines;
#pragma omp simd
        for (int64_t j = 0; j < lines; ++j) largest[j] = x[j] > largest[j] ? x[j] : largest[j];
      }
    }
  }

  // sum over the line of term(value, index, largest of the line). The line's numbers are handed
  // over by value: a load in the loop might alias what a loop stores.
  template <typename F>
  void add_up(const F& term) {
    if (lines == 1) {
      A s = A(0);
      A* const x = values;
      const A m = largest[0];
      const int64_t n = size;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < n; ++i) s += term(x[i], i, m);
      sum[0] = s;
    } else {
      std::fill(sum, sum + lines, A(0));
      for (int64_t i = 0; i < size; ++i) {
        A* x = values + i * lines;
#pragma omp simd
        for (int64_t j = 0; j < lines; ++j) sum[j] += term(x[j], i * lines + j, largest[j]);
      }
    }
  }

  // value(value, index, sum of the line, largest of the line)
  template <typename F>
  void map(const F& value) {
    if (lines == 1) {
      A* const x = values;
      const A total = sum[0], m = largest[0];
      const int64_t n = size;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] = value(x[i], i, total, m);
    } else {
      for (int64_t i = 0; i < size; ++i) {
        A* x = values + i * lines;
#pragma omp simd
        for (int64_t j = 0; j < lines; ++j) x[j] = value(x[j], i * lines + j, sum[j], largest[j]);
      }
    }
  }
};

// Where a block lies in memory: its first element, and the distance between steps along a line.
struct Place {
  int64_t offset, step, lines;
};

template <typename T, typename A>
void read_block(const T* from, const Place& at, int64_t size, A* values) {
  if (at.lines == 1 && at.step == 1) {
    convert(from + at.offset, values, size);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      convert(from + at.offset + i * at.step, values + i * at.lines, at.lines);
    }
  }
}

template <typename T, typename A>
void write_block(const A* values, const Place& at, int64_t size, T* to) {
  if (at.lines == 1 && at.step == 1) {
    convert(values, to + at.offset, size);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      convert(values + i * at.lines, to + at.offset + i * at.step, at.lines);
    }
  }
}

// Calls body(block, place, first line) for every block of lines; matrices is how many [size][lines]
// matrices of scratch the block's values are the first of.
template <typename A, typename F>
void for_each_block(const SoftmaxGeometry& g, int64_t matrices, const F& body) {
  const int64_t lines = std::min(g.inner, kLines);
  const int64_t blocks_inner = g.inner == 0 ? 0 : (g.inner + lines - 1) / lines;
  parallel_for(g.outer * blocks_inner, 4 * g.size * lines, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch((matrices * g.size + 2) * lines);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t o = item / blocks_inner, k = item % blocks_inner * lines;
      const int64_t n = std::min(lines, g.inner - k);
      A* values = scratch.data() + 2 * lines;
      Block<A> block{g.size, n, values, scratch.data(), scratch.data() + lines};
      body(block, Place{o * g.size * g.inner + k, g.inner, n}, o * g.inner + k);
    }
  });
}

Tensor softmax_forward(const char* op, const Tensor& input, int64_t dim, double beta, bool log) {
  dim = checked_dim(op, input, dim);
  Tensor output = torch::stable::empty_like(input);
  const Tensor x = in_memory_order_of(output, input);
  const SoftmaxGeometry g = softmax_geometry(output, dim);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    const A scale = static_cast<A>(beta);
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t) {
      read_block(in, at, g.size, block.values);
      block.map([=](A v, int64_t, A, A) { return scale * v; });
      block.find_largest();
      if (log) {
        block.add_up([](A v, int64_t, A largest) { return cpu::exp(v - largest); });
        for (int64_t j = 0; j < block.lines; ++j) {
          block.sum[j] = block.largest[j] + std::log(block.sum[j]);
        }
        block.map([](A v, int64_t, A sum, A) { return v - sum; });
      } else {
        block.map([](A v, int64_t, A, A largest) { return cpu::exp(v - largest); });
        block.add_up([](A v, int64_t, A) { return v; });
        block.map([](A v, int64_t, A sum, A) { return v / sum; });
      }
      write_block(block.values, at, g.size, out);
    });
  });
  return output;
}

Tensor softmax_gradient(const char* op, const Tensor& grad_output, const Tensor& output,
                        int64_t dim, double beta, bool log) {
  dim = checked_dim(op, output, dim);
  check_like(op, "grad_output", grad_output, "output", output);
  Tensor grad_input = torch::stable::empty_like(output);
  const Tensor y = in_memory_order_of(grad_input, output);
  const Tensor grad = in_memory_order_of(grad_input, grad_output);
  const SoftmaxGeometry g = softmax_geometry(grad_input, dim);
  dispatch_floating(op, output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* out = y.const_data_ptr<T>();
    const T* go = grad.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const A scale = static_cast<A>(beta);
    for_each_block<A>(g, 2, [&](Block<A>& block, const Place& at, int64_t) {
      A* ys = block.values + g.size * block.lines;
      read_block(go, at, g.size, block.values);
      read_block(out, at, g.size, ys);
      if (log) {
        block.add_up([](A v, int64_t, A) { return v; });
        block.map([=](A v, int64_t i, A sum, A) { return scale * (v - cpu::exp(ys[i]) * sum); });
      } else {
        block.add_up([=](A v, int64_t i, A) { return v * ys[i]; });
        block.map([=](A v, int64_t i, A sum, A) { return scale * ys[i] * (v - sum); });
      }
      write_block(block.values, at, g.size, gi);
    });
  });
  return grad_input;
}

Tensor softmax(const Tensor& input, int64_t dim, double beta) {
  return softmax_forward("softmax", input, dim, beta, false);
}
Tensor log_softmax(const Tensor& input, int64_t dim, double beta) {
  return softmax_forward("log_softmax", input, dim, beta, true);
}
Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, double beta) {
  return softmax_gradient("softmax_backward", grad_output, output, dim, beta, false);
}
Tensor log_softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim,
                            double beta) {
  return softmax_gradient("log_softmax_backward", grad_output, output, dim, beta, true);
}

void check_classes(const char* op, const Tensor& target, int64_t classes) {
  const int64_t* t = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i) {
    MNIST_OPS_CHECK(t[i] >= 0 && t[i] < classes, op, ": target must be in [0, ", classes, "), got ",
                    t[i], " at position ", i);
  }
}

std::tuple<Tensor, Tensor> softmax_nll(const Tensor& input, const Tensor& target, double beta) {
  const char* op = "softmax_nll";
  const int64_t dim = check_softmax_nll(op, input, target);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = torch::stable::contiguous(target);
  check_classes(op, classes, x.size(dim));
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor loss = torch::stable::new_empty(x, classes.sizes());
  Tensor logsumexp;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    logsumexp = torch::stable::new_empty(
        x, classes.sizes(), std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    const T* in = x.const_data_ptr<T>();
    const int64_t* t = classes.const_data_ptr<int64_t>();
    T* losses = loss.mutable_data_ptr<T>();
    A* lse = logsumexp.mutable_data_ptr<A>();
    const A scale = static_cast<A>(beta);
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t line) {
      read_block(in, at, g.size, block.values);
      block.map([=](A v, int64_t, A, A) { return scale * v; });
      block.find_largest();
      const A* largest = block.largest;
      block.add_up([](A v, int64_t, A m) { return cpu::exp(v - m); });
      for (int64_t j = 0; j < block.lines; ++j) {
        lse[line + j] = largest[j] + std::log(block.sum[j]);
        // The difference to the largest first: exact where both are large.
        const A chosen = block.values[t[line + j] * block.lines + j];
        losses[line + j] = static_cast<T>(std::log(block.sum[j]) - (chosen - largest[j]));
      }
    });
  });
  return {loss, logsumexp};
}

Tensor softmax_nll_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                            const Tensor& logsumexp, double beta) {
  const char* op = "softmax_nll_backward";
  const int64_t dim = check_softmax_nll(op, input, target);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = torch::stable::contiguous(target);
  check_classes(op, classes, x.size(dim));
  MNIST_OPS_CHECK(same_shape(grad_loss, target) && same_shape(logsumexp, target), op,
                  ": grad_loss and logsumexp must have the shape of target, ", shape_string(target),
                  ", got ", shape_string(grad_loss), " and ", shape_string(logsumexp));
  MNIST_OPS_CHECK(grad_loss.scalar_type() == input.scalar_type(), op,
                  ": grad_loss must have the dtype of input, ",
                  torch::headeronly::toString(input.scalar_type()), ", got ",
                  torch::headeronly::toString(grad_loss.scalar_type()));
  const Tensor grad = torch::stable::contiguous(grad_loss);
  const Tensor saved = torch::stable::contiguous(logsumexp);
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor grad_input = torch::stable::empty_like(x);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    MNIST_OPS_CHECK(saved.scalar_type() == wide, op, ": logsumexp must be ",
                    torch::headeronly::toString(wide), ", got ",
                    torch::headeronly::toString(saved.scalar_type()));
    const T* in = x.const_data_ptr<T>();
    const int64_t* t = classes.const_data_ptr<int64_t>();
    const T* go = grad.const_data_ptr<T>();
    const A* lse = saved.const_data_ptr<A>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const A scale = static_cast<A>(beta);
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t line) {
      read_block(in, at, g.size, block.values);
      A* factor = block.sum;
      std::copy(lse + line, lse + line + block.lines, block.largest);
      for (int64_t j = 0; j < block.lines; ++j) factor[j] = scale * static_cast<A>(go[line + j]);
      block.map(
          [=](A v, int64_t, A times, A log_sum) { return times * cpu::exp(scale * v - log_sum); });
      for (int64_t j = 0; j < block.lines; ++j) {
        block.values[t[line + j] * block.lines + j] -= factor[j];
      }
      write_block(block.values, at, g.size, gi);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("log_softmax", TORCH_BOX(&log_softmax));
  m.impl("log_softmax_backward", TORCH_BOX(&log_softmax_backward));
  m.impl("softmax_nll", TORCH_BOX(&softmax_nll));
  m.impl("softmax_nll_backward", TORCH_BOX(&softmax_nll_backward));
}

}  // namespace mnist_ops::cpu
