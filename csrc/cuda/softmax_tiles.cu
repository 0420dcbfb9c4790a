// Short rows of softmax, by way of shared memory.

#include "softmax_held.cuh"

#include <utility>

namespace mnist_ops::cuda {
namespace {

template <int... numbers, typename F>
__device__ __forceinline__ void for_each_number(std::integer_sequence<int, numbers...>,
                                                const F& body) {
  (body(Number<numbers>{}), ...);
}

// Between count neighbouring elements in shared memory and in global memory, by a whole block.
// begin_tile() does not wait: the elements are there for a thread after wait_for_copies(), for all
// of them after a barrier. `whole` aligned elements, where it is not 0, are few instructions.
template <int whole, typename T, typename F>
__device__ __forceinline__ void each_pack(int count, bool aligned, const F& body) {
  constexpr int n = kPackSize<T>, kTurn = kThreads * n, kTurns = whole / kTurn;
  static_assert(whole % n == 0);
  const int thread = static_cast<int>(threadIdx.x);
  if (whole > 0 && aligned && count == whole) {
    for_each_number(std::make_integer_sequence<int, kTurns>{}, [&](auto k) {
      body(Number<n>{}, thread * n, Number<decltype(k)::value * kTurn>{});
    });
    if (thread * n < whole % kTurn) body(Number<n>{}, thread * n, Number<kTurns * kTurn>{});
    return;
  }
  const int packs = aligned ? count / n : 0;
#pragma unroll(whole > 0 ? 1 : 4)
  for (int i = thread; i < packs; i += kThreads) body(Number<n>{}, i * n, Number<0>{});
#pragma unroll(whole > 0 ? 1 : 4)
  for (int i = packs * n + thread; i < count; i += kThreads) body(Number<1>{}, i, Number<0>{});
}
template <int whole = 0, typename T>
__device__ __forceinline__ void begin_tile(const T* from, T* to, int count, bool aligned) {
  each_pack<whole, T>(count, aligned, [&](auto number, int i, auto further) {
    constexpr int n = decltype(number)::value;
    if constexpr (n > 1) {
      copy_pack<n, decltype(further)::value>(to + i, from + i);
    } else {
      to[i] = from[i];
    }
  });
}
template <int whole = 0, typename T>
__device__ __forceinline__ void end_tile(const T* from, T* to, int count, bool aligned) {
  each_pack<whole, T>(count, aligned, [&](auto number, int i, auto further) {
    constexpr int n = decltype(number)::value;
    i += decltype(further)::value;
    store_pack(to + i, load_pack<n>(from + i));
  });
}

// Where the losses of a thread go: in twos, so that fewer become float64. Of a gradient there are
// none.
template <typename Arguments>
struct Losses {
  using A = typename Arguments::A;
  const Arguments& f;
  LossSum sum = {0, 0};
  A loss = A(0), divisor = A(0);

  __device__ __forceinline__ void add(int64_t line, A of_line, A its_divisor) {
    if (f.sums == nullptr) {
      f.out[line] = static_cast<typename Arguments::Element>(of_line);
    } else {
      loss += of_line;
      divisor += its_divisor;
    }
  }
  __device__ __forceinline__ void end_turn() {
    sum.losses += static_cast<double>(loss);
    sum.divisor += static_cast<double>(divisor);
    loss = divisor = A(0);
  }
  // The sum of a block.
  __device__ __forceinline__ void write() {
    if (f.sums == nullptr) return;
    __shared__ double shared[kThreads / kWarp];
    sum.losses = block_sum<kThreads>(sum.losses, shared);
    sum.divisor = block_sum<kThreads>(sum.divisor, shared);
    if (threadIdx.x == 0) write_sum(f, sum);
  }
};

constexpr int kTileLoads = 8;  // elements of a thread
static_assert(kTileLoads * kWarp == kMostShortRow);

// Rows of the reports' 10 classes, forward, have kernels of their own, but for float64 and where
// targets are not one class: a thread takes rows alone.
constexpr int kClasses = 10;
template <typename Arguments>
bool has_kernel(Kind kind, const Arguments& a) {
  return Arguments::kIsForward && sizeof(typename Arguments::A) == 4 && a.g.size == kClasses &&
         has_one_class(kind, a);
}
template <typename T>
constexpr int kRowsAlone = sizeof(T) == 2 ? 2 : 1;  // of half types more bytes are on their way so

// Blocks of a multiprocessor at least.
template <int size, typename Arguments>
constexpr int kTileBlocks = size > 0                             ? kMostResident
                            : !Arguments::kIsForward             ? 0
                            : sizeof(typename Arguments::A) == 8 ? 2
                                                                 : 3;

// Rows of any size, or of kSize elements, an even number of them, with threads that have a row
// alone. The next rows are on their way meanwhile. Rows follow each other in shared memory as they
// do outside: sizes that are no multiple of a pack put the threads of a warp on different banks, or
// on few equal ones.
template <Kind compiled, int kSize, typename Arguments>
__global__ void __launch_bounds__(kThreads, kTileBlocks<kSize, Arguments>)
    tile_kernel(Kind given, Arguments a, int lanes_of_row, bool aligned) {
  using T = typename Arguments::Element;
  using A = typename Arguments::A;
  constexpr bool kForward = Arguments::kIsForward, kAlone = kSize > 0;
  constexpr int kTurns = kAlone ? kRowsAlone<T> : 1, kWhole = kTurns * kThreads * kSize;
  const Kind kind = kind_of<compiled>(given);
  const int size = kAlone ? kSize : static_cast<int>(a.g.size), lanes = kAlone ? 1 : lanes_of_row;
  const int rows_of_turn = kThreads / lanes, rows_of_tile = kTurns * rows_of_turn;
  const int room = rows_of_tile * size;
  const int mine = static_cast<int>(threadIdx.x) / lanes;
  const auto rows_from = [&](int64_t base) {
    const int64_t left = a.g.outer - base;
    return static_cast<int>(left < 0 ? 0 : left < rows_of_tile ? left : rows_of_tile);
  };
  A beta_g = A(0);
  if constexpr (kForward) beta_g = beta_g_of(kind, a, 0);
  T* const shared = reinterpret_cast<T*>(dynamic_shared_memory());
  Known<A> next[kTurns];
  const auto begin = [&](int64_t base, T* to) {
    const int rows = rows_from(base);
    if constexpr (kForward) {
      begin_tile<kWhole>(a.in + base * size, to, rows * size, aligned);
#pragma unroll
      for (int k = 0; k < kTurns; ++k) {
        const int row = k * rows_of_turn + mine;
        if (row < rows) next[k] = known_of(kind, a, base + row, &beta_g);
      }
    } else {
      begin_tile(a.grad + base * size, to, rows * size, aligned);
      begin_tile(a.y + base * size, to + room, rows * size, aligned);
    }
  };
  Losses<Arguments> losses{a};
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_of_tile;
  int64_t base = static_cast<int64_t>(blockIdx.x) * rows_of_tile;
  T *here = shared, *there = shared + (kForward ? 1 : 2) * room;
  begin(base, here);
  for (; base < a.g.outer; base += step) {
    wait_for_copies();
    Known<A> known[kTurns];
#pragma unroll
    for (int k = 0; k < kTurns; ++k) known[k] = next[k];
    __syncthreads();  // and the tile before this one is no longer read
    begin(base + step, there);
    const int rows = rows_from(base);
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int row = k * rows_of_turn + mine;
      if (kAlone && row >= rows) break;
      T* const x = here + row * size;
      const bool inside = row < rows;
      const Place place{size, base + row, inside ? (base + row) * size : 0, inside};
      const Lanes<kAlone, kAlone> group{lanes};
      if constexpr (kForward) {
        forward_held<compiled, kAlone ? kSize / 2 : kTileLoads, kAlone ? 2 : 1, 1>(
            given, a, x, x, place, group, [&](int) { return known[k]; },
            [&](int, A loss, A divisor) { losses.add(place.line, loss, divisor); });
      } else {
        backward_held<kTileLoads, 1, 1>(kind, a, x, x + room, x, place, group);
      }
    }
    if constexpr (kForward) losses.end_turn();
    if (kind != Kind::kNll) {
      __syncthreads();
      end_tile<kWhole>(here, a.out + base * size, rows * size, aligned);
    }
    std::swap(here, there);
  }
  if constexpr (kForward) losses.write();
}

struct Tiles {
  int lanes, rows;  // lanes of a row, rows of a tile
  int64_t blocks;
};
// Several tiles for a block, so that it reads the next one meanwhile, where there are enough for
// all; but more blocks than the device holds at once: multiprocessors are not equally fast.
template <typename Arguments>
Tiles tiles_of(Kind kind, const Arguments& a) {
  constexpr int64_t kTilesOfBlock = 16;
  const int lanes = lanes_for(ceil_div(a.g.size, kTileLoads));
  const int rows =
      has_kernel(kind, a) ? kRowsAlone<typename Arguments::Element> * kThreads : kThreads / lanes;
  const int64_t tiles = ceil_div(a.g.outer, rows);
  const int64_t resident = int64_t{2048 / kThreads} * multiprocessor_count();
  return {lanes, rows, std::min(tiles, std::max(resident, ceil_div(tiles, kTilesOfBlock)))};
}

}  // namespace

template <typename T>
int64_t blocks_of_tiles(const Forward<T>& f) {
  return tiles_of(Kind::kNll, f).blocks;
}

template <typename Arguments>
void launch_tiles(const Launcher& launcher, Kind kind, const Arguments& a) {
  using T = typename Arguments::Element;
  const Tiles tiles = tiles_of(kind, a);
  const int64_t buffers = Arguments::kIsForward ? 2 : 4;
  const int64_t bytes = buffers * tiles.rows * a.g.size * static_cast<int64_t>(sizeof(T));
  const auto run = [&](auto* kernel) {
    launcher.run_blocks_with_shared(kernel, tiles.blocks, kThreads, bytes, kind, a, tiles.lanes,
                                    has_aligned_packs(kind, a));
  };
  if constexpr (Arguments::kIsForward && !std::is_same_v<T, double>) {
    if (has_kernel(kind, a)) {
      return dispatch_kind<Arguments>(
          kind, [&](auto tag) { run(tile_kernel<decltype(tag)::value, kClasses, Arguments>); });
    }
  }
  run(tile_kernel<Kind::kAny, 0, Arguments>);
}

#define MNIST_OPS_SOFTMAX(T)                                                          \
  template void launch_tiles<Forward<T>>(const Launcher&, Kind, const Forward<T>&);   \
  template void launch_tiles<Backward<T>>(const Launcher&, Kind, const Backward<T>&); \
  template int64_t blocks_of_tiles<T>(const Forward<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
