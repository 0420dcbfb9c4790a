// Rows of softmax in registers.

#include "softmax_held.cuh"

#include <bit>

namespace mnist_ops::cuda {
namespace {

// What the warps of a block and the blocks of a cluster tell each other, in shared memory.
template <typename A>
struct Exchange {
  A largest[kWarp], sums[kWarp];
  A largest_of_blocks[kMaxCluster], sums_of_blocks[kMaxCluster];
};

// Of `count` parts, up to 32 of them, by a whole warp. A part of -inf alone counts for 0.
template <typename A>
__device__ __forceinline__ Part<A> merged(const A* largest, const A* sums, int count,
                                          const Differences<A>& difference) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const A mine = lane < count ? largest[lane] : -std::numeric_limits<A>::infinity();
  const A whole = lane_max(mine, kWarp);
  const A share = mine == whole ? A(1) : std::exp(difference.of_scaled(mine, whole));
  return {whole, lane_sum(lane < count ? sums[lane] * share : A(0), kWarp)};
}

// The threads of `parts` blocks, of which this one is the part-th. The barriers of a cluster are in
// two halves: cluster_arrive() was called last, by begin() or by the row before this one.
template <typename A, bool one_class>
struct Blocks {
  static constexpr bool kParts = true, kWhole = false, kOneClass = one_class;
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

  __device__ __forceinline__ void largest(A (&values)[1]) const {
    values[0] = lane_max(values[0], kWarp);
  }
  __device__ __forceinline__ Part<A> merge(const Part<A>& mine,
                                           const Differences<A>& difference) const {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
    const A sum = lane_sum(mine.sum, kWarp);
    __syncthreads();  // whoever read shared before is done
    if (thread % kWarp == 0) shared.largest[warp] = mine.largest, shared.sums[warp] = sum;
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    Part<A> whole = merged(shared.largest, shared.sums, warps, difference);
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
  __device__ __forceinline__ void sum(A (&values)[1]) const {
    values[0] = merge({A(0), values[0]}, Differences<A>(1)).sum;  // of equal bases
  }
};

// Blocks of a multiprocessor at least. What holds 32 elements a thread needs more registers.
template <int elements, typename Arguments>
constexpr int kResident =
    !Arguments::kIsForward || sizeof(typename Arguments::A) == 8 ? 1
    : sizeof(typename Arguments::Element) == 4 || elements > 16  ? 4
                                                                 : kMostResident;

template <Kind kind, int kLoads, int n, typename Arguments>
__global__ void __launch_bounds__(kThreads, kResident<kLoads * n, Arguments>)
    warp_kernel(Kind given, Arguments a, int shift) {
  // Rows for which a thread holds this much have a whole warp.
  const int lanes = kLoads * n > 16 ? kWarp : 1 << shift;
  const int64_t per_block = kThreads / lanes;
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = blockIdx.x * per_block; base < a.g.outer; base += gridDim.x * per_block) {
    const int64_t row = base + (threadIdx.x >> shift);
    compute_held<kind, kLoads, n, 1>(
        given, a, place_of_row(static_cast<int>(a.g.size), row, a.g.outer), Lanes<true>{lanes});
  }
}

constexpr int kMostThreads = 1024;  // of a block

// `parts` neighbouring blocks, a cluster, take a row.
template <Kind kind, int kLoads, int n, typename Arguments>
__global__ void __launch_bounds__(kMostThreads) block_kernel(Kind given, Arguments a, int parts) {
  using A = typename Arguments::A;
  auto& shared = *reinterpret_cast<Exchange<A>*>(dynamic_shared_memory());
  const Blocks<A, (n > 1)> group{shared, static_cast<int>(blockIdx.x) % parts, parts};
  group.begin();
  // Rows of hundreds of elements: memory has none for 2^31 of them, and an int is one register.
  const int rows = static_cast<int>(a.g.outer), step = static_cast<int>(gridDim.x) / parts;
  for (int row = static_cast<int>(blockIdx.x) / parts; row < rows; row += step) {
    compute_held<kind, kLoads, n, 1>(given, a, place_of_row(static_cast<int>(a.g.size), row, rows),
                                     group);
  }
  group.end();
}

// --------------------------------------------------------------------------------------- launches

int whole_warps(int64_t threads) {
  return static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
}

// Rows of packs of n elements: the first way that can hold a row.
template <int n, typename Arguments>
void launch(const Launcher& launcher, Kind given, const Arguments& a) {
  using A = typename Arguments::A;
  // What 64 registers a thread are enough for; an element a load takes more of them, and so does
  // the exponential in float64.
  constexpr int kElements = (n == 1 ? 16 : 32) / (Arguments::kIsForward ? 1 : 2);
  constexpr int kLoads = (std::is_same_v<A, double> ? std::min(kElements / 2, 8) : kElements) / n;
  const int64_t rows = a.g.outer, size = a.g.size, workers = ceil_div(size, n * kLoads);
  dispatch_kind<Arguments, n == 1>(given, [&](auto tag) {
    constexpr Kind kind = decltype(tag)::value;
    if constexpr (n > 1) {
      const auto warp = [&](auto loads) {
        constexpr int kHeld = decltype(loads)::value / n;
        const int lanes = lanes_for(ceil_div(size, n * kHeld));
        launcher.run(warp_kernel<kind, kHeld, n, Arguments>, rows, kThreads / lanes, kThreads,
                     given, a, std::countr_zero(static_cast<unsigned>(lanes)));
      };
      if (size <= 16 * kWarp) return warp(Number<16>{});
      // As many in float64 are more than registers.
      if constexpr (sizeof(A) == 4) {
        if (size <= 32 * kWarp) return warp(Number<32>{});
      }
    }
    // False where there are no such clusters.
    const auto block = [&](int64_t threads, int parts) {
      return launcher.run_clusters(block_kernel<kind, kLoads, n, Arguments>, rows, parts,
                                   whole_warps(threads), sizeof(Exchange<A>), given, a, parts);
    };
    if (workers <= kMostThreads && block(workers, 1)) return;
    // A loss alone needs no second look at the row: the largest ones are read by one block each.
    if (given == Kind::kNll && workers > 4 * kMostThreads)
      return launch_long<n>(launcher, given, a);
    for (int threads = kThreads; threads <= kMostThreads; threads *= 2) {
      for (int parts = 2; parts <= kMaxCluster; parts *= 2) {
        if (int64_t{threads} * parts >= workers && block(threads, parts)) return;
      }
    }
    launch_long<n>(launcher, given, a);
  });
}

}  // namespace

template <typename Arguments>
void launch_rows(const Launcher& launcher, Kind kind, const Arguments& a) {
  constexpr int n = kPackSize<typename Arguments::Element>;
  return has_packs(kind, a) ? launch<n>(launcher, kind, a) : launch<1>(launcher, kind, a);
}

#define MNIST_OPS_SOFTMAX(T)                                                       \
  template void launch_rows<Forward<T>>(const Launcher&, Kind, const Forward<T>&); \
  template void launch_rows<Backward<T>>(const Launcher&, Kind, const Backward<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
