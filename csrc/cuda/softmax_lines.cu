// Lines of softmax that are not innermost in memory, and those that nobody can hold.

#include "softmax_held.cuh"

namespace mnist_ops::cuda {
namespace {

// -------------------------------------------------------- lines side by side, held in registers

constexpr int kHeld = 4;  // packs of a thread, of kShortPack lines
constexpr int kFewestPacks = 4;
constexpr int64_t kColumnElements = kHeld * (kThreads / kFewestPacks);

// The first element of a pack's first line; inner is a multiple of n.
template <int n>
__device__ __forceinline__ int64_t column_offset(const SoftmaxGeometry& g, int64_t pack) {
  const int64_t packs = g.inner / n, outer = quotient(pack, packs);
  return outer * g.size * g.inner + (pack - outer * packs) * n;
}

// Combines, over threadIdx.y, what threads have of n lines each, for all of them. blockDim.x is a
// power of two up to 32, shared has n values for each thread of a warp and each warp.
template <int n, typename A, typename Combine>
__device__ __forceinline__ void combine_columns(A (&values)[n], A* shared, const Combine& combine) {
  const int columns = static_cast<int>(blockDim.x), column = static_cast<int>(threadIdx.x);
  for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] = combine(values[j], __shfl_xor_sync(kWholeWarp, values[j], distance));
    }
  }
  const int thread = static_cast<int>(threadIdx.y) * columns + column;
  __syncthreads();  // whoever read shared before is done
  if (thread % kWarp < columns) {
#pragma unroll
    for (int j = 0; j < n; ++j) shared[(thread / kWarp * columns + column) * n + j] = values[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = shared[column * n + j];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] = combine(values[j], shared[(warp * columns + column) * n + j]);
    }
  }
}

// Threads of one threadIdx.x share n lines.
template <int n, typename A>
struct Columns {
  static constexpr bool kParts = false, kWhole = false, kOneClass = false;
  A* shared;

  __device__ __forceinline__ int worker() const { return static_cast<int>(threadIdx.y); }
  __device__ __forceinline__ int workers() const { return static_cast<int>(blockDim.y); }

  __device__ __forceinline__ void largest(A (&values)[n]) const {
    combine_columns<n>(values, shared, [](A a, A b) { return b > a ? b : a; });
  }
  template <int count>
  __device__ __forceinline__ void sum(A (&values)[count]) const {
    combine_columns<count>(values, shared, [](A a, A b) { return a + b; });
  }
};

// Blocks of a multiprocessor, as far as registers go.
template <Kind kind, typename Arguments>
constexpr int kColumnBlocks = sizeof(typename Arguments::A) == 8 ? 2
                              : keeps_powers(kind)               ? 3
                                                                 : 4;

template <Kind kind, int n, typename Arguments>
__global__ void __launch_bounds__(kThreads, kColumnBlocks<kind, Arguments>)
    columns_kernel(Kind given, Arguments a) {
  using A = typename Arguments::A;
  alignas(kVectorBytes) __shared__ A shared[kThreads * n];
  const int64_t packs = a.g.outer * a.g.inner / n;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < packs;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pack = base + threadIdx.x;
    const bool inside = pack < packs;
    const Place place{static_cast<int>(a.g.size), inside ? pack * n : 0,
                      inside ? column_offset<n>(a.g, pack) : 0, inside};
    compute_held<kind, kHeld, n, n>(given, a, place, Columns<n, A>{shared});
  }
}

// How many packs of lines a block takes side by side where it holds them, 0 if it cannot.
template <typename Arguments>
int columns_of_block(Kind kind, const Arguments& a) {
  if (a.g.inner % kShortPack<typename Arguments::Element> != 0 || a.g.size > kColumnElements ||
      !has_aligned_packs(kind, a)) {
    return 0;
  }
  int columns = kWarp;
  while (kThreads / columns * kHeld < a.g.size) columns /= 2;
  return columns;
}

// ----------------------------------------------------------- lines that nobody holds, read twice

constexpr int kLongBlock = 512;  // threads of rows in packs: few of them, so that few rows are
                                 // under way and L2 holds them
constexpr int kFlight = 4;  // packs of a thread that are read together, and added up in float32

// This thread's part of a line, which is in packs of n elements or, where n is 1, beside others:
// `width` neighbouring threads have one each.
template <int n>
struct LongLine {
  int64_t line, offset, packs, step;  // between two packs
  int width, worker, workers;

  __device__ __forceinline__ LongLine(const SoftmaxGeometry& g, int64_t first, int lines_of_block)
      : offset(0), packs(0), step(n * g.inner), width(lines_of_block) {
    const int thread = static_cast<int>(threadIdx.x);
    line = first + thread % width;
    worker = thread / width;
    workers = static_cast<int>(blockDim.x) / width;
    if (line >= g.outer * g.inner) return;  // and no packs
    const int64_t outer = line / g.inner;
    offset = outer * g.size * g.inner + (line - outer * g.inner);
    packs = g.size / n;
  }

  __device__ __forceinline__ bool inside() const { return packs > 0; }

  // Calls body with the first of kFlight packs, which are `workers` apart; where `backwards` from
  // the end, whose elements are still in L2.
  template <typename F>
  __device__ __forceinline__ void each_turn(bool backwards, const F& body) const {
    const int64_t turn = int64_t{kFlight} * workers, turns = (packs + turn - 1) / turn;
    for (int64_t t = 0; t < turns; ++t) body((backwards ? turns - 1 - t : t) * turn + worker);
  }

  // Combines what the threads of a line hold, by a tree, for all of them. All threads of the block
  // must take part.
  template <typename V, typename Combine>
  __device__ __forceinline__ V combined(V value, V* shared, const Combine& combine) const {
    const int thread = static_cast<int>(threadIdx.x);
    shared[thread] = value;
    __syncthreads();
    for (int half = static_cast<int>(blockDim.x) / 2; half >= width; half /= 2) {
      if (thread < half) {
        combine(value, shared[thread + half]);
        shared[thread] = value;
      }
      __syncthreads();
    }
    value = shared[thread % width];
    __syncthreads();  // before shared is used again
    return value;
  }
};

// The largest of some scaled values v, and the sum of exp(factor (v - largest)).
template <typename T>
struct LongPart {
  using A = opmath_t<T>;
  A largest = -std::numeric_limits<A>::infinity();
  double sum = 0;

  // Several at once: one rescaling for all of them.
  template <int count>
  __device__ void add_all(const A (&values)[count], const Differences<A>& difference) {
    A m = largest;
#pragma unroll
    for (int j = 0; j < count; ++j) m = values[j] > m ? values[j] : m;
    if (m > largest) {
      sum *= static_cast<double>(exp_for<T>(difference.of_scaled(largest, m)));
      largest = m;
    }
    A part = A(0);
#pragma unroll
    for (int j = 0; j < count; ++j) {
      // The share of -inf is 0, not exp(-inf + inf).
      if (values[j] != -std::numeric_limits<A>::infinity()) {
        part += exp_for<T>(difference.of_scaled(values[j], m));
      }
    }
    sum += static_cast<double>(part);
  }

  __device__ void merge(const LongPart& other, const Differences<A>& difference) {
    const A m = other.largest > largest ? other.largest : largest;
    // Equal infinities must not become NaN here: a part that holds nothing else counts for 0.
    const auto share = [&](const LongPart& p) {
      if (p.largest == m) return p.sum;
      return p.sum * static_cast<double>(std::exp(difference.of_scaled(p.largest, m)));
    };
    sum = share(*this) + share(other);
    largest = m;
  }
};

template <int n, typename T>
__global__ void __launch_bounds__(kLongBlock)
    forward_long_kernel(Kind kind, Forward<T> f, int width) {
  using A = opmath_t<T>;
  alignas(kVectorBytes) __shared__ double shared[sizeof(LongPart<T>) / sizeof(double) * kLongBlock];
  const Differences<A>& difference = f.differences;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * width; first < f.g.outer * f.g.inner;
       first += static_cast<int64_t>(gridDim.x) * width) {
    const LongLine<n> line(f.g, first, width);
    const T* const in = f.in + line.offset;
    const auto read = [&](int64_t start, A(&values)[kFlight* n]) {
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + k * line.workers;
        const Pack<T, n> pack = i < line.packs ? load_pack<n>(in + i * line.step) : Pack<T, n>{};
#pragma unroll
        for (int j = 0; j < n; ++j) {
          values[k * n + j] = i < line.packs ? difference.scaled(static_cast<A>(pack.values[j]))
                                             : -std::numeric_limits<A>::infinity();
        }
      }
    };
    LongPart<T> whole;
    line.each_turn(false, [&](int64_t start) {
      A values[kFlight * n];
      read(start, values);
      whole.add_all(values, difference);
    });
    whole = line.combined(whole, reinterpret_cast<LongPart<T>*>(shared),
                          [&](auto& a, const auto& b) { a.merge(b, difference); });
    const A largest = whole.largest;
    // NaN where the largest is infinite, as it is when the exponentials are added up later.
    const A sum = static_cast<A>(whole.sum) + (largest - largest);
    const auto sum_classes = over_classes<A>(line.packs * n, line.worker, line.workers, [&](A v) {
      return line.combined(v, reinterpret_cast<A*>(shared), [](A& a, A other) { a += other; });
    });
    const int64_t known = line.inside() ? line.line : 0;  // one that there is
    if (kind == Kind::kNll) {
      const A loss =
          f.target_of(known, line.offset).loss(difference, in, largest, log_of(sum), sum_classes);
      if (line.worker == 0 && line.inside()) f.out[known] = static_cast<T>(loss);
      continue;
    }
    const bool is_gradient = kind == Kind::kNllGradient;
    LineGradient<T> gradient;
    if (is_gradient) gradient = f.gradient_of(known, line.offset, sum_classes);
    const A term = keeps_powers(kind) ? A(1) / sum : log_of(sum);
    line.each_turn(true, [&](int64_t start) {
      A values[kFlight * n];
      read(start, values);
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + k * line.workers;
        if (i >= line.packs) continue;
        Pack<T, n> to;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A d = difference.of_scaled(values[k * n + j], largest);
          const A y = keeps_powers(kind) ? exp_for<T>(d) * term : d - term;
          to.values[j] = static_cast<T>(is_gradient ? gradient(y, i * n + j) : y);
        }
        store_pack(f.out + line.offset + i * line.step, to);
      }
    });
  }
}

template <int n, typename T>
__global__ void __launch_bounds__(kLongBlock)
    backward_long_kernel(Kind kind, Backward<T> b, int width) {
  using A = opmath_t<T>;
  __shared__ double shared[kLongBlock];
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * width; first < b.g.outer * b.g.inner;
       first += static_cast<int64_t>(gridDim.x) * width) {
    const LongLine<n> line(b.g, first, width);
    // Calls body(place in the tensors, gradients, outputs) for the packs of a turn.
    const auto each_pack = [&](int64_t start, const auto& body) {
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + k * line.workers, at = line.offset + i * line.step;
        if (i < line.packs) body(at, load_pack<n>(b.grad + at), load_pack<n>(b.y + at));
      }
    };
    double total = 0;
    line.each_turn(false, [&](int64_t start) {
      A part = A(0);
      each_pack(start, [&](int64_t, const Pack<T, n>& grads, const Pack<T, n>& ys) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          part +=
              gradient_term(kind, static_cast<A>(grads.values[j]), static_cast<A>(ys.values[j]));
        }
      });
      total += static_cast<double>(part);
    });
    const A sum =
        static_cast<A>(line.combined(total, shared, [](double& a, double other) { a += other; }));
    line.each_turn(true, [&](int64_t start) {
      each_pack(start, [&](int64_t at, Pack<T, n> grads, const Pack<T, n>& ys) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          grads.values[j] = static_cast<T>(gradient_value<T>(
              kind, static_cast<A>(grads.values[j]), static_cast<A>(ys.values[j]), sum, b.beta));
        }
        store_pack(b.out + at, grads);
      });
    });
  }
}

}  // namespace

template <int n, typename Arguments>
void launch_long(const Launcher& launcher, Kind kind, const Arguments& a) {
  const int width = a.g.inner == 1 ? 1 : a.g.size < 64 ? kThreads : kWarp;
  const auto run = [&](auto* kernel) {
    launcher.run_blocks(kernel, ceil_div(a.g.outer * a.g.inner, width),
                        n > 1 ? kLongBlock : kThreads, kind, a, width);
  };
  if constexpr (Arguments::kIsForward) {
    run(forward_long_kernel<n, typename Arguments::Element>);
  } else {
    run(backward_long_kernel<n, typename Arguments::Element>);
  }
}

template <typename Arguments>
void launch_lines(const Launcher& launcher, Kind kind, const Arguments& a) {
  constexpr int n = kShortPack<typename Arguments::Element>;
  const int columns = columns_of_block(kind, a);
  if (columns == 0) return launch_long<1>(launcher, kind, a);
  dispatch_kind<Arguments, !Arguments::kIsForward>(kind, [&](auto tag) {
    launcher.run(columns_kernel<decltype(tag)::value, n, Arguments>, a.g.outer * a.g.inner / n,
                 columns, columns, kind, a);
  });
}

#define MNIST_OPS_SOFTMAX_OF(Arguments, n)                                          \
  template void launch_lines<Arguments>(const Launcher&, Kind, const Arguments&);   \
  template void launch_long<1, Arguments>(const Launcher&, Kind, const Arguments&); \
  template void launch_long<n, Arguments>(const Launcher&, Kind, const Arguments&);
#define MNIST_OPS_SOFTMAX(T)                     \
  MNIST_OPS_SOFTMAX_OF(Forward<T>, kPackSize<T>) \
  MNIST_OPS_SOFTMAX_OF(Backward<T>, kPackSize<T>)
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
