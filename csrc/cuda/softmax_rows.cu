// Rows of softmax in registers, and very long ones.

#include "softmax.cuh"

namespace mnist_ops::cuda {
namespace {

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

  // Calls body with every value, by reference, and its place in the row.
  template <typename F>
  __device__ __forceinline__ void each_at(int worker, int workers, const F& body) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int j = 0; j < n; ++j) body(values[k][j], (worker + k * workers) * n + j);
    }
  }

  // The same without the place.
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

// The threads that share a row: `lanes` neighbouring ones of a warp.
struct Lanes {
  static constexpr bool kBeyondWarp = false;
  int lanes;

  __device__ __forceinline__ int worker() const { return static_cast<int>(threadIdx.x) % lanes; }
  __device__ __forceinline__ int workers() const { return lanes; }

  template <typename A>
  __device__ __forceinline__ Partial<A> merge(const Partial<A>& part, const Differences<A>&) const {
    return part;  // it is of all lanes
  }
  template <typename A>
  __device__ __forceinline__ A sum(A value) const {
    return lane_sum(value, lanes);
  }
};

// Those of `parts` blocks, of which this one is the part-th. The barriers of a cluster are in two
// halves: cluster_arrive() was called last, by begin() or by the row before this one.
template <typename A>
struct Blocks {
  static constexpr bool kBeyondWarp = true;
  static constexpr int lanes = kWarp;
  Exchange<A>& shared;
  int part, parts;

  __device__ __forceinline__ void begin() const {
    if (parts > 1) cluster_arrive();
  }
  __device__ __forceinline__ void end() const {
    if (parts > 1) cluster_wait();
  }

  __device__ __forceinline__ int worker() const {
    return part * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ int workers() const { return parts * static_cast<int>(blockDim.x); }

  // What the warps found, for all threads.
  __device__ __forceinline__ Partial<A> merge(const Partial<A>& of_warp,
                                              const Differences<A>& difference) const {
    return together(
        [&](int i) { shared.largest[i] = of_warp.largest, shared.sums[i] = of_warp.sum; },
        [&](int count) { return merged(shared.largest, shared.sums, count, difference); },
        [&](const Partial<A>& of_block, int block) {
          cluster_peer(shared.largest_of_blocks, block)[part] = of_block.largest;
          cluster_peer(shared.sums_of_blocks, block)[part] = of_block.sum;
        },
        [&] { return merged(shared.largest_of_blocks, shared.sums_of_blocks, parts, difference); });
  }
  __device__ __forceinline__ A sum(A value) const {
    value = lane_sum(value, kWarp);
    return together(
        [&](int i) { shared.sums[i] = value; },
        [&](int count) { return merged(shared.sums, count); },
        [&](A of_block, int block) { cluster_peer(shared.sums_of_blocks, block)[part] = of_block; },
        [&] { return merged(shared.sums_of_blocks, parts); });
  }

 private:
  // leave(i) for the i-th warp, of_warps(count) what they left; tell(that, block) for the other
  // blocks, of_blocks() what they told.
  template <typename Leave, typename OfWarps, typename Tell, typename OfBlocks>
  __device__ __forceinline__ auto together(const Leave& leave, const OfWarps& of_warps,
                                           const Tell& tell, const OfBlocks& of_blocks) const {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();  // whoever read shared before is done
    if (thread % kWarp == 0) leave(thread / kWarp);
    __syncthreads();
    auto whole = of_warps(static_cast<int>(blockDim.x) / kWarp);
    if (parts > 1) {
      cluster_wait();  // all of them are there and have read what came before
      if (thread < parts) tell(whole, thread);
      cluster_arrive();
      cluster_wait();
      whole = of_blocks();
      cluster_arrive();
    }
    return whole;
  }
};

// The forward on what a thread holds of a row, which its group shares.
template <int kLoads, int n, typename T, typename Group>
__device__ __forceinline__ void compute_row(Kind kind, const Forward<T>& f, int64_t row,
                                            bool inside, const Group& group) {
  using A = opmath_t<T>;
  const int size = static_cast<int>(f.g.size);
  const int64_t first_at = row * size;
  constexpr A kMissing = -std::numeric_limits<A>::infinity();
  const Differences<A>& difference = f.differences;
  const int worker = group.worker(), workers = group.workers();
  HeldRow<kLoads, n, T> held;
  held.load(f.in + first_at, inside ? size : 0, worker, workers, difference.scale, kMissing);
  A largest = kMissing;
  held.each([&](A& v) { largest = v > largest ? v : largest; });
  largest = lane_max(largest, group.lanes);
  const A base = largest == kMissing ? A(0) : largest;  // exp(-inf) is 0, exp(-inf + inf) is not
  A sum = A(0);
  held.each([&](A& v) {
    const A power = exp_for<T>(difference.of_scaled(v, base));
    sum += power;
    if (keeps_powers(kind)) v = power;
  });
  Partial<A> whole = group.merge(Partial<A>{largest, lane_sum(sum, group.lanes)}, difference);
  whole.finish();
  const bool has_target = kind == Kind::kNll || kind == Kind::kNllGradient;
  if (!inside && !has_target) return;  // the others meet where classes are added up
  const int64_t line = inside ? row : 0, offset = inside ? first_at : 0;
  const auto sum_classes =
      over_classes<A>(inside ? size : 0, worker, workers, [&](A v) { return group.sum(v); });
  if (kind == Kind::kNll) {
    const A loss =
        f.target_of(line, offset)
            .loss(difference, f.in + offset, whole.largest, log_of(whole.sum), sum_classes);
    if (inside && worker == 0) f.out[row] = static_cast<T>(loss);
  } else {
    if (kind == Kind::kLogSoftmax) {
      const A log_sum = log_of(whole.sum);
      held.each([&](A& v) { v = difference.of_scaled(v, whole.largest) - log_sum; });
    } else {
      A correction = A(1);
      if (Group::kBeyondWarp && largest != whole.largest) {
        correction = std::exp(difference.of_scaled(largest, whole.largest));
      }
      const A inverse = correction / whole.sum;
      held.each([&](A& v) {
        v = share_of(v * (std::is_same_v<A, double> ? correction : A(1)), whole.sum, inverse);
      });
      if (kind == Kind::kNllGradient) {
        const LineGradient<T> gradient = f.gradient_of(line, offset, sum_classes);
        held.each_at(worker, workers, [&](A& v, int i) {
          if (i < size) v = gradient(v, i);
        });
      }
    }
    if (!has_target || inside) held.store(f.out + first_at, size, worker, workers);
  }
}

template <int kLoads, int n, typename T, typename Group>
__device__ __forceinline__ void compute_row(Kind kind, const Backward<T>& b, int64_t row,
                                            bool inside, const Group& group) {
  using A = opmath_t<T>;
  const int size = static_cast<int>(b.g.size);
  const int64_t first = row * size;
  const int worker = group.worker(), workers = group.workers();
  HeldRow<kLoads, n, T> grads, ys;
  grads.load(b.grad + first, inside ? size : 0, worker, workers, A(1), A(0));
  ys.load(b.out + first, inside ? size : 0, worker, workers, A(1), A(0));
  A sum = A(0);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) sum += gradient_term(kind, grads.values[k][j], ys.values[k][j]);
  }
  sum = group.sum(sum);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A& grad = grads.values[k][j];
      grad = gradient_value<T>(kind, grad, ys.values[k][j], sum, b.beta);
    }
  }
  if (inside) grads.store(b.result + first, size, worker, workers);
}

// How many blocks should fit on a multiprocessor: registers are more than a thread needs otherwise,
// and it is the number of warps that hides the time of a row's steps. (7.5 holds 4 of them at
// most.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostResident = 4;
#else
constexpr int kMostResident = 5;
#endif
template <int kind, int kLoads, int n, typename Arguments>
constexpr int kResident = 1;
// A softmax of 32 elements a thread keeps its powers, too; a gradient needs its target beside them.
template <int kind, int kLoads, int n, typename T>
constexpr int kResident<kind, kLoads, n, Forward<T>> =
    kind == static_cast<int>(Kind::kNllGradient)                  ? sizeof(T) == 8 ? 1 : 3
    : sizeof(T) == 8                                              ? 2
    : sizeof(T) == 4 || n == 1                                    ? 4
    : kind == static_cast<int>(Kind::kSoftmax) && kLoads * n > 16 ? 4
                                                                  : kMostResident;

template <int kind, int kLoads, int n, typename Arguments>
__global__ void __launch_bounds__(kThreads, kResident<kind, kLoads, n, Arguments>)
    warp_kernel(Kind given, Arguments a, int lanes) {
  const int64_t per_block = kThreads / lanes;
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = blockIdx.x * per_block; base < a.g.outer; base += gridDim.x * per_block) {
    const int64_t row = base + threadIdx.x / static_cast<unsigned>(lanes);
    compute_row<kLoads, n>(kind_of<kind>(given), a, row, row < a.g.outer, Lanes{lanes});
  }
}

constexpr int kWideBlock = 1024;  // threads of a block at most, and of one that streams

// `parts` neighbouring blocks, a cluster, take a row.
template <int kind, int kLoads, int n, typename Arguments>
__global__ void __launch_bounds__(kWideBlock) block_kernel(Kind given, Arguments a, int parts) {
  using A = typename Arguments::A;
  auto& shared = *reinterpret_cast<Exchange<A>*>(dynamic_shared_memory());
  const Blocks<A> group{shared, static_cast<int>(blockIdx.x) % parts, parts};
  group.begin();
  // Rows of hundreds of elements: memory has none for 2^31 of them, and an int is one register.
  const int rows = static_cast<int>(a.g.outer), step = static_cast<int>(gridDim.x) / parts;
  for (int row = static_cast<int>(blockIdx.x) / parts; row < rows; row += step) {
    compute_row<kLoads, n>(kind_of<kind>(given), a, row, true, group);
  }
  group.end();
}

// ------------------------------------------------------------------------------ very long rows

// Wide blocks, so that few rows are under way and L2 holds them.

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

template <int n, typename T>
__global__ void __launch_bounds__(kWideBlock) forward_stream_kernel(Kind kind, Forward<T> f) {
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
    const auto sum_classes = over_classes<A>(size, threadIdx.x, kWideBlock, [&](A v) {
      return block_sum<kWideBlock>(v, shared.template as<A>());
    });
    if (kind == Kind::kNll) {
      const A loss =
          f.target_of(row, row * size).loss(difference, first, largest, log_of(sum), sum_classes);
      if (threadIdx.x == 0) f.out[row] = static_cast<T>(loss);
    } else {
      const bool is_gradient = kind == Kind::kNllGradient;
      LineGradient<T> gradient;
      if (is_gradient) gradient = f.gradient_of(row, row * size, sum_classes);
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
            const A y = keeps_powers(kind) ? share_of(exp_for<T>(d), sum, inverse) : d - log_sum;
            to.values[j] = static_cast<T>(is_gradient && i < size ? gradient(y, i + j) : y);
          }
          if (i < size) store_pack(out + i, to);
        }
      });
    }
  }
}

template <int n, typename T>
__global__ void __launch_bounds__(kWideBlock) backward_stream_kernel(Kind kind, Backward<T> b) {
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
          part += gradient_term(kind, static_cast<A>(gs.values[j]), static_cast<A>(ys.values[j]));
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
          to.values[j] = static_cast<T>(gradient_value<T>(
              kind, static_cast<A>(gs.values[j]), static_cast<A>(ys.values[j]), sum, b.beta));
        }
        store_pack(result + i, to);
      }
    });
  }
}

// --------------------------------------------------------------------------------------- launches

// Calls body with the elements of a pack of rows of g.size elements that begin at these addresses.
template <typename T, typename F, typename... Pointers>
void dispatch_pack(int64_t size, F&& body, const Pointers*... pointers) {
  constexpr int n = kPackSize<T>;
  if (size % n == 0 && are_aligned(pointers...)) return body(Number<n>{});
  body(Number<1>{});
}

// Calls body with the kind for rows in packs, of which each kind has kernels of its own; the loss
// and its gradient have some forward only.
template <int n, bool forward, typename F>
void dispatch_kind(Kind kind, const F& body) {
  if constexpr (n == 1) {
    body(Number<kAnyKind>{});
  } else if (kind == Kind::kSoftmax) {
    body(Number<static_cast<int>(Kind::kSoftmax)>{});
  } else if (kind == Kind::kLogSoftmax) {
    body(Number<static_cast<int>(Kind::kLogSoftmax)>{});
  } else if constexpr (forward) {
    if (kind == Kind::kNll) return body(Number<static_cast<int>(Kind::kNll)>{});
    body(Number<static_cast<int>(Kind::kNllGradient)>{});
  }
}

int whole_warps(int64_t threads) {
  return static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
}

// Calls warp(loads), block(loads, threads, parts) or longer(), the first that can hold a row; loads
// are the packs of n elements that a thread holds. block() says whether there are such clusters.
template <typename A, int n, int tensors, typename Warp, typename Block, typename Longer>
void dispatch_row(int64_t size, const Warp& warp, const Block& block, const Longer& longer) {
  // What 64 registers a thread are enough for; an element a load takes more of them, and so does
  // the exponential in float64.
  constexpr int kElements = (n == 1 ? 16 : 32) / tensors;
  constexpr int kLoads = (std::is_same_v<A, double> ? std::min(kElements / 2, 8) : kElements) / n;
  if (size <= (n == 1 ? 8 : 16) * kWarp) return warp(Number<n == 1 ? 8 : 16 / n>{});
  if constexpr (n > 1) {
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
  longer();
}

// Rows that nobody can hold.
template <int n, typename T>
void launch_longer(const Launcher& launcher, Kind kind, const Forward<T>& f) {
  if constexpr (n == 1) {
    forward_lines(launcher, kind, f);
  } else {
    launcher.run_blocks(forward_stream_kernel<n, T>, f.g.outer, kWideBlock, kind, f);
  }
}
template <int n, typename T>
void launch_longer(const Launcher& launcher, Kind kind, const Backward<T>& b) {
  if constexpr (n == 1) {
    backward_lines(launcher, kind, b);
  } else {
    launcher.run_blocks(backward_stream_kernel<n, T>, b.g.outer, kWideBlock, kind, b);
  }
}

// Rows in packs of n elements, of `tensors` tensors that are held at once.
template <int n, int tensors, typename Arguments>
void launch_rows(const Launcher& launcher, Kind given, const Arguments& a) {
  const int64_t rows = a.g.outer, size = a.g.size;
  dispatch_row<typename Arguments::A, n, tensors>(
      size,
      [&](auto loads) {
        constexpr int kLoads = decltype(loads)::value;
        const int lanes = lanes_for(ceil_div(size, n * kLoads));
        dispatch_kind<n, tensors == 1>(given, [&](auto number) {
          launcher.run(warp_kernel<decltype(number)::value, kLoads, n, Arguments>, rows,
                       kThreads / lanes, kThreads, given, a, lanes);
        });
      },
      [&](auto loads, int threads, int parts) {
        bool done = false;
        dispatch_kind<n, tensors == 1>(given, [&](auto number) {
          done = launcher.run_clusters(
              block_kernel<decltype(number)::value, decltype(loads)::value, n, Arguments>, rows,
              parts, threads, sizeof(Exchange<typename Arguments::A>), given, a, parts);
        });
        return done;
      },
      [&] { launch_longer<n>(launcher, given, a); });
}

}  // namespace

template <typename T>
void forward_rows(const Launcher& launcher, Kind kind, const Forward<T>& f) {
  // A loss is written by itself.
  dispatch_pack<T>(
      f.g.size, [&](auto pack) { launch_rows<decltype(pack)::value, 1>(launcher, kind, f); }, f.in,
      kind == Kind::kNll ? f.in : f.out);
}

template <typename T>
void backward_rows(const Launcher& launcher, Kind kind, const Backward<T>& b) {
  const T* const result = b.result;
  dispatch_pack<T>(
      b.g.size, [&](auto pack) { launch_rows<decltype(pack)::value, 2>(launcher, kind, b); },
      b.grad, b.out, result);
}

#define MNIST_OPS_SOFTMAX(T)                                               \
  template void forward_rows<T>(const Launcher&, Kind, const Forward<T>&); \
  template void backward_rows<T>(const Launcher&, Kind, const Backward<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
