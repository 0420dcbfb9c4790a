// Softmax, log-softmax and softmax + NLL on the CPU.
//
// Bound by the exponential (one an element; none in the log-softmax's second pass), then by memory:
// each element is read once and written once, what is passed over again staying in cache. Three
// ways, by where the elements of a line lie:
//   long rows    one after the other, a block of them at a time, so that the ends of their sums and
//                logarithms do not wait for one another; loops run along a row
//   short rows   likewise; loops run over all of the block's elements, with what belongs to a row
//                written out for each of its elements
//   lines        side by side in memory, a block of them at a time; loops run across the lines

#include "../softmax.h"

#include "rows.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kShortRow = 64;     // rows up to here are taken in blocks
constexpr int64_t kBlock = 2048;      // elements of a block of rows, more or less
constexpr int64_t kMostRows = 64;     // of a block
constexpr int64_t kMostLines = 512;   // of a block, and as few as
constexpr int64_t kFewestLines = 64;  // this, where more of them would leave the cache:
constexpr int64_t kCached = 8192;     // elements
constexpr int64_t kSummed = 64;       // elements of a line that are added up in float32

// ----------------------------------------------------------------------------------- three ways

bool has_rows(const SoftmaxGeometry& g) {
  return g.inner == 1;
}

// Neighbouring rows: elements [first, first + count) of a tensor.
template <typename A>
struct RowBlock {
  int64_t size, row, rows, first, count;
  static constexpr int64_t kArrays = 4;
  // Room for as many elements: of short rows, where numbers are spread, too; of long ones only for
  // elements that have to be converted.
  A* scratch[kArrays];

  bool has_short_rows() const { return size <= kShortRow; }
  int64_t first_of(int64_t j) const { return first + j * size; }
};

// T: the elements' type.
template <typename T, typename F>
void for_each_block_of_rows(const SoftmaxGeometry& g, const F& body) {
  using A = opmath_t<T>;
  if (g.size == 0) return;
  const bool is_short = g.size <= kShortRow;
  const int64_t most = std::clamp<int64_t>(kBlock / g.size, is_short ? 8 : 1, kMostRows);
  const int64_t rows = std::min(g.outer, most);
  const int64_t pitch = is_short || !std::is_same_v<T, A> ? rows * g.size + kSpread : 0;
  parallel_for((g.outer + rows - 1) / rows, 4 * g.size * rows, [&](int64_t begin, int64_t end) {
    RowBlock<A> block;
    block.size = g.size;
    std::vector<A> memory(block.kArrays * pitch);
    for (int64_t i = 0; i < block.kArrays; ++i) block.scratch[i] = memory.data() + i * pitch;
    for (int64_t item = begin; item < end; ++item) {
      block.row = item * rows;
      block.rows = std::min(rows, g.outer - block.row);
      block.first = block.row * g.size;
      block.count = block.rows * g.size;
      body(block);
    }
  });
}

// Of every row of a block: the largest of scale * v, and the sum of
// e = exp(beta * v - largest beta * v), which are kept where `keep` is set. Of short rows the first
// of the scratch arrays gets the largest for each element.
template <bool keep, typename A>
void sum_exponentials(const RowBlock<A>& block, const A* v, const Differences<A>& difference, A* e,
                      A* largest, A* sum) {
  const int64_t size = block.size;
  if (block.has_short_rows()) {
    A* const largests = block.scratch[0];
    largest_of_rows(v, block.rows, size, difference.scale, largest);
    spread(largest, block.rows, size, largests);
    fill_with(e, block.count,
              [=](int64_t i) { return exp_of_negative(difference(v[i], largests[i])); });
    return sum_rows(e, block.rows, size, sum);
  }
  for (int64_t j = 0; j < block.rows; ++j) {
    const A* const row = v + j * size;
    A* const kept = e + j * size;
    const A m = largest_of(row, size, difference.scale);
    largest[j] = m;
    sum[j] = sum_of<A>(size, [=](int64_t i) {
      const A term = exp_of_negative(difference(row[i], m));
      if constexpr (keep) kept[i] = term;
      return term;
    });
  }
}

// y[i] = value(i, the number of i's row), which is costly where it takes an exponential.
template <bool costly, typename A, typename F>
void fill_rows(const RowBlock<A>& block, const A* numbers, A* scratch, A* y, const F& value) {
  if (block.has_short_rows()) {
    spread(numbers, block.rows, block.size, scratch);
    return fill_with(y, block.count, [=](int64_t i) { return value(i, scratch[i]); });
  }
  for (int64_t j = 0; j < block.rows; ++j) {
    const A number = numbers[j];
    const int64_t first = j * block.size;
    const auto of_row = [=](int64_t i) { return value(first + i, number); };
    if constexpr (costly) {
      fill_row(y + first, block.size, of_row);
    } else {
      fill_with(y + first, block.size, of_row);
    }
  }
}

// Lines side by side: line j's i-th element is element first + i * step + j of a tensor.
template <typename A>
struct LineBlock {
  int64_t line, lines, first, step;
  A *largest, *sum;     // one for each line
  double* total;        // of sums
  A* copies;            // matrices [size][lines], for what has to be converted
  int64_t matrix_size;  // 0 where nothing has

  int64_t at(int64_t i) const { return first + i * step; }

  // The lines' i-th elements in the type to compute in: read, and later read again.
  template <typename T>
  const A* read(const T* from, int64_t i, int64_t matrix = 0) const {
    return load(from + at(i), copies + matrix * matrix_size + i * lines, lines);
  }
  template <typename T>
  const A* read_again(const T* from, int64_t i, int64_t matrix = 0) const {
    if constexpr (std::is_same_v<T, A>) {
      return from + at(i);
    } else {
      return copies + matrix * matrix_size + i * lines;
    }
  }
  // Where their i-th results are computed, in the place of what was read, and how they get there.
  template <typename T>
  A* place(T* to, int64_t i) const {
    return stage(to + at(i), copies + i * lines);
  }
  template <typename T>
  void finish(const A* results, T* to, int64_t i) const {
    store(results, to + at(i), lines);
  }
};

// T: the elements' type; matrices: how many tensors are read.
template <typename T, typename F>
void for_each_block_of_lines(const SoftmaxGeometry& g, int64_t matrices, const F& body) {
  using A = opmath_t<T>;
  if (g.size == 0) return;
  const int64_t lines =
      std::min(g.inner, std::clamp<int64_t>(kCached / g.size, kFewestLines, kMostLines));
  const int64_t blocks = (g.inner + lines - 1) / lines;
  const int64_t matrix_size = std::is_same_v<T, A> ? 0 : g.size * lines;
  parallel_for(g.outer * blocks, 4 * g.size * lines, [&](int64_t begin, int64_t end) {
    std::vector<A> memory(2 * lines + matrices * matrix_size);
    std::vector<double> totals(lines);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / blocks, k = item % blocks * lines;
      const LineBlock<A> block{group * g.inner + k,
                               std::min(lines, g.inner - k),
                               group * g.size * g.inner + k,
                               g.inner,
                               memory.data(),
                               memory.data() + lines,
                               totals.data(),
                               memory.data() + 2 * lines,
                               matrix_size};
      body(block);
    }
  });
}

// block.sum[j] = what add(i, sum) adds to sum[j] for every i, added up as in sum_of.
template <typename A, typename F>
void sum_lines(const LineBlock<A>& block, int64_t size, const F& add) {
  A* const sum = block.sum;
  double* const total = block.total;
  std::fill(total, total + block.lines, 0.0);
  for (int64_t first = 0; first < size; first += kSummed) {
    std::fill(sum, sum + block.lines, A(0));
    for (int64_t i = first; i < std::min(first + kSummed, size); ++i) add(i, sum);
    fill_with(total, block.lines, [=](int64_t j) { return total[j] + sum[j]; });
  }
  fill_with(sum, block.lines, [=](int64_t j) { return static_cast<A>(total[j]); });
}

// The largest of scale * x of each line, and then the sum of exp(beta * x - largest beta * x).
template <typename A, typename T>
void find_largest(const LineBlock<A>& block, const T* in, int64_t size, A scale) {
  A* const largest = block.largest;
  std::fill(largest, largest + block.lines, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < size; ++i) {
    const A* const v = block.read(in, i);
    fill_with(largest, block.lines, [=](int64_t j) { return larger(scale * v[j], largest[j]); });
  }
}
template <typename A, typename T>
void sum_exponentials(const LineBlock<A>& block, const T* in, int64_t size,
                      const Differences<A>& difference) {
  const A* const largest = block.largest;
  sum_lines(block, size, [=](int64_t i, A* sum) {
    const A* const v = block.read_again(in, i);
    fill_with(sum, block.lines,
              [=](int64_t j) { return sum[j] + exp_of_negative(difference(v[j], largest[j])); });
  });
}

// ---------------------------------------------------------------------------------------- kernels

// The sum of value(c) over the classes of a line.
template <typename A>
auto over_classes(const SoftmaxGeometry& g) {
  return [&g](const auto& value) { return sum_of<A>(g.size, value); };
}

// One class: the usual case, written out, since targets are known to be classes here. The gradient
// at this class is -scale, 0 for a line that is ignored whatever its gradient.
template <typename T, typename A = opmath_t<T>>
A scale_of_class(const SoftmaxForward<T>& f, int64_t line) {
  const int64_t t = f.targets.classes[line];
  if (t == f.targets.ignored) return A(0);
  return f.differences.beta * f.grad[line] * f.targets.weight_of(t);
}

template <typename T, typename A = opmath_t<T>>
void write_loss(const SoftmaxForward<T>& f, int64_t line, int64_t offset, A largest, A log_sum) {
  if (f.targets.one_class()) {
    const int64_t t = f.targets.classes[line];
    A loss = A(0);
    if (t != f.targets.ignored) {
      const A x = static_cast<A>(f.in[offset + t * f.g.inner]);
      loss = f.targets.weight_of(t) * (log_sum - f.differences(x, largest));
    }
    f.out[line] = static_cast<T>(loss);
    return;
  }
  f.out[line] = static_cast<T>(
      f.target_of(line, offset)
          .loss(f.differences, f.in + offset, largest, log_sum, over_classes<A>(f.g)));
}

// What a line's exponentials are multiplied by for the first term of the gradient: its scale over
// their sum.
template <typename T, typename A = opmath_t<T>>
A scale_of_powers(const SoftmaxForward<T>& f, int64_t line, int64_t offset, A sum) {
  // Not a number where the sum is none, for lines that are ignored, too, as in PyTorch.
  if (f.targets.one_class()) return scale_of_class(f, line) / sum;
  return f.gradient_of(line, offset, over_classes<A>(f.g)).scale / sum;
}

// The other term. The gradient is at y, its elements are `step` apart.
template <typename T, typename A = opmath_t<T>>
void subtract_target(const SoftmaxForward<T>& f, int64_t line, int64_t offset, A* y, int64_t step) {
  if (f.targets.one_class()) {
    const int64_t t = f.targets.classes[line];
    if (t != f.targets.ignored) y[t * step] -= scale_of_class(f, line);
    return;
  }
  const LineTarget<T> target = f.target_of(line, offset);
  if (target.counts != A(1)) return;
  const A factor = f.differences.beta * f.grad[line];
  for (int64_t c = 0; c < f.g.size; ++c) y[c * step] -= factor * target[c];
}

template <SoftmaxKind kind, typename T, typename A = opmath_t<T>>
void forward(const SoftmaxForward<T>& f) {
  const SoftmaxGeometry& g = f.g;
  const T* const in = f.in;
  T* const out = f.out;
  const Differences<A> difference = f.differences;
  // These keep the exponentials, and the others what they need of their sum: its logarithm.
  constexpr bool divides = kind == SoftmaxKind::kSoftmax;
  constexpr bool gradient = kind == SoftmaxKind::kNllGradient;
  constexpr bool powers = divides || gradient;
  constexpr bool loss = kind == SoftmaxKind::kNll;
  if (has_rows(g)) {
    for_each_block_of_rows<T>(g, [&](const RowBlock<A>& block) {
      A *const terms = block.scratch[1], *const numbers = block.scratch[3];
      const A* const v = load(in + block.first, block.scratch[2], block.count);
      A* const y = loss ? terms : stage(out + block.first, terms);
      A largest[kMostRows], sum[kMostRows];
      sum_exponentials<powers>(block, v, difference, powers ? y : terms, largest, sum);
      if (!powers) fill_with(sum, block.rows, [&](int64_t j) { return cpu::log(sum[j]); });
      if constexpr (loss) {
        for (int64_t j = 0; j < block.rows; ++j) {
          write_loss(f, block.row + j, block.first_of(j), largest[j], sum[j]);
        }
        return;
      }
      for (int64_t j = 0; gradient && j < block.rows; ++j) {
        sum[j] = scale_of_powers(f, block.row + j, block.first_of(j), sum[j]);
      }
      if constexpr (divides) {
        fill_rows<false>(block, sum, numbers, y, [=](int64_t i, A total) { return y[i] / total; });
      } else if constexpr (gradient) {
        fill_rows<false>(block, sum, numbers, y, [=](int64_t i, A scale) { return y[i] * scale; });
        for (int64_t j = 0; j < block.rows; ++j) {
          subtract_target(f, block.row + j, block.first_of(j), y + j * g.size, 1);
        }
      } else {
        if (block.has_short_rows()) {
          const A* const largests = block.scratch[0];
          spread(sum, block.rows, g.size, numbers);
          fill_with(y, block.count,
                    [=](int64_t i) { return difference(v[i], largests[i]) - numbers[i]; });
        } else {
          for (int64_t j = 0; j < block.rows; ++j) {
            const A* const row = v + j * g.size;
            const A m = largest[j], log_sum = sum[j];
            fill_row(y + j * g.size, g.size,
                     [=](int64_t i) { return difference(row[i], m) - log_sum; });
          }
        }
      }
      store(y, out + block.first, block.count);
    });
  } else {
    for_each_block_of_lines<T>(g, 1, [&](const LineBlock<A>& block) {
      const int64_t n = block.lines;
      A *const largest = block.largest, *const sum = block.sum;
      find_largest(block, in, g.size, difference.scale);
      if constexpr (powers) {
        sum_lines(block, g.size, [=](int64_t i, A* part) {
          const A* const v = block.read_again(in, i);
          A* const y = block.place(out, i);
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            const A e = exp_of_negative(difference(v[j], largest[j]));
            y[j] = e;
            part[j] += e;
          }
        });
      } else {
        sum_exponentials(block, in, g.size, difference);
        fill_with(sum, n, [=](int64_t j) { return cpu::log(sum[j]); });
      }
      if constexpr (loss) {
        for (int64_t j = 0; j < n; ++j) {
          write_loss(f, block.line + j, block.first + j, largest[j], sum[j]);
        }
        return;
      }
      for (int64_t j = 0; gradient && j < n; ++j) {
        sum[j] = scale_of_powers(f, block.line + j, block.first + j, sum[j]);
      }
      for (int64_t i = 0; i < g.size; ++i) {
        A* const y = block.place(out, i);
        if constexpr (divides) {
          fill_with(y, n, [=](int64_t j) { return y[j] / sum[j]; });
        } else if constexpr (gradient) {
          fill_with(y, n, [=](int64_t j) { return y[j] * sum[j]; });
        } else {
          const A* const v = block.read_again(in, i);
          fill_with(y, n, [=](int64_t j) { return difference(v[j], largest[j]) - sum[j]; });
        }
        if constexpr (!gradient) block.finish(y, out, i);
      }
      if constexpr (gradient) {
        const int64_t step = block.place(out, 1) - block.place(out, 0);
        for (int64_t j = 0; j < n; ++j) {
          subtract_target(f, block.line + j, block.first + j, block.place(out, 0) + j, step);
        }
        for (int64_t i = 0; i < g.size; ++i) block.finish(block.place(out, i), out, i);
      }
    });
  }
}

// What the sum over a line adds up, and the gradient that comes of it; y is the output.
template <bool log, typename A>
MNIST_OPS_HD A gradient_term(A grad, A y) {
  return log ? term_of(grad) : grad * y;
}
template <bool log, typename A>
MNIST_OPS_HD A gradient_of(A grad, A y, A sum, A beta) {
  if constexpr (log) {
    // No logarithm of a share is above 64: infinity then.
    const A share = exp_of_negative(y);
    return beta * (grad - (y > A(64) ? std::numeric_limits<A>::infinity() : share) * sum);
  } else {
    return beta * y * (grad - sum);
  }
}

template <bool log, typename T, typename A = opmath_t<T>>
void gradients(const SoftmaxBackward<T>& b) {
  const SoftmaxGeometry& g = b.g;
  const T *const go = b.grad, *const out = b.y;
  T* const gi = b.out;
  const A beta = b.beta;
  if (has_rows(g)) {
    for_each_block_of_rows<T>(g, [&](const RowBlock<A>& block) {
      A *const numbers = block.scratch[0], *const terms = block.scratch[1];
      const A* const v = load(go + block.first, block.scratch[2], block.count);
      const A* const ys = load(out + block.first, block.scratch[3], block.count);
      A sum[kMostRows];
      if (block.has_short_rows()) {
        if (!log) fill_with(terms, block.count, [=](int64_t i) { return v[i] * ys[i]; });
        sum_rows(log ? v : terms, block.rows, g.size, sum);
      }
      for (int64_t j = 0; !block.has_short_rows() && j < block.rows; ++j) {
        const int64_t row = j * g.size;
        sum[j] = sum_of<A>(g.size,
                           [=](int64_t i) { return gradient_term<log>(v[row + i], ys[row + i]); });
      }
      A* const gx = stage(gi + block.first, terms);
      fill_rows<log>(block, sum, numbers, gx, [=](int64_t i, A total) {
        return gradient_of<log>(v[i], ys[i], total, beta);
      });
      store(gx, gi + block.first, block.count);
    });
  } else {
    for_each_block_of_lines<T>(g, 2, [&](const LineBlock<A>& block) {
      const int64_t n = block.lines;
      A* const sum = block.sum;
      sum_lines(block, g.size, [=](int64_t i, A* part) {
        const A *const v = block.read(go, i, 0), *const ys = block.read(out, i, 1);
        fill_with(part, n, [=](int64_t j) { return part[j] + gradient_term<log>(v[j], ys[j]); });
      });
      for (int64_t i = 0; i < g.size; ++i) {
        const A *const v = block.read_again(go, i, 0), *const ys = block.read_again(out, i, 1);
        A* const gx = block.place(gi, i);
        fill_with(gx, n, [=](int64_t j) { return gradient_of<log>(v[j], ys[j], sum[j], beta); });
        block.finish(gx, gi, i);
      }
    });
  }
}

// -------------------------------------------------------------------------------------- operators

struct Kernels {
  template <SoftmaxKind kind, typename T>
  static void run(const Tensor&, const SoftmaxForward<T>& f) {
    forward<kind>(f);
  }
  template <SoftmaxKind kind, typename T>
  static void run(const Tensor&, const SoftmaxBackward<T>& b) {
    gradients<kind == SoftmaxKind::kLogSoftmax>(b);
  }

  static void check_targets(const NllArguments& a) {
    if (!a.are_classes()) return;
    const int64_t* t = a.target.const_data_ptr<int64_t>();
    const int64_t count = a.target.numel(), classes = a.g.size, ignored = a.ignored;
    const auto is_one = [=](int64_t i) { return (t[i] >= 0 && t[i] < classes) || t[i] == ignored; };
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= is_one(i);
    if (all) return;
    for (int64_t i = 0; i < count; ++i) {
      MNIST_OPS_CHECK(is_one(i), a.op, ": target must be in [0, ", classes, ") or ignore_index, ",
                      ignored, ", got ", t[i], " at position ", i);
    }
  }

  // They are added up in float64, one number after the other, which is little beside the
  // exponentials that the losses took.
  template <typename T>
  static void nll(const Tensor& losses, const SoftmaxForward<T>& f, Tensor* loss, Tensor* total) {
    using A = opmath_t<T>;
    forward<SoftmaxKind::kNll>(f);
    if (loss == nullptr) return;
    const T* values = losses.const_data_ptr<T>();
    const int64_t count = losses.numel();
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(static_cast<A>(values[i]));
    if (total != nullptr) {
      LossSum all{sum, 0};
      for (int64_t i = 0; i < count; ++i) {
        all.divisor += static_cast<double>(f.target_of(i, 0).divisor());
      }
      sum = all.mean();
      *total->mutable_data_ptr<A>() = static_cast<A>(all.divisor);
    }
    *loss->mutable_data_ptr<T>() = static_cast<T>(static_cast<A>(sum));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  SoftmaxOperators<Kernels>::register_all(m);
}

}  // namespace mnist_ops::cpu
