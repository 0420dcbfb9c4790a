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

// Where the losses of a thread go: in twos, so that fewer become float64.
template <typename T>
struct Losses {
  using A = opmath_t<T>;
  const Forward<T>& f;
  LossSum sum = {0, 0};
  A loss = A(0), divisor = A(0);

  __device__ __forceinline__ explicit Losses(const Forward<T>& arguments) : f(arguments) {}

  __device__ __forceinline__ void add(int64_t line, A of_line, A its_divisor) {
    if (f.sums == nullptr) {
      f.out[line] = static_cast<T>(of_line);
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

struct NoLosses {
  template <typename Arguments>
  __device__ __forceinline__ explicit NoLosses(const Arguments&) {}
};

constexpr int kTileLoads = 8;  // elements of a thread
static_assert(kTileLoads * kWarp == kMostShortRow);

// Rows of any size. The next rows are on their way meanwhile. Rows follow each other in shared
// memory as they do outside: sizes that are no multiple of a pack put the threads of a warp on
// different banks, or on few equal ones.
template <typename Arguments>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(Kind kind, Arguments a, int lanes, bool aligned) {
  using T = typename Arguments::Element;
  using A = typename Arguments::A;
  constexpr bool kForward = kIsForward<Arguments>;
  const Lanes<false> group{lanes};
  const int size = static_cast<int>(a.g.size);
  const int rows = kThreads / lanes, room = rows * size;  // of a tile
  const int mine = static_cast<int>(threadIdx.x) / lanes;
  const auto elements_from = [&](int64_t base) {
    const int64_t left = a.g.outer - base;
    return size * static_cast<int>(left < 0 ? 0 : left < rows ? left : rows);
  };
  A beta_g = A(0);
  if constexpr (kForward) beta_g = beta_g_of(kind, a, 0);
  const auto begin = [&](int64_t base, T* to) {
    const int count = elements_from(base);
    Known<A> known;
    if constexpr (kForward) {
      begin_tile(a.in + base * size, to, count, aligned);
      if (base + mine < a.g.outer) known = known_of(kind, a, base + mine, beta_g);
    } else {
      begin_tile(a.grad + base * size, to, count, aligned);
      begin_tile(a.out + base * size, to + room, count, aligned);
    }
    return known;
  };
  std::conditional_t<kForward, Losses<T>, NoLosses> losses(a);
  T* tile = reinterpret_cast<T*>(dynamic_shared_memory());
  T* next_tile = tile + (kForward ? room : 2 * room);
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  int64_t base = static_cast<int64_t>(blockIdx.x) * rows;
  Known<A> next = begin(base, tile);
  for (; base < a.g.outer; base += step) {
    const Known<A> known = next;
    wait_for_copies();
    __syncthreads();  // and the tile before this one is no longer read
    next = begin(base + step, next_tile);
    const Place place = place_of_row(size, base + mine, a.g.outer);
    T *const x = tile + mine * size, *to = nullptr;
    if constexpr (kForward) {
      to = kind == Kind::kNll ? nullptr : a.out;
      forward_held<kAnyKind, kTileLoads, 1, 1>(
          kind, a, x, x, place, group, [&](int) { return known; },
          [&](int, A loss, A divisor) { losses.add(place.line, loss, divisor); });
      losses.end_turn();
    } else {
      to = a.result;
      backward_held<kTileLoads, 1, 1>(kind, a, x, x + room, x, place, group);
    }
    if (to != nullptr) {
      __syncthreads();
      end_tile(tile, to + base * size, elements_from(base), aligned);
    }
    std::swap(tile, next_tile);
  }
  if constexpr (kForward) losses.write();
}

// Rows of kSize elements, an even number of them, forward, whose targets are one class: a thread
// takes kRows of a tile.
template <typename T>
constexpr int kRows = sizeof(T) == 2 ? 2 : 1;  // of half types more bytes are on their way so
template <int compiled, int kSize, typename T>
__global__ void __launch_bounds__(kThreads, kMostResident)
    even_rows_kernel(Kind given, Forward<T> f, bool aligned) {
  using A = opmath_t<T>;
  constexpr int kTile = kRows<T> * kThreads, kRoom = kTile * kSize;
  const Kind kind = kind_of<compiled>(given);
  const bool has_target = kind == Kind::kNll || kind == Kind::kNllGradient;
  const int thread = static_cast<int>(threadIdx.x);
  const int whole_tiles = static_cast<int>(f.g.outer / kTile);
  const int rows_of_rest = static_cast<int>(f.g.outer % kTile);
  const auto rows_of = [&](int tile) {
    return tile < whole_tiles ? kTile : tile == whole_tiles ? rows_of_rest : 0;
  };
  const A beta_g = beta_g_of(kind, f, 0);
  T* const shared = reinterpret_cast<T*>(dynamic_shared_memory());
  Known<A> next[kRows<T>];
  const auto begin = [&](int tile, int rows, T* to) {
    const int64_t base = int64_t{tile} * kTile;
    begin_tile<kRoom>(f.in + base * kSize, to, rows * kSize, aligned);
    if (!has_target) return;
    if (rows == kTile) {
#pragma unroll
      for (int k = 0; k < kRows<T>; ++k) {
        next[k] = known_of(kind, f, base + (k * kThreads + thread), beta_g);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRows<T>; ++k) {
        const int row = k * kThreads + thread;
        if (row < rows) next[k] = known_of(kind, f, base + row, beta_g);
      }
    }
  };
  Losses<T> losses(f);
  const int step = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x), rows = rows_of(tile), at = 0;
  begin(tile, rows, shared);
  while (rows > 0) {
    wait_for_copies();
    Known<A> known[kRows<T>];
#pragma unroll
    for (int k = 0; k < kRows<T>; ++k) known[k] = next[k];
    __syncthreads();  // and the tile before this one is no longer read
    const int next_rows = rows_of(tile + step);
    begin(tile + step, next_rows, shared + (kRoom - at));
    const int64_t base = int64_t{tile} * kTile;
#pragma unroll
    for (int k = 0; k < kRows<T>; ++k) {
      const int row = k * kThreads + thread;
      if (row >= rows) break;
      T* const x = shared + at + row * kSize;
      const Place place{kSize, base + row, 0, true};
      forward_held<compiled, kSize / 2, 2, 1>(
          given, f, x, x, place, Alone{}, [&](int) { return known[k]; },
          [&](int, A loss, A divisor) { losses.add(place.line, loss, divisor); });
    }
    losses.end_turn();
    if (kind != Kind::kNll) {
      __syncthreads();
      end_tile<kRoom>(shared + at, f.out + base * kSize, rows * kSize, aligned);
    }
    at = kRoom - at;
    tile += step;
    rows = next_rows;
  }
  losses.write();
}

// Rows of the reports' 10 classes have kernels of their own, but for float64.
constexpr int kClasses = 10;
template <typename T>
bool has_kernel(Kind kind, const Forward<T>& f) {
  return !std::is_same_v<T, double> && f.g.size == kClasses && has_one_class(kind, f);
}
template <typename T>
bool has_kernel(Kind, const Backward<T>&) {
  return false;
}

struct Tiles {
  int lanes, rows;  // lanes of a row, rows of a tile
  int64_t count;
};
template <typename Arguments>
Tiles tiles_of(Kind kind, const Arguments& a) {
  const int lanes = lanes_for(ceil_div(a.g.size, kTileLoads));
  const int rows =
      has_kernel(kind, a) ? kRows<typename Arguments::Element> * kThreads : kThreads / lanes;
  return {lanes, rows, ceil_div(a.g.outer, rows)};
}

constexpr int64_t kTilesOfBlock = 16;

// Several tiles for a block, so that it reads the next one meanwhile, where there are enough for
// all; but more blocks than the device holds at once: multiprocessors are not equally fast.
int64_t blocks_for(int64_t tiles) {
  const int64_t all = int64_t{2048 / kThreads} * multiprocessor_count();
  return std::min(tiles, std::max(all, ceil_div(tiles, kTilesOfBlock)));
}

}  // namespace

template <typename T>
int64_t blocks_of_tiles(const Forward<T>& f) {
  return blocks_for(tiles_of(Kind::kNll, f).count);
}

template <typename Arguments>
void launch_tiles(const Launcher& launcher, Kind kind, const Arguments& a) {
  using T = typename Arguments::Element;
  constexpr bool kForward = kIsForward<Arguments>;
  const Tiles tiles = tiles_of(kind, a);
  const auto run = [&](auto* kernel, const auto&... arguments) {
    const int64_t bytes = tiles.rows * a.g.size * static_cast<int64_t>(sizeof(T));
    launcher.run_blocks_with_shared(kernel, blocks_for(tiles.count), kThreads,
                                    (kForward ? 2 : 4) * bytes, kind, a, arguments...,
                                    has_aligned_packs(kind, a));
  };
  if constexpr (kForward && !std::is_same_v<T, double>) {
    if (has_kernel(kind, a)) {
      return dispatch_kind<Arguments>(
          kind, [&](auto number) { run(even_rows_kernel<decltype(number)::value, kClasses, T>); });
    }
  }
  run(tile_kernel<Arguments>, tiles.lanes);
}

#define MNIST_OPS_SOFTMAX(T)                                                          \
  template void launch_tiles<Forward<T>>(const Launcher&, Kind, const Forward<T>&);   \
  template void launch_tiles<Backward<T>>(const Launcher&, Kind, const Backward<T>&); \
  template int64_t blocks_of_tiles<T>(const Forward<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_SOFTMAX)

}  // namespace mnist_ops::cuda
