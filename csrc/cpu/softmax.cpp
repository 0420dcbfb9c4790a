// Softmax, log-softmax and softmax + NLL on the CPU.
//
// Bound by the exponential (one an element; none in the log-softmax's second pass), then by memory:
// each element is read once and written once, rows and blocks of rows staying in cache between the
// passes over them. Long rows, where the dimension is innermost in memory, are taken one by one and
// the loops run along them. Elsewhere the loops run across a block of lines at a time: lines that
// lie side by side in memory, or short rows, which are transposed on the way in and out.

#include "../softmax.h"

#include "common.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kLines = 64;     // lines of a block
constexpr int64_t kShortRow = 64;  // rows up to here are taken in blocks

// ------------------------------------------------------------------------------ long rows, one by
// one

// The largest of scale * x. A maximum that passes over NaN is no reduction to the compiler: several
// at once, by hand.
template <typename A>
A largest_of(const A* x, int64_t size, A scale) {
  constexpr int64_t kParts = 32;
  A parts[kParts];
  std::fill(parts, parts + kParts, -std::numeric_limits<A>::infinity());
  const auto larger = [](A v, A m) { return v > m ? v : m; };
  const int64_t whole = size / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
#pragma omp simd
    for (int64_t j = 0; j < kParts; ++j) parts[j] = larger(scale * x[i + j], parts[j]);
  }
  A m = parts[0];
  for (int64_t j = 1; j < kParts; ++j) m = larger(parts[j], m);
  for (int64_t i = whole; i < size; ++i) m = larger(scale * x[i], m);
  return m;
}

// The sum of value(i).
template <typename A, typename F>
A sum_of(int64_t size, const F& value) {
  A sum = A(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += value(i);
  return sum;
}

template <typename A, typename F>
void fill_with(A* y, int64_t size, const F& value) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = value(i);
}

// Runs body(row, scratch, scratch, scratch) for every row; scratch is as long as a row.
template <typename A, typename F>
void for_each_row(const SoftmaxGeometry& g, const F& body) {
  parallel_for(g.outer, 4 * g.size, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(3 * g.size);
    A* const a = scratch.data();
    for (int64_t row = begin; row < end; ++row) body(row, a, a + g.size, a + 2 * g.size);
  });
}

// ---------------------------------------------------------------------------------- blocks of
// lines

// Lines of `size` elements as a matrix [size][lines] in A.
template <typename A>
struct Block {
  int64_t size, lines;
  A* values;
  A *largest, *sum;  // one for each line

  void find_largest() {
    std::copy(values, values + lines, largest);
    for (int64_t i = 1; i < size; ++i) {
      const A* x = values + i * lines;
#pragma omp simd
      for (int64_t j = 0; j < lines; ++j) largest[j] = x[j] > largest[j] ? x[j] : largest[j];
    }
  }

  // sum over the line of term(value, index, largest of the line). The line's numbers are handed
  // over by value: a load in the loop might alias what a loop stores.
  template <typename F>
  void add_up(const F& term) {
    std::fill(sum, sum + lines, A(0));
    for (int64_t i = 0; i < size; ++i) {
      const A* x = values + i * lines;
#pragma omp simd
      for (int64_t j = 0; j < lines; ++j) sum[j] += term(x[j], i * lines + j, largest[j]);
    }
  }

  // value(value, index, sum of the line, largest of the line)
  template <typename F>
  void map(const F& value) {
    for (int64_t i = 0; i < size; ++i) {
      A* x = values + i * lines;
#pragma omp simd
      for (int64_t j = 0; j < lines; ++j) x[j] = value(x[j], i * lines + j, sum[j], largest[j]);
    }
  }

  // largest[j] + log of sum[j], in the place of sum[j]
  void add_log_of_sum() {
#pragma omp simd
    for (int64_t j = 0; j < lines; ++j) sum[j] = largest[j] + cpu::log(sum[j]);
  }
};

// Where a block lies in memory: its first element, the distance between steps along a line and the
// one between lines. One of the two is 1.
struct Place {
  int64_t offset, step, lines, line_step;
};

template <typename T, typename A>
void read_block(const T* from, const Place& at, int64_t size, A* values) {
  for (int64_t i = 0; i < size; ++i) {
    const T* x = from + at.offset + i * at.step;
    A* to = values + i * at.lines;
    if (at.line_step == 1) {
      convert(x, to, at.lines);
    } else {
      for (int64_t j = 0; j < at.lines; ++j) to[j] = static_cast<A>(x[j * at.line_step]);
    }
  }
}

template <typename T, typename A>
void write_block(const A* values, const Place& at, int64_t size, T* to) {
  for (int64_t i = 0; i < size; ++i) {
    const A* x = values + i * at.lines;
    T* y = to + at.offset + i * at.step;
    if (at.line_step == 1) {
      convert(x, y, at.lines);
    } else {
      for (int64_t j = 0; j < at.lines; ++j) y[j * at.line_step] = static_cast<T>(x[j]);
    }
  }
}

bool has_long_rows(const SoftmaxGeometry& g) {
  return g.inner == 1 && g.size > kShortRow;
}

// Calls body(block, place, first line) for every block of lines; matrices is how many [size][lines]
// matrices of scratch the block's values are the first of.
template <typename A, typename F>
void for_each_block(const SoftmaxGeometry& g, int64_t matrices, const F& body) {
  if (g.size == 0) return;
  // Rows: all of them are neighbours. Else the lines of one outer index.
  const int64_t neighbours = g.inner == 1 ? g.outer : g.inner;
  const int64_t groups = g.inner == 1 ? 1 : g.outer;
  const int64_t lines = std::min(neighbours, kLines);
  const int64_t blocks = (neighbours + lines - 1) / lines;
  parallel_for(groups * blocks, 4 * g.size * lines, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch((matrices * g.size + 2) * lines);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / blocks, k = item % blocks * lines;
      const int64_t n = std::min(lines, neighbours - k);
      A* values = scratch.data() + 2 * lines;
      Block<A> block{g.size, n, values, scratch.data(), scratch.data() + lines};
      const Place rows{k * g.size, 1, n, g.size},
          columns{group * g.size * g.inner + k, g.inner, n, 1};
      body(block, g.inner == 1 ? rows : columns, group * neighbours + k);
    }
  });
}

// ----------------------------------------------------------------------------------------
// operators

Tensor softmax_forward(const char* op, const Tensor& input, int64_t dim, double beta, bool log) {
  dim = checked_dim(op, input, dim);
  Tensor output = new_like(input);
  const Tensor x = in_memory_order_of(output, input);
  const SoftmaxGeometry g = softmax_geometry(output, dim);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    const A scale = static_cast<A>(beta);
    if (has_long_rows(g)) {
      const int64_t n = g.size;
      for_each_row<A>(g, [&](int64_t row, A* from, A* to, A*) {
        const A* const v = load(in + row * n, from, n);
        A* const y = stage(out + row * n, to);
        const A m = largest_of(v, n, scale);
        if (log) {
          const A sum = sum_of<A>(n, [=](int64_t i) { return cpu::exp(scale * v[i] - m); });
          const A log_sum = m + cpu::log(sum);
          fill_with(y, n, [=](int64_t i) { return scale * v[i] - log_sum; });
        } else {
          const A sum = sum_of<A>(n, [=](int64_t i) { return y[i] = cpu::exp(scale * v[i] - m); });
          fill_with(y, n, [=](int64_t i) { return y[i] / sum; });
        }
        store(y, out + row * n, n);
      });
      return;
    }
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t) {
      read_block(in, at, g.size, block.values);
      block.map([=](A v, int64_t, A, A) { return scale * v; });
      block.find_largest();
      if (log) {
        block.add_up([](A v, int64_t, A largest) { return cpu::exp(v - largest); });
        block.add_log_of_sum();
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
  Tensor grad_input = new_like(output);
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
    if (has_long_rows(g)) {
      const int64_t n = g.size;
      for_each_row<A>(g, [&](int64_t row, A* from_g, A* from_y, A* to) {
        const A* const v = load(go + row * n, from_g, n);
        const A* const ys = load(out + row * n, from_y, n);
        A* const gx = stage(gi + row * n, to);
        if (log) {
          const A sum = sum_of<A>(n, [=](int64_t i) { return v[i]; });
          fill_with(gx, n, [=](int64_t i) { return scale * (v[i] - cpu::exp(ys[i]) * sum); });
        } else {
          const A sum = sum_of<A>(n, [=](int64_t i) { return v[i] * ys[i]; });
          fill_with(gx, n, [=](int64_t i) { return scale * ys[i] * (v[i] - sum); });
        }
        store(gx, gi + row * n, n);
      });
      return;
    }
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
  bool all = true;
  for (int64_t i = 0; i < target.numel(); ++i) all &= t[i] >= 0 && t[i] < classes;
  if (all) return;
  for (int64_t i = 0; i < target.numel(); ++i) {
    MNIST_OPS_CHECK(t[i] >= 0 && t[i] < classes, op, ": target must be in [0, ", classes, "), got ",
                    t[i], " at position ", i);
  }
}

// The sum of the losses or their mean. It is added up in float64, one number after the other, which
// is little beside the exponentials that the losses took.
Tensor reduced(const Tensor& losses, Reduction reduction) {
  Tensor result = new_tensor(losses, std::vector<int64_t>{});
  dispatch_floating("softmax_nll", losses.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* values = losses.const_data_ptr<T>();
    const int64_t count = losses.numel();
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i)
      sum += static_cast<double>(static_cast<opmath_t<T>>(values[i]));
    if (reduction == Reduction::kMean) sum /= static_cast<double>(count);
    *result.mutable_data_ptr<T>() = static_cast<T>(static_cast<opmath_t<T>>(sum));
  });
  return result;
}

std::tuple<Tensor, Tensor> softmax_nll(const Tensor& input, const Tensor& target, double beta,
                                       std::string reduction) {
  const char* op = "softmax_nll";
  const Reduction kind = reduction_named(op, reduction);
  const int64_t dim = check_softmax_nll(op, input, target);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = contiguous_of(target);
  check_classes(op, classes, x.size(dim));
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor loss = new_tensor(x, classes.sizes());
  Tensor logsumexp;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    logsumexp = new_tensor(x, classes.sizes(),
                           std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    const T* in = x.const_data_ptr<T>();
    const int64_t* t = classes.const_data_ptr<int64_t>();
    T* losses = loss.mutable_data_ptr<T>();
    A* lse = logsumexp.mutable_data_ptr<A>();
    const A scale = static_cast<A>(beta);
    if (has_long_rows(g)) {
      const int64_t n = g.size;
      for_each_row<A>(g, [&](int64_t row, A* from, A*, A*) {
        const A* const v = load(in + row * n, from, n);
        const A m = largest_of(v, n, scale);
        const A log_sum =
            cpu::log(sum_of<A>(n, [=](int64_t i) { return cpu::exp(scale * v[i] - m); }));
        lse[row] = m + log_sum;
        // The difference to the largest first: exact where both are large.
        losses[row] = static_cast<T>(log_sum - (scale * v[t[row]] - m));
      });
      return;
    }
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t line) {
      read_block(in, at, g.size, block.values);
      block.map([=](A v, int64_t, A, A) { return scale * v; });
      block.find_largest();
      block.add_up([](A v, int64_t, A m) { return cpu::exp(v - m); });
      const A* const largest = block.largest;
      A* const log_sum = block.sum;
#pragma omp simd
      for (int64_t j = 0; j < block.lines; ++j) log_sum[j] = cpu::log(log_sum[j]);
      for (int64_t j = 0; j < block.lines; ++j) {
        lse[line + j] = largest[j] + log_sum[j];
        const A chosen = block.values[t[line + j] * block.lines + j];
        losses[line + j] = static_cast<T>(log_sum[j] - (chosen - largest[j]));
      }
    });
  });
  return {kind == Reduction::kNone ? loss : reduced(loss, kind), logsumexp};
}

Tensor softmax_nll_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                            const Tensor& logsumexp, double beta, std::string reduction) {
  const char* op = "softmax_nll_backward";
  const int64_t dim = check_softmax_nll(op, input, target);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = contiguous_of(target);
  check_classes(op, classes, x.size(dim));
  const Reduction kind =
      check_softmax_nll_gradient(op, grad_loss, input, target, logsumexp, reduction);
  const Tensor grad = contiguous_of(grad_loss);
  const Tensor saved = contiguous_of(logsumexp);
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor grad_input = new_like(x);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.const_data_ptr<T>();
    const int64_t* t = classes.const_data_ptr<int64_t>();
    const LossGradient<T> go = loss_gradient<T>(grad, classes.numel(), kind);
    const A* lse = saved.const_data_ptr<A>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const A scale = static_cast<A>(beta);
    if (has_long_rows(g)) {
      const int64_t n = g.size;
      for_each_row<A>(g, [&](int64_t row, A* from, A* to, A*) {
        const A* const v = load(in + row * n, from, n);
        A* const gx = stage(gi + row * n, to);
        const A log_sum = lse[row], factor = scale * go[row];
        fill_with(gx, n, [=](int64_t i) { return factor * cpu::exp(scale * v[i] - log_sum); });
        gx[t[row]] -= factor;
        store(gx, gi + row * n, n);
      });
      return;
    }
    for_each_block<A>(g, 1, [&](Block<A>& block, const Place& at, int64_t line) {
      read_block(in, at, g.size, block.values);
      A* factor = block.sum;
      std::copy(lse + line, lse + line + block.lines, block.largest);
      for (int64_t j = 0; j < block.lines; ++j) factor[j] = scale * go[line + j];
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
