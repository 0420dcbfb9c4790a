// Short rows of softmax, by way of shared memory.

#include "softmax.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr int64_t kTileBytes = int64_t{24} << 10;  // and two of them forward

// Between count neighbouring elements in global memory and in shared memory, by a whole block.
template <typename T>
__device__ __forceinline__ void copy_tile(const T* from, T* to, int count, bool aligned) {
  constexpr int n = kPackSize<T>;
  const int packs = aligned ? count / n : 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    store_pack(to + i * n, load_pack<n>(from + i * n));
  }
  for (int i = packs * n + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// Begins to bring count neighbouring elements to shared memory, by a whole block; they are there
// for a thread after copy_async_wait(), for all of them after a barrier.
template <typename T>
__device__ __forceinline__ void begin_tile(const T* from, T* to, int count, bool aligned) {
  constexpr int n = kPackSize<T>;
  const int packs = aligned ? count / n : 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    copy_pack<n>(to + i * n, from + i * n);
  }
  for (int i = packs * n + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// Calls compute(row, its elements in shared memory, early(row)) for rows of `size` elements, a
// thread each, and copies what it made of them to `out`, unless that is null. The next rows are on
// their way meanwhile. Rows follow each other in shared memory as they do outside: sizes that are
// no multiple of a pack put the threads of a warp on different banks, or on few equal ones.
template <typename T, typename Early, typename Compute>
__device__ __forceinline__ void each_row(int64_t rows, int size, const T* in, T* out, bool aligned,
                                         const Early& early, const Compute& compute) {
  const int thread = static_cast<int>(threadIdx.x);
  T* tile = reinterpret_cast<T*>(dynamic_shared_memory());
  T* next_tile = tile + kThreads * size;
  const auto rows_at = [&](int64_t base) {
    if (base >= rows) return 0;
    return static_cast<int>(rows - base < kThreads ? rows - base : kThreads);
  };
  const auto begin = [&](int64_t base, T* to) {
    const int count = rows_at(base);
    begin_tile(in + base * size, to, count * size, aligned);
    copy_async_commit();
    return early(thread < count ? base + thread : -1);
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads;
  auto next = begin(base, tile);
  for (; base < rows; base += step) {
    const int count = rows_at(base);
    const auto known = next;
    next = begin(base + step, next_tile);
    copy_async_wait<1>();  // for all but the next tile
    __syncthreads();
    if (thread < count) compute(base + thread, tile + thread * size, known);
    __syncthreads();
    if (out != nullptr) {
      copy_tile(static_cast<const T*>(tile), out + base * size, count * size, aligned);
      __syncthreads();
    }
    T* const free_tile = tile;
    tile = next_tile;
    next_tile = free_tile;
  }
}

// Of kSize elements, if it is not 0: such a row is held in registers.
template <int compiled, int kSize, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_tile_kernel(Kind given, Forward<T> f, bool aligned) {
  using A = opmath_t<T>;
  __shared__ double shared[kThreads / kWarp];
  const Kind kind = kind_of<compiled>(given);
  const bool is_gradient = kind == Kind::kNllGradient;
  const Differences<A>& difference = f.differences;
  const int size = kSize > 0 ? kSize : static_cast<int>(f.g.size);
  struct Known {  // of a row, before its elements are there
    int64_t target = 0;
    A grad = A(0);
  };
  const auto early = [&](int64_t row) {
    Known known;
    if (row >= 0 && (kind == Kind::kNll || is_gradient)) known.target = f.class_of(row);
    if (row >= 0 && is_gradient) known.grad = difference.beta * f.grad[row];
    return known;
  };
  const auto sum_classes = over_classes<A>(size, 0, 1, [](A sum) { return sum; });
  LossSum losses{0, 0};
  const auto compute = [&](int64_t row, T* x, const Known& known) {
    const LineTarget<T> target(f.targets, f.g, known.target, row * size);
    LineGradient<T> gradient;
    if (is_gradient) gradient = LineGradient<T>(target, known.grad, sum_classes);
    A largest = -std::numeric_limits<A>::infinity(), sum = A(0);
    // The result for element i, given its power or, for log_softmax, its difference.
    const auto result = [&](A v, A log_sum, A inverse, int i) {
      if (kind == Kind::kLogSoftmax) return static_cast<T>(v - log_sum);
      const A y = share_of(v, sum, inverse);
      return static_cast<T>(is_gradient ? gradient(y, i) : y);
    };
    if constexpr (kSize > 0) {
      static_assert(kSize % 2 == 0);
      A values[kSize];
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const Pack<T, 2> pair = load_pack<2>(x + i);
        values[i] = difference.scaled(static_cast<A>(pair.values[0]));
        values[i + 1] = difference.scaled(static_cast<A>(pair.values[1]));
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) largest = values[i] > largest ? values[i] : largest;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        values[i] = difference.of_scaled(values[i], largest);
        const A power = exp_for<T>(values[i]);
        sum += power;
        if (keeps_powers(kind)) values[i] = power;
      }
      if (kind != Kind::kNll) {
        const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
        const A inverse = A(1) / sum;
#pragma unroll
        for (int i = 0; i < kSize; i += 2) {
          store_pack(x + i, Pack<T, 2>{{result(values[i], log_sum, inverse, i),
                                        result(values[i + 1], log_sum, inverse, i + 1)}});
        }
      }
    } else {
      for (int i = 0; i < size; ++i) {
        const A v = difference.scaled(static_cast<A>(x[i]));
        largest = v > largest ? v : largest;
      }
      for (int i = 0; i < size; ++i) sum += exp_for<T>(difference(static_cast<A>(x[i]), largest));
      if (kind != Kind::kNll) {
        const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
        const A inverse = A(1) / sum;
        for (int i = 0; i < size; ++i) {
          const A d = difference(static_cast<A>(x[i]), largest);
          x[i] = result(keeps_powers(kind) ? exp_for<T>(d) : d, log_sum, inverse, i);
        }
      }
    }
    if (kind != Kind::kNll) return;
    const A loss = target.loss(difference, x, largest, log_of(sum), sum_classes);
    if (f.sums == nullptr) {
      f.out[row] = static_cast<T>(loss);
    } else {
      losses.losses += static_cast<double>(loss);
      losses.divisor += static_cast<double>(target.divisor());
    }
  };
  each_row(f.g.outer, size, f.in, kind == Kind::kNll ? nullptr : f.out, aligned, early, compute);
  if (f.sums == nullptr) return;
  losses.losses = block_sum<kThreads>(losses.losses, shared);
  losses.divisor = block_sum<kThreads>(losses.divisor, shared);
  if (threadIdx.x == 0) write_sum(f, losses);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_tile_kernel(Kind kind, Backward<T> b, bool aligned) {
  using A = opmath_t<T>;
  __shared__ SharedBytes<kTileBytes> shared;
  T* const grads = shared.template as<T>();
  T* const ys = grads + kTileBytes / 2 / static_cast<int64_t>(sizeof(T));
  const int size = static_cast<int>(b.g.size);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads; base < b.g.outer;
       base += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int rows = static_cast<int>(b.g.outer - base < kThreads ? b.g.outer - base : kThreads);
    copy_tile(b.grad + base * size, grads, rows * size, aligned);
    copy_tile(b.out + base * size, ys, rows * size, aligned);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      T* const g = grads + static_cast<int>(threadIdx.x) * size;
      const T* const y = ys + static_cast<int>(threadIdx.x) * size;
      A sum = A(0);
      for (int i = 0; i < size; ++i) {
        sum += gradient_term(kind, static_cast<A>(g[i]), static_cast<A>(y[i]));
      }
      for (int i = 0; i < size; ++i) {
        g[i] = static_cast<T>(
            gradient_value<T>(kind, static_cast<A>(g[i]), static_cast<A>(y[i]), sum, b.beta));
      }
    }
    __syncthreads();
    copy_tile(static_cast<const T*>(grads), b.result + base * size, rows * size, aligned);
    __syncthreads();
  }
}

// Which rows a block brings to shared memory: `tensors` of them at a time.
template <typename T>
bool takes_tile(const SoftmaxGeometry& g, int64_t tensors) {
  return g.size % kPackSize<T> != 0 &&
         g.size * kThreads * static_cast<int64_t>(sizeof(T)) * tensors <= kTileBytes;
}

// Many tiles for a block where there are many, so that it reads the next one meanwhile. Blocks
// whose losses are to be added up are no more than two of the last kernel's threads can be.
int64_t blocks_for_tiles(int64_t rows, bool sums) {
  const int64_t tiles = ceil_div(rows, kThreads), blocks = sums ? 2048 : 8192;
  return tiles == 0 ? 0 : ceil_div(tiles, ceil_div(tiles, blocks));
}

}  // namespace

template <typename T>
bool forward_short_rows(const Launcher& launcher, Kind kind, const Forward<T>& f) {
  if (!takes_tile<T>(f.g, 1)) return false;
  const auto run = [&](auto* kernel) {
    // A loss is written by itself.
    launcher.run_blocks_with_shared(kernel, blocks_for_tiles(f.g.outer, f.sums != nullptr),
                                    kThreads,
                                    2 * kThreads * f.g.size * static_cast<int64_t>(sizeof(T)), kind,
                                    f, are_aligned(f.in, kind == Kind::kNll ? f.in : f.out));
    return true;
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (f.g.size == 10) {
      switch (kind) {
        case Kind::kSoftmax:
          return run(forward_tile_kernel<static_cast<int>(Kind::kSoftmax), 10, T>);
        case Kind::kLogSoftmax:
          return run(forward_tile_kernel<static_cast<int>(Kind::kLogSoftmax), 10, T>);
        case Kind::kNll:
          return run(forward_tile_kernel<static_cast<int>(Kind::kNll), 10, T>);
        case Kind::kNllGradient:
          return run(forward_tile_kernel<static_cast<int>(Kind::kNllGradient), 10, T>);
      }
    }
  }
  return run(forward_tile_kernel<kAnyKind, 0, T>);
}

template <typename T>
bool backward_short_rows(const Launcher& launcher, Kind kind, const Backward<T>& b) {
  if (!takes_tile<T>(b.g, 2)) return false;
  const T* const result = b.result;
  launcher.run(backward_tile_kernel<T>, b.g.outer, kThreads, kThreads, kind, b,
               are_aligned(b.grad, b.out, result));
  return true;
}

template <typename T>
int64_t blocks_of_short_rows(const SoftmaxGeometry& g) {
  return g.inner == 1 && takes_tile<T>(g, 1) ? blocks_for_tiles(g.outer, true) : 0;
}

#define MNIST_OPS_SOFTMAX(T)                                                       \
  template bool forward_short_rows<T>(const Launcher&, Kind, const Forward<T>&);   \
  template bool backward_short_rows<T>(const Launcher&, Kind, const Backward<T>&); \
  template int64_t blocks_of_short_rows<T>(const SoftmaxGeometry&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
