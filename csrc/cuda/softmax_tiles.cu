// Short rows of softmax, by way of shared memory.

#include "softmax_held.cuh"

namespace mnist_ops::cuda {
namespace {

// Between count neighbouring elements in shared memory and in global memory, by a whole block.
// begin_tile() does not wait: the elements are there for a thread after copy_async_wait(), for all
// of them after a barrier.
template <typename T>
__device__ __forceinline__ void begin_tile(const T* from, T* to, int count, bool aligned) {
  constexpr int n = kPackSize<T>;
  const int packs = aligned ? count / n : 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    copy_pack<n>(to + i * n, from + i * n);
  }
  for (int i = packs * n + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}
template <typename T>
__device__ __forceinline__ void end_tile(const T* from, T* to, int count, bool aligned) {
  constexpr int n = kPackSize<T>;
  const int packs = aligned ? count / n : 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    store_pack(to + i * n, load_pack<n>(from + i * n));
  }
  for (int i = packs * n + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

constexpr int kTileLoads = 8;  // elements of a thread
static_assert(kTileLoads * kWarp == kMostShortRow);

// Rows of any size, or with n = 2 of kLoads * n elements, a thread each. The next rows are on their
// way meanwhile. Rows follow each other in shared memory as they do outside: sizes that are no
// multiple of a pack put the threads of a warp on different banks, or on few equal ones.
template <int compiled, int kLoads, int n, typename Arguments>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(Kind given, Arguments a, int given_lanes, bool aligned) {
  using T = typename Arguments::Element;
  using A = typename Arguments::A;
  constexpr bool kForward = kIsForward<Arguments>;
  const Kind kind = kind_of<compiled>(given);
  const Lanes group{n > 1 ? 1 : given_lanes};
  const int size = n > 1 ? kLoads * n : static_cast<int>(a.g.size);
  const int rows = kThreads / group.lanes, room = rows * size;  // of a tile
  const int mine = static_cast<int>(threadIdx.x) / group.lanes;
  const auto elements_from = [&](int64_t base) {
    const int64_t left = a.g.outer - base;
    return size * static_cast<int>(left < 0 ? 0 : left < rows ? left : rows);
  };
  const auto begin = [&](int64_t base, T* to) {
    const int count = elements_from(base);
    Known<A> known;
    if constexpr (kForward) {
      begin_tile(a.in + base * size, to, count, aligned);
      if (base + mine < a.g.outer) known = known_of(kind, a, base + mine);
    } else {
      begin_tile(a.grad + base * size, to, count, aligned);
      begin_tile(a.out + base * size, to + room, count, aligned);
    }
    copy_async_commit();
    return known;
  };
  LossSum losses{0, 0};
  T* tile = reinterpret_cast<T*>(dynamic_shared_memory());
  T* next_tile = tile + (kForward ? room : 2 * room);
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  int64_t base = static_cast<int64_t>(blockIdx.x) * rows;
  Known<A> next = begin(base, tile);
  for (; base < a.g.outer; base += step) {
    const Known<A> known = next;
    next = begin(base + step, next_tile);
    copy_async_wait<1>();  // for all but the next tile
    __syncthreads();
    const Place place = place_of_row(size, base + mine, a.g.outer);
    T *const x = tile + mine * size, *to = nullptr;
    if constexpr (kForward) {
      to = kind == Kind::kNll ? nullptr : a.out;
      forward_held<kLoads, n, 1>(kind, a, x, x, place, group, [&](int) { return known; }, losses);
    } else {
      to = a.result;
      backward_held<kLoads, n, 1>(kind, a, x, x + room, x, place, group);
    }
    __syncthreads();
    if (to != nullptr) {
      end_tile<T>(tile, to + base * size, elements_from(base), aligned);
      __syncthreads();
    }
    T* const free_tile = tile;
    tile = next_tile;
    next_tile = free_tile;
  }
  if constexpr (kForward) {
    if (a.sums == nullptr) return;
    __shared__ double shared[kThreads / kWarp];
    losses.losses = block_sum<kThreads>(losses.losses, shared);
    losses.divisor = block_sum<kThreads>(losses.divisor, shared);
    if (threadIdx.x == 0) write_sum(a, losses);
  }
}

// Rows of the reports' 10 classes have kernels of their own, but for float64: a thread takes one.
template <typename Arguments>
constexpr bool kHasTen =
    kIsForward<Arguments> && !std::is_same_v<typename Arguments::Element, double>;
template <typename Arguments>
int lanes_of_row(const SoftmaxGeometry& g) {
  return kHasTen<Arguments> && g.size == 10 ? 1 : lanes_for(ceil_div(g.size, kTileLoads));
}

// Many tiles for a block where there are many, so that it reads the next one meanwhile. Blocks
// whose losses are to be added up are no more than two of the last kernel's threads can be.
int64_t blocks_for(int64_t rows, int lanes, bool sums) {
  const int64_t tiles = ceil_div(rows, kThreads / lanes), blocks = sums ? 2048 : 8192;
  return tiles == 0 ? 0 : ceil_div(tiles, ceil_div(tiles, blocks));
}

}  // namespace

template <typename Arguments>
void launch_tiles(const Launcher& launcher, Kind kind, const Arguments& a) {
  using T = typename Arguments::Element;
  constexpr bool kForward = kIsForward<Arguments>;
  bool sums = false;
  if constexpr (kForward) sums = a.sums != nullptr;
  const int lanes = lanes_of_row<Arguments>(a.g);
  const int64_t tile_bytes = kThreads / lanes * a.g.size * static_cast<int64_t>(sizeof(T));
  const auto run = [&](auto* kernel) {
    launcher.run_blocks_with_shared(kernel, blocks_for(a.g.outer, lanes, sums), kThreads,
                                    (kForward ? 2 : 4) * tile_bytes, kind, a, lanes,
                                    has_aligned_packs(kind, a));
  };
  if constexpr (kHasTen<Arguments>) {
    if (a.g.size == 10) {
      return dispatch_kind<Arguments>(
          kind, [&](auto number) { run(tile_kernel<decltype(number)::value, 5, 2, Arguments>); });
    }
  }
  run(tile_kernel<kAnyKind, kTileLoads, 1, Arguments>);
}

template <typename Arguments>
int64_t blocks_of_tiles(const SoftmaxGeometry& g) {
  return blocks_for(g.outer, lanes_of_row<Arguments>(g), true);
}

#define MNIST_OPS_SOFTMAX(T)                                                          \
  template void launch_tiles<Forward<T>>(const Launcher&, Kind, const Forward<T>&);   \
  template void launch_tiles<Backward<T>>(const Launcher&, Kind, const Backward<T>&); \
  template int64_t blocks_of_tiles<Forward<T>>(const SoftmaxGeometry&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
