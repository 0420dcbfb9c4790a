// Softmax, log-softmax and softmax + NLL on CUDA.
//
// Bound by memory; every operator is one launch. Where the dimension is innermost in memory each
// element is read once and written once (softmax_nll: read once), in packs of 16 bytes where rows
// are aligned to that:
//   tile     rows of a few elements that are no multiple of a pack (the reports' 10 classes): a
//            block brings 256 rows to shared memory, as one piece, and a thread takes a row from
//            there; forward, the next rows are on their way meanwhile
//   warp     rows of up to 1024 elements (256 without packs): up to 32 lanes share a row and hold
//            it in registers
//   block    rows of up to 32768 elements (half of it for each of these: backward, which holds two
//            numbers an element; float64; rows without packs): a block of as many threads as it
//            takes holds a row in registers
//   cluster  where the device has them (compute capability 9.0) up to 8 blocks share a row of up to
//            8 times as many elements, and smaller blocks one of more than 16384
//   stream   longer rows: read twice, the second time from the end, whose elements are still in L2
// Elsewhere:
//   columns  lines of up to 256 elements, packs of them side by side: a block takes 4 to 32 packs
//            of lines, threadIdx.x across them, so that reads are coalesced; threadIdx.y shares out
//            each line, which is held in registers
//   lines    other ones: a block takes 32 to 256 neighbouring lines in the same way and reads them
//            twice: the second reading finds most of its data in L2
// One pass finds the largest value and the sum together wherever more than a warp has a line.
//
// Sums are added in an order that depends on shape, alignment and kind of device alone. Where a
// thread adds up more than it can hold in registers, it does so in float64, a few numbers at a
// time.
//
// softmax_nll: a target outside of [0, classes) gives NaN, as loss and as gradient of its row. To
// refuse it, as the CPU does, the host would have to wait for the device.

#include "../softmax.h"

#include <array>

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

using Kind = SoftmaxKind;
template <typename T>
using Forward = SoftmaxForward<T>;
template <typename T>
using Backward = SoftmaxBackward<T>;

// exp(x) for elements of type T: half types are rounded more coarsely than the fast instruction is,
// and with 2 bytes an element the exact one would be the bound, not memory.
template <typename T>
__device__ __forceinline__ opmath_t<T> exp_for(opmath_t<T> x) {
  if constexpr (!std::is_same_v<T, opmath_t<T>>) {
    return two_to_the(x * 1.442695041f);
  } else {
    return std::exp(x);
  }
}

// The logarithm of a sum. In float64 the library's own one is called, and registers are spilled
// around the call.
template <typename A>
__device__ __forceinline__ A log_of(A sum) {
  return std::is_same_v<A, double> ? elementary::log(sum) : std::log(sum);
}

// The largest of some scaled values v, and the sum of exp(factor (v - largest)).
template <typename A, typename Sum = A>
struct Partial {
  A largest = -std::numeric_limits<A>::infinity();
  Sum sum = Sum(0);

  // Several at once: one rescaling for all of them.
  template <typename T, int count>
  __device__ void add_all(const A (&values)[count], const Differences<A>& difference) {
    A m = largest;
#pragma unroll
    for (int j = 0; j < count; ++j) m = values[j] > m ? values[j] : m;
    if (m > largest) {
      sum *= static_cast<Sum>(exp_for<T>(difference.of_scaled(largest, m)));
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
    sum += static_cast<Sum>(part);
  }

  __device__ void merge(const Partial& other, const Differences<A>& difference) {
    const A m = other.largest > largest ? other.largest : largest;
    // Equal infinities must not become NaN here: a part that holds nothing else counts for 0.
    const auto share = [&](const Partial& p) {
      return p.largest == m
                 ? p.sum
                 : p.sum * static_cast<Sum>(std::exp(difference.of_scaled(p.largest, m)));
    };
    sum = share(*this) + share(other);
    largest = m;
  }

  // Where the largest value is infinite, of either sign, the row is NaN, as it is when the
  // exponentials are added up after the largest value has been found.
  __device__ void finish() { sum += static_cast<Sum>(largest - largest); }
};

// Division by the sum: by multiplication except in float64, where nobody waits for it.
template <typename A>
__device__ __forceinline__ A share_of(A power, A sum, A inverse) {
  return std::is_same_v<A, double> ? power / sum : power * inverse;
}

// Loss and log of the sum of one line; first is its first element.
template <typename T, typename A>
__device__ __forceinline__ void write_loss(const Forward<T>& f, int64_t line, int64_t target,
                                           const T* first, A largest, A sum) {
  const A log_sum = log_of(sum);
  A loss = std::numeric_limits<A>::quiet_NaN();
  if (target >= 0 && target < f.g.size) {
    loss = log_sum - f.differences(static_cast<A>(first[target * f.g.inner]), largest);
  }
  f.out[line] = static_cast<T>(loss);
  f.largest[line] = largest;
  f.log_sum[line] = log_sum;
}

template <typename T, typename A>
__device__ __forceinline__ void write_loss(const Forward<T>& f, int64_t line, const T* first,
                                           A largest, A sum) {
  write_loss(f, line, f.target[line], first, largest, sum);
}

// --------------------------------------------------------------------------- rows in registers

// What one of `workers` threads holds of a row: kLoads packs of n elements, `workers` packs apart.
// Those beyond the row's end count as `missing`, the others are multiplied by scale.
template <int kLoads, int n, typename T>
struct HeldRow {
  using A = opmath_t<T>;
  A values[kLoads][n];

  __device__ __forceinline__ void load(const T* row, int size, int worker, int workers, A scale,
                                       A missing) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = (worker + k * workers) * n;
      if (i < size) {
        const Pack<T, n> pack = load_pack<n>(row + i);
#pragma unroll
        for (int j = 0; j < n; ++j) values[k][j] = scale * static_cast<A>(pack.values[j]);
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) values[k][j] = missing;
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int size, int worker, int workers) const {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = (worker + k * workers) * n;
      if (i < size) {
        Pack<T, n> pack;
#pragma unroll
        for (int j = 0; j < n; ++j) pack.values[j] = static_cast<T>(values[k][j]);
        store_pack(row + i, pack);
      }
    }
  }

  // Calls body with every value, by reference.
  template <typename F>
  __device__ __forceinline__ void each(const F& body) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int j = 0; j < n; ++j) body(values[k][j]);
    }
  }
};

// What the warps of a block and the blocks of a cluster tell each other, in shared memory.
template <typename A>
struct Exchange {
  A largest[kWarp], sums[kWarp];
  A largest_of_blocks[kMaxCluster], sums_of_blocks[kMaxCluster];
};

// Of `count` parts, up to 32 of them, by a whole warp. A part of -inf alone counts for 0.
template <typename A>
__device__ __forceinline__ Partial<A> merged(const A* largest, const A* sums, int count,
                                             const Differences<A>& difference) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const A mine = lane < count ? largest[lane] : -std::numeric_limits<A>::infinity();
  A sum = lane < count ? sums[lane] : A(0);
  const A whole = lane_max(mine, kWarp);
  if (mine != whole) sum *= std::exp(difference.of_scaled(mine, whole));
  return {whole, lane_sum(sum, kWarp)};
}

template <typename A>
__device__ __forceinline__ A merged(const A* sums, int count) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  return lane_sum(lane < count ? sums[lane] : A(0), kWarp);
}

// What the warps of one row's blocks found, merged, for all threads; `part` is this block's place
// among the row's `parts` blocks. The barriers of a cluster are in two halves: cluster_arrive() was
// called last, by the kernel or by the turn before this one.
template <typename A>
__device__ __forceinline__ Partial<A> merge_row(const Partial<A>& of_warp, Exchange<A>& shared,
                                                int part, int parts,
                                                const Differences<A>& difference) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // whoever read shared before is done
  if (thread % kWarp == 0) {
    shared.largest[thread / kWarp] = of_warp.largest;
    shared.sums[thread / kWarp] = of_warp.sum;
  }
  __syncthreads();
  Partial<A> whole =
      merged(shared.largest, shared.sums, static_cast<int>(blockDim.x) / kWarp, difference);
  if (parts > 1) {
    cluster_wait();  // all of them are there and have read what came before
    if (thread < parts) {
      cluster_peer(shared.largest_of_blocks, thread)[part] = whole.largest;
      cluster_peer(shared.sums_of_blocks, thread)[part] = whole.sum;
    }
    cluster_arrive();
    cluster_wait();
    whole = merged(shared.largest_of_blocks, shared.sums_of_blocks, parts, difference);
    cluster_arrive();
  }
  return whole;
}

template <typename A>
__device__ __forceinline__ A sum_row(A of_warp, Exchange<A>& shared, int part, int parts) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread % kWarp == 0) shared.sums[thread / kWarp] = of_warp;
  __syncthreads();
  A whole = merged(shared.sums, static_cast<int>(blockDim.x) / kWarp);
  if (parts > 1) {
    cluster_wait();
    if (thread < parts) cluster_peer(shared.sums_of_blocks, thread)[part] = whole;
    cluster_arrive();
    cluster_wait();
    whole = merged(shared.sums_of_blocks, parts);
    cluster_arrive();
  }
  return whole;
}

// The steps of the forward on what a thread holds; `lanes` of a warp share the row, and merge finds
// out what others have of it, if there are any.
template <Kind kind, int kLoads, int n, bool shared_row, typename T, typename Merge>
__device__ __forceinline__ void forward_row(const Forward<T>& f, int64_t row, bool inside,
                                            int worker, int workers, int lanes,
                                            const Merge& merge) {
  using A = opmath_t<T>;
  const int size = static_cast<int>(f.g.size);
  const T* first = f.in + row * size;
  constexpr A kMissing = -std::numeric_limits<A>::infinity();
  const Differences<A>& difference = f.differences;
  HeldRow<kLoads, n, T> held;
  held.load(first, inside ? size : 0, worker, workers, difference.scale, kMissing);
  A largest = kMissing;
  held.each([&](A& v) { largest = v > largest ? v : largest; });
  largest = lane_max(largest, lanes);
  const A base = largest == kMissing ? A(0) : largest;  // exp(-inf) is 0, exp(-inf + inf) is not
  A sum = A(0);
  held.each([&](A& v) {
    const A power = exp_for<T>(difference.of_scaled(v, base));
    sum += power;
    if (kind == Kind::kSoftmax) v = power;
  });
  Partial<A> whole{largest, lane_sum(sum, lanes)};
  if constexpr (shared_row) whole = merge(whole);
  whole.finish();
  if (!inside) return;
  if constexpr (kind == Kind::kNll) {
    if (worker == 0) write_loss(f, row, first, whole.largest, whole.sum);
  } else {
    if constexpr (kind == Kind::kLogSoftmax) {
      const A log_sum = log_of(whole.sum);
      held.each([&](A& v) { v = difference.of_scaled(v, whole.largest) - log_sum; });
    } else {
      A correction = A(1);
      if (shared_row && largest != whole.largest) {
        correction = std::exp(difference.of_scaled(largest, whole.largest));
      }
      const A inverse = correction / whole.sum;
      held.each([&](A& v) {
        v = share_of(v * (std::is_same_v<A, double> ? correction : A(1)), whole.sum, inverse);
      });
    }
    held.store(f.out + row * size, size, worker, workers);
  }
}

// How many blocks should fit on a multiprocessor: registers are more than a thread needs otherwise,
// and it is the number of warps that hides the time of a row's steps. (7.5 holds 4 of them at
// most.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostResident = 4;
#else
constexpr int kMostResident = 5;
#endif
// A softmax of 32 elements a thread keeps its powers, too.
template <Kind kind, int kLoads, int n, typename T>
constexpr int kResident = sizeof(T) == 8                              ? 2
                          : sizeof(T) == 4 || n == 1                  ? 4
                          : kind == Kind::kSoftmax && kLoads * n > 16 ? 4
                                                                      : kMostResident;

template <Kind kind, int kLoads, int n, typename T>
__global__ void __launch_bounds__(kThreads, kResident<kind, kLoads, n, T>)
    forward_warp_kernel(Forward<T> f, int lanes) {
  const int64_t rows = f.g.outer;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = blockIdx.x * per_block; base < rows; base += gridDim.x * per_block) {
    const int64_t row = base + threadIdx.x / static_cast<unsigned>(lanes);
    forward_row<kind, kLoads, n, false>(f, row, row < rows, lane, lanes, lanes, 0);
  }
}

constexpr int kWideBlock = 1024;  // threads of a block at most, and of one that streams

// `parts` neighbouring blocks, a cluster, take a row.
template <Kind kind, int kLoads, int n, typename T>
__global__ void __launch_bounds__(kWideBlock) forward_block_kernel(Forward<T> f, int parts) {
  using A = opmath_t<T>;
  __shared__ Exchange<A> shared;
  const int part = static_cast<int>(blockIdx.x) % parts, threads = static_cast<int>(blockDim.x);
  if (parts > 1) cluster_arrive();
  // Rows of hundreds of elements: memory has none for 2^31 of them, and an int is one register.
  const int rows = static_cast<int>(f.g.outer), step = static_cast<int>(gridDim.x) / parts;
  for (int row = static_cast<int>(blockIdx.x) / parts; row < rows; row += step) {
    forward_row<kind, kLoads, n, true>(f, row, true, part * threads + static_cast<int>(threadIdx.x),
                                       parts * threads, kWarp, [&](const Partial<A>& of_warp) {
                                         return merge_row(of_warp, shared, part, parts,
                                                          f.differences);
                                       });
  }
  if (parts > 1) cluster_wait();
}

// What is added up along a line, and the gradient of one element.
template <Kind kind, typename A>
__device__ __forceinline__ A gradient_term(A grad, A y) {
  return kind == Kind::kSoftmax ? grad * y : grad;
}

template <Kind kind, typename T, typename A = opmath_t<T>>
__device__ __forceinline__ A gradient_value(A grad, A y, A sum, A beta) {
  return kind == Kind::kSoftmax ? beta * y * (grad - sum) : beta * (grad - exp_for<T>(y) * sum);
}

template <Kind kind, int kLoads, int n, typename T, typename Sum>
__device__ __forceinline__ void backward_row(const Backward<T>& b, int64_t row, bool inside,
                                             int worker, int workers, const Sum& sum_up) {
  using A = opmath_t<T>;
  const int size = static_cast<int>(b.g.size);
  const int64_t first = row * size;
  HeldRow<kLoads, n, T> grads, ys;
  grads.load(b.grad + first, inside ? size : 0, worker, workers, A(1), A(0));
  ys.load(b.out + first, inside ? size : 0, worker, workers, A(1), A(0));
  A sum = A(0);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) sum += gradient_term<kind>(grads.values[k][j], ys.values[k][j]);
  }
  sum = sum_up(sum);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A& grad = grads.values[k][j];
      grad = gradient_value<kind, T>(grad, ys.values[k][j], sum, b.beta);
    }
  }
  if (inside) grads.store(b.result + first, size, worker, workers);
}

template <Kind kind, int kLoads, int n, typename T>
__global__ void __launch_bounds__(kThreads) backward_warp_kernel(Backward<T> b, int lanes) {
  using A = opmath_t<T>;
  const int64_t rows = b.g.outer;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int64_t base = blockIdx.x * per_block; base < rows; base += gridDim.x * per_block) {
    const int64_t row = base + threadIdx.x / static_cast<unsigned>(lanes);
    backward_row<kind, kLoads, n>(b, row, row < rows, lane, lanes,
                                  [=](A v) { return lane_sum(v, lanes); });
  }
}

template <Kind kind, int kLoads, int n, typename T>
__global__ void __launch_bounds__(kWideBlock) backward_block_kernel(Backward<T> b, int parts) {
  using A = opmath_t<T>;
  __shared__ Exchange<A> shared;
  const int part = static_cast<int>(blockIdx.x) % parts, threads = static_cast<int>(blockDim.x);
  if (parts > 1) cluster_arrive();
  for (int64_t row = blockIdx.x / static_cast<unsigned>(parts); row < b.g.outer;
       row += gridDim.x / static_cast<unsigned>(parts)) {
    backward_row<kind, kLoads, n>(
        b, row, true, part * threads + static_cast<int>(threadIdx.x), parts * threads,
        [&](A v) { return sum_row(lane_sum(v, kWarp), shared, part, parts); });
  }
  if (parts > 1) cluster_wait();
}

// ---------------------------------------------------------------- short rows, by way of shared
// memory

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

// Shared memory for `bytes` bytes of T, which may have constructors, aligned to packs.
template <int64_t bytes>
struct alignas(kVectorBytes) SharedBytes {
  unsigned char storage[bytes];
  template <typename T>
  __device__ T* as() {
    return reinterpret_cast<T*>(storage);
  }
};

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

// A row a thread. Rows follow each other in shared memory as they do outside: sizes that are no
// multiple of a pack put the threads of a warp on different banks, or on few equal ones. Of kSize
// elements, if it is not 0: such a row is held in registers.
template <Kind kind, int kSize, typename T>
__global__ void __launch_bounds__(kThreads) forward_tile_kernel(Forward<T> f, bool aligned) {
  using A = opmath_t<T>;
  const Differences<A>& difference = f.differences;
  const int size = kSize > 0 ? kSize : static_cast<int>(f.g.size);
  const int thread = static_cast<int>(threadIdx.x);
  T* tile = reinterpret_cast<T*>(dynamic_shared_memory());
  T* next_tile = tile + kThreads * size;
  const auto rows_at = [&](int64_t base) {
    return static_cast<int>(f.g.outer - base < kThreads ? f.g.outer - base : kThreads);
  };
  const auto begin = [&](int64_t base, T* to) {
    const int rows = base < f.g.outer ? rows_at(base) : 0;
    if (rows > 0) begin_tile(f.in + base * size, to, rows * size, aligned);
    copy_async_commit();
    return kind == Kind::kNll && thread < rows ? f.target[base + thread] : int64_t{0};
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads;
  int64_t next_target = begin(base, tile);
  for (; base < f.g.outer; base += step) {
    const int rows = rows_at(base);
    const int64_t target = next_target;
    next_target = begin(base + step, next_tile);
    copy_async_wait<1>();  // for all but the next tile
    __syncthreads();
    if (thread < rows) {
      T* const x = tile + thread * size;
      A largest = -std::numeric_limits<A>::infinity(), sum = A(0);
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
          if (kind == Kind::kSoftmax) values[i] = power;
        }
        if constexpr (kind != Kind::kNll) {
          const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
          const A inverse = A(1) / sum;
#pragma unroll
          for (int i = 0; i < kSize; i += 2) {
            Pack<T, 2> pair;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const A v = values[i + j];
              pair.values[j] =
                  static_cast<T>(kind == Kind::kSoftmax ? share_of(v, sum, inverse) : v - log_sum);
            }
            store_pack(x + i, pair);
          }
        }
      } else {
        for (int i = 0; i < size; ++i) {
          const A v = difference.scaled(static_cast<A>(x[i]));
          largest = v > largest ? v : largest;
        }
        for (int i = 0; i < size; ++i) sum += exp_for<T>(difference(static_cast<A>(x[i]), largest));
        if constexpr (kind != Kind::kNll) {
          const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
          const A inverse = A(1) / sum;
          for (int i = 0; i < size; ++i) {
            const A d = difference(static_cast<A>(x[i]), largest);
            x[i] = static_cast<T>(kind == Kind::kSoftmax ? share_of(exp_for<T>(d), sum, inverse)
                                                         : d - log_sum);
          }
        }
      }
      if constexpr (kind == Kind::kNll) write_loss(f, base + thread, target, x, largest, sum);
    }
    __syncthreads();
    if constexpr (kind != Kind::kNll) {
      copy_tile(static_cast<const T*>(tile), f.out + base * size, rows * size, aligned);
      __syncthreads();
    }
    T* const free_tile = tile;
    tile = next_tile;
    next_tile = free_tile;
  }
}

template <Kind kind, typename T>
__global__ void __launch_bounds__(kThreads) backward_tile_kernel(Backward<T> b, bool aligned) {
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
        sum += gradient_term<kind>(static_cast<A>(g[i]), static_cast<A>(y[i]));
      }
      for (int i = 0; i < size; ++i) {
        g[i] = static_cast<T>(
            gradient_value<kind, T>(static_cast<A>(g[i]), static_cast<A>(y[i]), sum, b.beta));
      }
    }
    __syncthreads();
    copy_tile(static_cast<const T*>(grads), b.result + base * size, rows * size, aligned);
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------ very long rows

// Wide blocks, so that few rows are under way and L2 holds them.
constexpr int kFlight = 4;  // packs of a thread that are read together, and added up in float32

// Calls body(index of the first element, is it inside) for a thread's packs of a row, kFlight of
// them in a turn; from the end where `backwards`.
template <bool backwards, int n, typename F>
__device__ __forceinline__ void each_turn(int64_t size, const F& body) {
  constexpr int64_t kTurn = int64_t{kWideBlock} * kFlight * n;
  const int64_t turns = (size + kTurn - 1) / kTurn;
  for (int64_t turn = 0; turn < turns; ++turn) {
    body((backwards ? turns - 1 - turn : turn) * kTurn + static_cast<int64_t>(threadIdx.x) * n);
  }
}

template <Kind kind, int n, typename T>
__global__ void __launch_bounds__(kWideBlock) forward_stream_kernel(Forward<T> f) {
  using A = opmath_t<T>;
  using Part = Partial<A, double>;
  __shared__ SharedBytes<sizeof(Part) * (kWideBlock / kWarp)> shared;
  const Differences<A>& difference = f.differences;
  const int64_t size = f.g.size;
  const auto read = [&](const T* first, int64_t start, A(&values)[kFlight* n]) {
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      const int64_t i = start + int64_t{k} * kWideBlock * n;
      const Pack<T, n> pack = i < size ? load_pack<n>(first + i) : Pack<T, n>{};
#pragma unroll
      for (int j = 0; j < n; ++j) {
        values[k * n + j] = i < size ? difference.scaled(static_cast<A>(pack.values[j]))
                                     : -std::numeric_limits<A>::infinity();
      }
    }
  };
  for (int64_t row = blockIdx.x; row < f.g.outer; row += gridDim.x) {
    const T* first = f.in + row * size;
    Part whole;
    each_turn<false, n>(size, [&](int64_t start) {
      A values[kFlight * n];
      read(first, start, values);
      whole.template add_all<T>(values, difference);
    });
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      Part other;
      other.largest = __shfl_xor_sync(kWholeWarp, whole.largest, distance);
      other.sum = __shfl_xor_sync(kWholeWarp, whole.sum, distance);
      whole.merge(other, difference);
    }
    whole =
        block_combine<kWideBlock>(whole, shared.template as<Part>(), [&](Part a, const Part& b) {
          a.merge(b, difference);
          return a;
        });
    whole.finish();
    const A largest = whole.largest, sum = static_cast<A>(whole.sum);
    if constexpr (kind == Kind::kNll) {
      if (threadIdx.x == 0) write_loss(f, row, first, largest, sum);
    } else {
      const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
      const A inverse = A(1) / sum;
      T* out = f.out + row * size;
      each_turn<true, n>(size, [&](int64_t start) {
        A values[kFlight * n];
        read(first, start, values);
#pragma unroll
        for (int k = 0; k < kFlight; ++k) {
          const int64_t i = start + int64_t{k} * kWideBlock * n;
          Pack<T, n> to;
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const A d = difference.of_scaled(values[k * n + j], largest);
            to.values[j] = static_cast<T>(
                kind == Kind::kSoftmax ? share_of(exp_for<T>(d), sum, inverse) : d - log_sum);
          }
          if (i < size) store_pack(out + i, to);
        }
      });
    }
  }
}

template <Kind kind, int n, typename T>
__global__ void __launch_bounds__(kWideBlock) backward_stream_kernel(Backward<T> b) {
  using A = opmath_t<T>;
  __shared__ double shared[kWideBlock / kWarp];
  const int64_t size = b.g.size;
  for (int64_t row = blockIdx.x; row < b.g.outer; row += gridDim.x) {
    const T *grad = b.grad + row * size, *out = b.out + row * size;
    T* result = b.result + row * size;
    double total = 0;
    each_turn<false, n>(size, [&](int64_t start) {
      A part = A(0);
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + int64_t{k} * kWideBlock * n;
        if (i >= size) continue;
        const Pack<T, n> gs = load_pack<n>(grad + i), ys = load_pack<n>(out + i);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          part += gradient_term<kind>(static_cast<A>(gs.values[j]), static_cast<A>(ys.values[j]));
        }
      }
      total += static_cast<double>(part);
    });
    const A sum = static_cast<A>(block_sum<kWideBlock>(total, shared));
    each_turn<true, n>(size, [&](int64_t start) {
#pragma unroll
      for (int k = 0; k < kFlight; ++k) {
        const int64_t i = start + int64_t{k} * kWideBlock * n;
        if (i >= size) continue;
        const Pack<T, n> gs = load_pack<n>(grad + i), ys = load_pack<n>(out + i);
        Pack<T, n> to;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          to.values[j] = static_cast<T>(gradient_value<kind, T>(
              static_cast<A>(gs.values[j]), static_cast<A>(ys.values[j]), sum, b.beta));
        }
        store_pack(result + i, to);
      }
    });
  }
}

// ------------------------------------------------------------------------------------ other lines

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

// Shared memory for one value a thread; V may have constructors, which __shared__ may not.
template <typename V>
struct alignas(V) SharedValues {
  unsigned char bytes[sizeof(V) * kThreads];
  __device__ V* get() { return reinterpret_cast<V*>(bytes); }
};

// The first element of a line; its elements are g.inner apart.
__device__ __forceinline__ int64_t line_offset(const SoftmaxGeometry& g, int64_t line) {
  const int64_t outer = line / g.inner;
  return outer * g.size * g.inner + (line - outer * g.inner);
}

template <Kind kind, typename T>
__global__ void __launch_bounds__(kThreads) forward_lines_kernel(Forward<T> f) {
  using A = opmath_t<T>;
  using Part = Partial<A, double>;
  __shared__ SharedValues<Part> shared;
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
    whole =
        combine_lines(whole, shared.get(), [&](Part& a, const Part& b) { a.merge(b, difference); });
    whole.finish();
    const A largest = whole.largest, sum = static_cast<A>(whole.sum);
    if constexpr (kind == Kind::kNll) {
      if (threadIdx.y == 0 && line < lines) write_loss(f, line, in, largest, sum);
    } else {
      const A log_sum = kind == Kind::kLogSoftmax ? log_of(sum) : A(0);
      const A inverse = A(1) / sum;
      T* out = f.out + offset;
#pragma unroll 4
      for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
        const A d = difference(static_cast<A>(in[i * step]), largest);
        out[i * step] = static_cast<T>(
            kind == Kind::kSoftmax ? share_of(exp_for<T>(d), sum, inverse) : d - log_sum);
      }
    }
  }
}

template <Kind kind, typename T>
__global__ void __launch_bounds__(kThreads) backward_lines_kernel(Backward<T> b) {
  using A = opmath_t<T>;
  __shared__ SharedValues<double> shared;
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
        part += gradient_term<kind>(static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]));
      }
      total += static_cast<double>(part);
    }
    const A sum = static_cast<A>(
        combine_lines(total, shared.get(), [](double& a, double other) { a += other; }));
    T* result = b.result + offset;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
      result[i * step] = static_cast<T>(gradient_value<kind, T>(
          static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]), sum, b.beta));
    }
  }
}

// ----------------------------------------------------------------- other lines, held in registers

constexpr int kHeld = 4;  // packs of a thread, of so many lines
template <typename T>
constexpr int kLinesOfPack = kPackSize<T> < 4 ? kPackSize<T> : 4;
constexpr int kFewestPacks = 4;
constexpr int64_t kColumnElements = kHeld * (kThreads / kFewestPacks);

// The first element of a pack's first line; inner is a multiple of n. 64-bit division is slow.
template <int n>
__device__ __forceinline__ int64_t column_offset(const SoftmaxGeometry& g, int64_t pack) {
  const int64_t packs = g.inner / n;
  const int64_t outer = ((pack | packs) >> 32) == 0
                            ? static_cast<uint32_t>(pack) / static_cast<uint32_t>(packs)
                            : pack / packs;
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

template <Kind kind, int n, typename T>
__global__ void __launch_bounds__(kThreads) forward_columns_kernel(Forward<T> f) {
  using A = opmath_t<T>;
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
    constexpr bool kPowers = kind == Kind::kSoftmax && std::is_same_v<T, A>;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (first + k * workers >= end) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A power = exp_for<T>(difference(static_cast<A>(held[k].values[j]), largest[j]));
        sums[j] += power;
        if constexpr (kPowers) held[k].values[j] = power;
      }
    }
    combine_columns<n>(sums, shared, [](A a, A b) { return a + b; });
    if (pack >= packs) continue;
    if constexpr (kind == Kind::kNll) {
      if (threadIdx.y > 0) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) write_loss(f, pack * n + j, in + j, largest[j], sums[j]);
    } else {
      T* out = f.out + offset;
      A terms[n];  // what every element of a line has to do with
#pragma unroll
      for (int j = 0; j < n; ++j) {
        terms[j] = kind == Kind::kSoftmax ? A(1) / sums[j] : log_of(sums[j]);
      }
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = first + k * workers;
        if (i >= end) continue;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          A v = static_cast<A>(held[k].values[j]);
          if constexpr (!kPowers) v = difference(v, largest[j]);
          if constexpr (kind == Kind::kSoftmax) {
            if constexpr (!kPowers) v = exp_for<T>(v);
            held[k].values[j] = static_cast<T>(share_of(v, sums[j], terms[j]));
          } else {
            held[k].values[j] = static_cast<T>(v - terms[j]);
          }
        }
        store_pack(out + i * step, held[k]);
      }
    }
  }
}

template <Kind kind, int n, typename T>
__global__ void __launch_bounds__(kThreads) backward_columns_kernel(Backward<T> b) {
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
        sums[j] += gradient_term<kind>(static_cast<A>(grads[k].values[j]),
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
        grads[k].values[j] = static_cast<T>(gradient_value<kind, T>(
            static_cast<A>(grads[k].values[j]), static_cast<A>(ys[k].values[j]), sums[j], b.beta));
      }
      store_pack(b.result + offset + i * step, grads[k]);
    }
  }
}

// ------------------------------------------------------------------------- gradient of the loss

// In the order of memory: the forward left the largest and the log of the sum. n elements a thread,
// n > 1 for rows (inner == 1), of which a pack may meet several; what remains after the packs is
// left to the first threads.
template <int n, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    nll_gradient_kernel(I count, I size, I inner, Differences<opmath_t<T>> difference,
                        LossGradient<T> grad_loss, const T* __restrict__ input,
                        const int64_t* __restrict__ target, const opmath_t<T>* __restrict__ largest,
                        const opmath_t<T>* __restrict__ log_sum, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  // The gradient of elements whose line and place along it are given, one line after the other.
  struct Line {
    A factor, largest, log_sum;
    int64_t target;
  };
  const auto line_at = [&](U line) {
    const int64_t t = target[line];
    A factor = difference.beta * grad_loss[line];
    if (t < 0 || t >= static_cast<int64_t>(size)) factor = std::numeric_limits<A>::quiet_NaN();
    return Line{factor, largest[line], log_sum[line], t};
  };
  const auto gradient = [&](const Line& line, U index, T x) {
    A value = line.factor * exp_for<T>(difference(static_cast<A>(x), line.largest) - line.log_sum);
    if (static_cast<int64_t>(index) == line.target) value -= line.factor;
    return static_cast<T>(value);
  };
  const auto one = [&](I i) {
    const U above = inner == 1 ? static_cast<U>(i) : static_cast<U>(i) / static_cast<U>(inner);
    const U outer = above / static_cast<U>(size);
    const U index = above - outer * static_cast<U>(size);  // along the line
    const U line =
        outer * static_cast<U>(inner) + (static_cast<U>(i) - above * static_cast<U>(inner));
    grad_input[i] = gradient(line_at(line), index, input[i]);
  };
  if constexpr (n == 1) {
    for (I i = first_item<I>(); i < count; i += item_stride<I>()) one(i);
  } else {
    const I packs = count / n;
    for (I pack = first_item<I>(); pack < packs; pack += item_stride<I>()) {
      const Pack<T, n> from = load_pack<n>(input + pack * n);
      Pack<T, n> to;
      U row = static_cast<U>(pack * n) / static_cast<U>(size);
      U index = static_cast<U>(pack * n) - row * static_cast<U>(size);
      Line line = line_at(row);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (index == static_cast<U>(size)) {
          index = 0;
          line = line_at(++row);
        }
        to.values[j] = gradient(line, index++, from.values[j]);
      }
      store_pack(grad_input + pack * n, to);
    }
    const I rest = packs * n + first_item<I>();
    if (rest < count) one(rest);
  }
}

// --------------------------------------------------------------------------------------- launches

// Which rows a block brings to shared memory: `tensors` of them at a time.
template <typename T>
bool takes_tile(const SoftmaxGeometry& g, int64_t tensors) {
  return g.size % kPackSize<T> != 0 &&
         g.size * kThreads * static_cast<int64_t>(sizeof(T)) * tensors <= kTileBytes;
}

// Calls body with the elements of a pack of rows of g.size elements that begin at these addresses.
template <typename T, typename F, typename... Pointers>
void dispatch_pack(int64_t size, F&& body, const Pointers*... pointers) {
  constexpr int n = kPackSize<T>;
  if (size % n == 0 && are_aligned(pointers...)) return body(Number<n>{});
  body(Number<1>{});
}

int whole_warps(int64_t threads) {
  return static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
}

// Calls warp(loads), block(loads, threads, parts) or stream(), the first that can hold a row; loads
// are the packs of n elements that a thread holds. block() says whether there are such clusters.
template <typename A, int n, int tensors, typename Warp, typename Block, typename Stream>
void dispatch_row(int64_t size, const Warp& warp, const Block& block, const Stream& stream) {
  // What 64 registers a thread are enough for; an element a load takes more of them, and so does
  // the exponential in float64.
  constexpr int kElements = (n == 1 ? 16 : 32) / tensors;
  constexpr int kLoads = (std::is_same_v<A, double> ? std::min(kElements / 2, 8) : kElements) / n;
  if (size <= 64 || (n == 1 && size <= 256)) return warp(Number<8 / n>{});
  if constexpr (n > 1) {
    if (size <= 512) return warp(Number<16 / n>{});
    if (size <= 32 * kWarp) return warp(Number<32 / n>{});
  }
  // Small blocks overlap: while one reduces, others read and write.
  const int64_t workers = ceil_div(ceil_div(size, n), kLoads);
  if (workers <= 2 * kThreads && block(Number<kLoads>{}, whole_warps(workers), 1)) return;
  for (int threads = kThreads; threads <= kWideBlock; threads *= 2) {
    for (int parts = 2; parts <= kMaxCluster; parts *= 2) {
      if (int64_t{threads} * parts < workers) continue;
      if (block(Number<kLoads>{}, threads, parts)) return;
    }
  }
  if (workers <= kWideBlock && block(Number<kLoads>{}, whole_warps(workers), 1)) return;
  stream();
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

template <Kind kind, typename T>
void launch_forward(const Launcher& launcher, const Forward<T>& f) {
  const int64_t rows = f.g.outer, size = f.g.size;
  // A loss is written by itself.
  const T* const out = kind == Kind::kNll ? f.in : f.out;
  if (f.g.inner != 1) {
    const int64_t lines = f.g.outer * f.g.inner;
    if (const int columns = columns_of_block<T>(f.g, f.in, out)) {
      constexpr int n = kLinesOfPack<T>;
      launcher.run(forward_columns_kernel<kind, n, T>, lines / n, columns, columns, f);
      return;
    }
    const int width = lines_of_block(f.g);
    launcher.run(forward_lines_kernel<kind, T>, lines, width, width, f);
    return;
  }
  if (takes_tile<T>(f.g, 1)) {
    // Many tiles for a block where there are many, so that it reads the next one meanwhile.
    constexpr int64_t kBlocks = 8192;
    const int64_t tiles = ceil_div(rows, kThreads);
    const int64_t blocks = ceil_div(tiles, ceil_div(tiles, kBlocks));
    const auto run = [&](auto* kernel) {
      launcher.run_blocks_with_shared(kernel, blocks, kThreads,
                                      2 * kThreads * size * static_cast<int64_t>(sizeof(T)), f,
                                      are_aligned(f.in, out));
    };
    if constexpr (!std::is_same_v<T, double>) {
      if (size == 10) return run(forward_tile_kernel<kind, 10, T>);
    }
    run(forward_tile_kernel<kind, 0, T>);
    return;
  }
  dispatch_pack<T>(
      size,
      [&](auto pack) {
        constexpr int n = decltype(pack)::value;
        dispatch_row<opmath_t<T>, n, 1>(
            size,
            [&](auto loads) {
              constexpr int kLoads = decltype(loads)::value;
              const int lanes = lanes_for(ceil_div(size, n * kLoads));
              launcher.run(forward_warp_kernel<kind, kLoads, n, T>, rows, kThreads / lanes,
                           kThreads, f, lanes);
            },
            [&](auto loads, int threads, int parts) {
              constexpr int kLoads = decltype(loads)::value;
              return launcher.run_clusters(forward_block_kernel<kind, kLoads, n, T>, rows, parts,
                                           threads, f, parts);
            },
            [&] { launcher.run_blocks(forward_stream_kernel<kind, n, T>, rows, kWideBlock, f); });
      },
      f.in, out);
}

template <Kind kind, typename T>
void launch_backward(const Launcher& launcher, const Backward<T>& b) {
  const int64_t rows = b.g.outer, size = b.g.size;
  const T* const result = b.result;
  if (b.g.inner != 1) {
    const int64_t lines = b.g.outer * b.g.inner;
    if (const int columns = columns_of_block<T>(b.g, b.grad, b.out, result)) {
      constexpr int n = kLinesOfPack<T>;
      launcher.run(backward_columns_kernel<kind, n, T>, lines / n, columns, columns, b);
      return;
    }
    const int width = lines_of_block(b.g);
    launcher.run(backward_lines_kernel<kind, T>, lines, width, width, b);
    return;
  }
  if (takes_tile<T>(b.g, 2)) {
    launcher.run(backward_tile_kernel<kind, T>, rows, kThreads, kThreads, b,
                 are_aligned(b.grad, b.out, result));
    return;
  }
  dispatch_pack<T>(
      size,
      [&](auto pack) {
        constexpr int n = decltype(pack)::value;
        dispatch_row<opmath_t<T>, n, 2>(
            size,
            [&](auto loads) {
              constexpr int kLoads = decltype(loads)::value;
              const int lanes = lanes_for(ceil_div(size, n * kLoads));
              launcher.run(backward_warp_kernel<kind, kLoads, n, T>, rows, kThreads / lanes,
                           kThreads, b, lanes);
            },
            [&](auto loads, int threads, int parts) {
              constexpr int kLoads = decltype(loads)::value;
              return launcher.run_clusters(backward_block_kernel<kind, kLoads, n, T>, rows, parts,
                                           threads, b, parts);
            },
            [&] { launcher.run_blocks(backward_stream_kernel<kind, n, T>, rows, kWideBlock, b); });
      },
      b.grad, b.out, result);
}

template <typename T>
void launch_nll_backward(const Launcher& launcher, const NllBackward<T>& b) {
  const int64_t count = b.g.outer * b.g.size * b.g.inner;
  const bool packs = b.g.inner == 1 && are_aligned(b.in, b.result);
  const auto run = [&](auto kernel, int64_t items, auto index) {
    using I = decltype(index);
    launcher.run_over(kernel, items, static_cast<I>(count), static_cast<I>(b.g.size),
                      static_cast<I>(b.g.inner), b.differences, b.grad, b.in, b.target, b.largest,
                      b.log_sum, b.result);
  };
  const auto launch = [&](auto index) {
    using I = decltype(index);
    constexpr int n = kPackSize<T>;
    if (packs) {
      run(nll_gradient_kernel<n, T, I>, ceil_div(count, n), index);
    } else {
      run(nll_gradient_kernel<1, T, I>, count, index);
    }
  };
  if (fits_32_bits(count)) {
    launch(int32_t{});
  } else {
    launch(int64_t{});
  }
}

// ------------------------------------------------------------------------------------- operators

struct Kernels {
  template <Kind kind, typename T>
  static void forward(const Tensor& tensor, const Forward<T>& f) {
    launch_forward<kind>(Launcher(tensor), f);
  }

  template <Kind kind, typename T>
  static void backward(const Tensor& tensor, const Backward<T>& b) {
    launch_backward<kind>(Launcher(tensor), b);
  }

  template <typename T>
  static void nll_backward(const Tensor& tensor, const NllBackward<T>& b) {
    launch_nll_backward(Launcher(tensor), b);
  }

  // To find out the host would have to wait for the device.
  static void check_targets(const char*, const Tensor&, int64_t) {}

  // By PyTorch's own kernel: the same bits every time.
  static Tensor reduced(const Tensor& losses, Reduction reduction) {
    namespace detail = torch::stable::detail;
    std::array<StableIValue, 2> stack{detail::from(losses), detail::from(std::nullopt)};
    const char* const op = reduction == Reduction::kMean ? "aten::mean" : "aten::sum";
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return detail::to<Tensor>(stack[0]);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  SoftmaxOperators<Kernels>::register_all(m);
}

}  // namespace mnist_ops::cuda
