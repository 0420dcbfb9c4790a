// Lines of softmax that are not innermost in memory.

#include "softmax.cuh"

namespace mnist_ops::cuda {
namespace {

// Combines what the threads of one threadIdx.x hold, by a tree over threadIdx.y, and gives the
// result to all of them. All threads of the block must take part.
template <typename V, typename Combine>
__device__ __forceinline__ V combine_lines(V value, V* shared, const Combine& combine) {
  const unsigned slot = threadIdx.y * blockDim.x + threadIdx.x;
  shared[slot] = value;
  __syncthreads();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      value = shared[slot];
      combine(value, shared[slot + half * blockDim.x]);
      shared[slot] = value;
    }
    __syncthreads();
  }
  value = shared[threadIdx.x];
  __syncthreads();  // before shared is used again
  return value;
}

// The first element of a line; its elements are g.inner apart.
__device__ __forceinline__ int64_t line_offset(const SoftmaxGeometry& g, int64_t line) {
  const int64_t outer = line / g.inner;
  return outer * g.size * g.inner + (line - outer * g.inner);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_lines_kernel(Kind kind, Forward<T> f) {
  using A = opmath_t<T>;
  using Part = Partial<A, double>;
  __shared__ SharedBytes<sizeof(Part) * kThreads> shared;
  const Differences<A>& difference = f.differences;
  const int64_t lines = f.g.outer * f.g.inner, size = f.g.size, step = f.g.inner;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < lines;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = base + threadIdx.x;
    const int64_t offset = line < lines ? line_offset(f.g, line) : 0;
    const int64_t end = line < lines ? size : 0;
    const T* in = f.in + offset;
    Part whole;
    for (int64_t start = threadIdx.y; start < end; start += kFlight * blockDim.y) {
      A values[kFlight];
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + k * blockDim.y;
        values[k] = i < end ? difference.scaled(static_cast<A>(in[i * step]))
                            : -std::numeric_limits<A>::infinity();
      }
      whole.template add_all<T>(values, difference);
    }
    whole = combine_lines(whole, shared.template as<Part>(),
                          [&](Part& a, const Part& b) { a.merge(b, difference); });
    whole.finish();
    const A largest = whole.largest, sum = static_cast<A>(whole.sum);
    const bool is_gradient = kind == Kind::kNllGradient;
    const int64_t known = line < lines ? line : 0;  // one that there is
    const auto sum_classes = over_classes<A>(end, threadIdx.y, blockDim.y, [&](A v) {
      return combine_lines(v, shared.template as<A>(), [](A& a, A other) { a += other; });
    });
    if (kind == Kind::kNll) {
      const A loss =
          f.target_of(known, offset).loss(difference, in, largest, log_of(sum), sum_classes);
      if (threadIdx.y == 0 && line < lines) f.out[line] = static_cast<T>(loss);
    } else {
      LineGradient<T> gradient;
      if (is_gradient) gradient = f.gradient_of(known, offset, sum_classes);
      const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
      const A inverse = A(1) / sum;
      T* out = f.out + offset;
#pragma unroll 4
      for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
        const A d = difference(static_cast<A>(in[i * step]), largest);
        const A y = keeps_powers(kind) ? share_of(exp_for<T>(d), sum, inverse) : d - log_sum;
        out[i * step] = static_cast<T>(is_gradient ? gradient(y, i) : y);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_lines_kernel(Kind kind, Backward<T> b) {
  using A = opmath_t<T>;
  __shared__ SharedBytes<sizeof(double) * kThreads> shared;
  const int64_t lines = b.g.outer * b.g.inner, size = b.g.size, step = b.g.inner;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < lines;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = base + threadIdx.x;
    const int64_t offset = line < lines ? line_offset(b.g, line) : 0;
    const int64_t end = line < lines ? size : 0;
    const T *grad = b.grad + offset, *out = b.out + offset;
    double total = 0;
    for (int64_t start = threadIdx.y; start < end; start += kFlight * blockDim.y) {
      A part = A(0);
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + k * blockDim.y;
        if (i >= end) continue;
        part += gradient_term(kind, static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]));
      }
      total += static_cast<double>(part);
    }
    const A sum = static_cast<A>(combine_lines(total, shared.template as<double>(),
                                               [](double& a, double other) { a += other; }));
    T* result = b.result + offset;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
      result[i * step] = static_cast<T>(gradient_value<T>(
          kind, static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]), sum, b.beta));
    }
  }
}

// ----------------------------------------------------------------- other lines, held in registers

constexpr int kHeld = 4;  // packs of a thread, of so many lines
template <typename T>
constexpr int kLinesOfPack = kPackSize<T> < 4 ? kPackSize<T> : 4;
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

// The gradient of the loss has a kernel of its own: it takes more registers.
template <int compiled, int n, typename T>
__global__ void __launch_bounds__(kThreads) forward_columns_kernel(Kind given, Forward<T> f) {
  using A = opmath_t<T>;
  constexpr bool is_gradient = compiled == static_cast<int>(Kind::kNllGradient);
  const Kind kind = kind_of<compiled>(given);
  alignas(kVectorBytes) __shared__ A shared[kThreads * n];
  const Differences<A>& difference = f.differences;
  const int64_t packs = f.g.outer * f.g.inner / n, step = f.g.inner;
  const int size = static_cast<int>(f.g.size), workers = static_cast<int>(blockDim.y);
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < packs;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pack = base + threadIdx.x;
    const int64_t offset = pack < packs ? column_offset<n>(f.g, pack) : 0;
    const int end = pack < packs ? size : 0, first = static_cast<int>(threadIdx.y);
    const T* in = f.in + offset;
    Pack<T, n> held[kHeld];
    A largest[n], sums[n];
#pragma unroll
    for (int j = 0; j < n; ++j) largest[j] = -std::numeric_limits<A>::infinity(), sums[j] = A(0);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * workers;
      if (i < end) held[k] = load_pack<n>(in + i * step);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (first + k * workers >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A v = difference.scaled(static_cast<A>(held[k].values[j]));
        largest[j] = v > largest[j] ? v : largest[j];
      }
    }
    combine_columns<n>(largest, shared, [](A a, A b) { return b > a ? b : a; });
    // The powers, unless they would have to be rounded to be held.
    const bool powers = keeps_powers(kind) && std::is_same_v<T, A>;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (first + k * workers >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A power = exp_for<T>(difference(static_cast<A>(held[k].values[j]), largest[j]));
        sums[j] += power;
        if (powers) held[k].values[j] = static_cast<T>(power);
      }
    }
    combine_columns<n>(sums, shared, [](A a, A b) { return a + b; });
    const int64_t known = pack < packs ? pack * n : 0;  // lines that there are
    const auto sum_classes = over_classes<A>(end, first, workers, [&](A v) {
      A sum[1] = {v};
      combine_columns<1>(sum, shared, [](A a, A b) { return a + b; });
      return sum[0];
    });
    T* out = f.out + offset;
    if (kind == Kind::kNll) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A loss = f.target_of(known + j, offset + j)
                           .loss(difference, in + j, largest[j], log_of(sums[j]), sum_classes);
        if (pack < packs && threadIdx.y == 0) f.out[pack * n + j] = static_cast<T>(loss);
      }
      continue;
    }
    A terms[n];  // what every element of a line has to do with
    LineGradient<T> gradients[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      terms[j] = keeps_powers(kind) ? A(1) / sums[j] : log_of(sums[j]);
      if (is_gradient) gradients[j] = f.gradient_of(known + j, offset + j, sum_classes);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * workers;
      if (i >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        A v = static_cast<A>(held[k].values[j]);
        if (!powers) v = difference(v, largest[j]);
        if (keeps_powers(kind)) {
          if (!powers) v = exp_for<T>(v);
          v = share_of(v, sums[j], terms[j]);
          if (is_gradient) v = gradients[j](v, i);
        } else {
          v -= terms[j];
        }
        held[k].values[j] = static_cast<T>(v);
      }
      store_pack(out + i * step, held[k]);
    }
  }
}

template <int n, typename T>
__global__ void __launch_bounds__(kThreads) backward_columns_kernel(Kind kind, Backward<T> b) {
  using A = opmath_t<T>;
  alignas(kVectorBytes) __shared__ A shared[kThreads * n];
  const int64_t packs = b.g.outer * b.g.inner / n, step = b.g.inner;
  const int size = static_cast<int>(b.g.size), workers = static_cast<int>(blockDim.y);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < packs;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pack = base + threadIdx.x;
    const int64_t offset = pack < packs ? column_offset<n>(b.g, pack) : 0;
    const int end = pack < packs ? size : 0, first = static_cast<int>(threadIdx.y);
    Pack<T, n> grads[kHeld], ys[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * workers;
      if (i >= end) continue;
      grads[k] = load_pack<n>(b.grad + offset + i * step);
      ys[k] = load_pack<n>(b.out + offset + i * step);
    }
    A sums[n] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (first + k * workers >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        sums[j] += gradient_term(kind, static_cast<A>(grads[k].values[j]),
                                 static_cast<A>(ys[k].values[j]));
      }
    }
    combine_columns<n>(sums, shared, [](A a, A other) { return a + other; });
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * workers;
      if (i >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        grads[k].values[j] =
            static_cast<T>(gradient_value<T>(kind, static_cast<A>(grads[k].values[j]),
                                             static_cast<A>(ys[k].values[j]), sums[j], b.beta));
      }
      store_pack(b.result + offset + i * step, grads[k]);
    }
  }
}

// How many lines a block takes side by side.
int lines_of_block(const SoftmaxGeometry& g) {
  if (g.inner == 1) return 1;
  return g.size < 64 ? kThreads : kWarp;
}

// How many packs of lines a block takes side by side where it holds them, 0 if it cannot.
template <typename T, typename... Pointers>
int columns_of_block(const SoftmaxGeometry& g, const Pointers*... pointers) {
  if (g.inner % kLinesOfPack<T> != 0 || g.size > kColumnElements || !are_aligned(pointers...))
    return 0;
  int columns = kWarp;
  while (kThreads / columns * kHeld < g.size) columns /= 2;
  return columns;
}

}  // namespace

template <typename T>
void forward_lines(const Launcher& launcher, Kind kind, const Forward<T>& f) {
  const int64_t lines = f.g.outer * f.g.inner;
  // A loss is written by itself.
  if (const int columns = columns_of_block<T>(f.g, f.in, kind == Kind::kNll ? f.in : f.out)) {
    constexpr int n = kLinesOfPack<T>;
    constexpr int kGradient = static_cast<int>(Kind::kNllGradient);
    auto* const kernel = kind == Kind::kNllGradient ? forward_columns_kernel<kGradient, n, T>
                                                    : forward_columns_kernel<kAnyKind, n, T>;
    return launcher.run(kernel, lines / n, columns, columns, kind, f);
  }
  const int width = lines_of_block(f.g);
  launcher.run(forward_lines_kernel<T>, lines, width, width, kind, f);
}

template <typename T>
void backward_lines(const Launcher& launcher, Kind kind, const Backward<T>& b) {
  const int64_t lines = b.g.outer * b.g.inner;
  const T* const result = b.result;
  if (const int columns = columns_of_block<T>(b.g, b.grad, b.out, result)) {
    constexpr int n = kLinesOfPack<T>;
    return launcher.run(backward_columns_kernel<n, T>, lines / n, columns, columns, kind, b);
  }
  const int width = lines_of_block(b.g);
  launcher.run(backward_lines_kernel<T>, lines, width, width, kind, b);
}

#define MNIST_OPS_SOFTMAX(T)                                                \
  template void forward_lines<T>(const Launcher&, Kind, const Forward<T>&); \
  template void backward_lines<T>(const Launcher&, Kind, const Backward<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
