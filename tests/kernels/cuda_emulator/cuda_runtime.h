// CUDA's language, on the CPU: csrc/cuda/*.cu includes this in place of CUDA's own header when the
// tests compile it as C++. Only what those files use is here.
//
// A block's threads are fibers: each has a stack of its own and runs until it comes to a barrier or
// a warp shuffle, where another one is resumed. All of it happens in one thread of the CPU, blocks
// one after the other, threads in an order that is shuffled (from a fixed seed) whenever all of
// them have had a turn. So a kernel that lacks a barrier reads values that are not there yet, or
// not there any more, and a barrier that not every thread comes to is reported.
//
// In a cooperative launch the threads of all blocks are there at once. A block runs until all of
// its threads wait for other blocks or have finished, then another one does, in random order:
// between two such waits a block's __shared__ memory is its own, but none of it lives any longer,
// as another block may have used it meanwhile (except for what all blocks write alike).
//
// So are the threads of a cluster's blocks, in any order among each other; what these share lies in
// dynamic shared memory, of which each block has its own.
//
// tests/kernels/test_cuda_emulator.py says what this proves and what it does not.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// The tests register these kernels beside the CPU's own, as the library mnist_ops_emulated (named
// by -Dmnist_ops=mnist_ops_emulated, which also keeps the C++ namespaces apart) for tensors on the
// CPU. After the headers above, whose DeviceType has a CUDA that must stay one.
#define CUDA CPU

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so one copy is enough (see above for cooperative launches). It begins
// as zeros, as it does not on a GPU, and then holds what the block before left: only that shows a
// kernel which counts on the zeros.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1)
      : x(x_size), y(y_size), z(z_size) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

// What the tests change between calls (emulator.cpp has the functions they do it with).
struct Settings {
  int64_t max_blocks = INT64_MAX;            // of a grid: few of them, and kernels must loop
  int64_t largest_narrow_index = INT32_MAX;  // 0, and every kernel is the one for large tensors
  int64_t image_bytes = int64_t{48} << 10;   // of shared memory, and as many of registers
};
inline Settings settings;

inline int64_t largest_narrow_index() {
  return settings.largest_narrow_index;
}

// Runs thread once as every thread of every block; throws where they wait for each other forever,
// and where one writes just behind the shared_bytes of dynamic shared memory.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread, size_t shared_bytes = 0);

// Dynamic shared memory of the block that runs: NaN when it begins. The limit is what any GPU has.
unsigned char* dynamic_shared_memory();
inline int64_t shared_memory_limit() {
  return int64_t{48} << 10;
}

// What kernels that keep much in shared memory are planned for.
struct Multiprocessors {
  int count;
  int64_t shared_bytes, shared_per_block;
  int largest_cluster, block_threads;
};
template <typename Kernel>
Multiprocessors multiprocessors(Kernel*) {
  return {3, 2 * settings.image_bytes, settings.image_bytes, 8,
          static_cast<int>(settings.image_bytes / 128)};
}

// The same for clusters of blocks, which are alive at once, each with its own dynamic shared
// memory.
void run_clusters(unsigned clusters, unsigned cluster, unsigned threads,
                  const std::function<void()>& thread, size_t shared_bytes);

// The barrier of a cluster: a wait is for all of its threads to wait.
inline void cluster_arrive() {}
void cluster_wait();

// The address in the dynamic shared memory of a block of the cluster.
unsigned char* address_of_block(const unsigned char* mine, int rank);
template <typename V>
V* cluster_peer(V* mine, int rank) {
  return reinterpret_cast<V*>(address_of_block(reinterpret_cast<const unsigned char*>(mine), rank));
}

// Copies that a thread begins and waits for: they take place when it waits.
void copy_later(void* to, const void* from, int bytes);
void wait_for_copies();

// Copies by the copy engine, which the device has where grids are not limited, so that both ways
// are tried. They take place as late as they may: loads when their bytes are waited for, by all
// threads of a block, stores when their end is. A size or an address that the engine would not
// take, bytes that never come and stores that nobody waits for are reported.
inline bool has_bulk_copies() {
  return settings.max_blocks > INT32_MAX;
}
void begin_arrivals(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, int bytes);
void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier);
void wait_for_bytes(uint64_t* barrier, bool parity);
inline void order_bulk_store() {}
void bulk_store(void* to, const void* from, int bytes);
void wait_for_bulk_stores();

// The same with all blocks alive at once.
void run_grid_together(dim3 grid, dim3 block, const std::function<void()>& thread,
                       size_t shared_bytes = 0);

// To be called by all threads of a block, which go on when `blocks` blocks have come here, for the
// round-th time, with the same counter; it is not counted in.
void wait_for_blocks(const unsigned* counter, unsigned blocks, unsigned round);

// To be called by an emulated thread, which goes on when all threads of its block, or of its warp,
// have come here.
void wait_for_block();
bool any_of_block(bool mine);
void wait_for_warp();

// One slot for each thread of the block, to hand a value to another one.
constexpr size_t kExchangeBytes = 8;
unsigned char* exchange_slot(unsigned thread);
unsigned this_thread();

// A device of so many multiprocessors, each of which holds one block of online SGD at a time, with
// so many bytes of dynamic shared memory.
struct Device {
  int multiprocessors = 3, block_threads = 64;
  int64_t shared_bytes = int64_t{200} << 10;
};
inline Device device;

inline int block_threads() {
  return device.block_threads;
}
inline int multiprocessor_count() {
  return device.multiprocessors;
}
template <typename Kernel>
int64_t free_shared_memory(Kernel*) {
  return device.shared_bytes;
}

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor&) {}

  template <typename Kernel, typename... Arguments>
  void launch(Kernel* kernel, int64_t blocks, dim3 threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    const auto grid = static_cast<unsigned>(std::min(blocks, settings.max_blocks));
    run_grid(dim3(grid), threads, [&] { kernel(arguments...); }, static_cast<size_t>(shared_bytes));
  }

  // The device has clusters unless indices are the wide ones, so that both are tried.
  template <typename Kernel, typename... Arguments>
  bool launch_clusters(Kernel* kernel, int64_t blocks, int cluster, dim3 threads,
                       int64_t shared_bytes, const Arguments&... arguments) const {
    if (settings.largest_narrow_index == 0) return false;
    launch_clusters_with_shared(kernel, blocks / cluster, cluster, static_cast<int>(threads.x),
                                shared_bytes, arguments...);
    return true;
  }

  template <typename Kernel, typename... Arguments>
  void launch_clusters_with_shared(Kernel* kernel, int64_t items, int cluster, int threads,
                                   int64_t shared_bytes, const Arguments&... arguments) const {
    const int64_t most = std::max(int64_t{1}, settings.max_blocks / cluster);
    const auto clusters = static_cast<unsigned>(std::min(items, most));
    run_clusters(
        clusters, static_cast<unsigned>(cluster), static_cast<unsigned>(threads),
        [&] { kernel(arguments...); }, static_cast<size_t>(shared_bytes));
  }

  template <typename Kernel>
  int64_t resident_together(Kernel*, int, int64_t) const {
    return device.multiprocessors;
  }

  template <typename Kernel, typename... Arguments>
  void launch_together(Kernel* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                       const Arguments&... arguments) const {
    run_grid_together(
        dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
        [&] { kernel(arguments...); }, static_cast<size_t>(shared_bytes));
  }
};

}  // namespace cuda_emulator

inline void __syncthreads() {
  cuda_emulator::wait_for_block();
}
inline int __syncthreads_or(int predicate) {
  return cuda_emulator::any_of_block(predicate != 0);
}
inline void __syncwarp() {
  cuda_emulator::wait_for_warp();
}

// The mask is not looked at: kernels here shuffle with whole warps.
template <typename V>
V __shfl_xor_sync(unsigned, V value, int lane_mask) {
  using namespace cuda_emulator;
  static_assert(sizeof(V) <= kExchangeBytes);
  const unsigned self = this_thread();
  std::memcpy(exchange_slot(self), &value, sizeof(V));
  wait_for_warp();
  std::memcpy(&value, exchange_slot(self ^ static_cast<unsigned>(lane_mask)), sizeof(V));
  wait_for_warp();  // before the next shuffle overwrites what others have yet to read
  return value;
}
