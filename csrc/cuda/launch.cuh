// What the CUDA kernels share: devices, streams, launches, and a thread's place in one.
//
// Every kernel is one-dimensional in its grid (the limit is 2^31 - 1 blocks; y and z stop at
// 65535), walks its work in a grid-stride loop, and adds in an order that depends only on the shape
// of its arguments: no atomics, so the same input gives the same bits. Nothing here waits for the
// device.
#pragma once

#include "../common.h"

#include <cuda_runtime.h>  // of CUDA, or of tests/cuda_emulator
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

namespace mnist_ops::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block
// Far more blocks than any device holds at once; beyond it the grid-stride loops take over.
constexpr int64_t kMaxBlocks = int64_t{1} << 17;

// Blocks of a cluster at most.
constexpr int kMaxCluster = 8;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What is to be compiled for every element type, in the file that has it.
#define MNIST_OPS_EACH_FLOATING(instantiate) \
  instantiate(double) instantiate(float) instantiate(Half) instantiate(BFloat16)

// A number as a type, for lambdas that take it from a dispatch.
template <int n>
struct Number {
  static constexpr int value = n;
};

// Division by one number again and again: of i < 2^32 - 1 with divisor * (i + 1) <= 2^32.
struct Divider {
  uint32_t divisor = 1, magic = UINT32_MAX;

  Divider() = default;
  MNIST_OPS_HD explicit Divider(int64_t d)
      : divisor(static_cast<uint32_t>(d)), magic(UINT32_MAX / static_cast<uint32_t>(d)) {}

  MNIST_OPS_HD uint32_t quotient(uint32_t i) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(i + 1) * magic) >> 32);  // two instructions
  }
  MNIST_OPS_HD uint32_t remainder(uint32_t i) const { return i - quotient(i) * divisor; }
};

// a / b of numbers that are not negative. A division in 64 bits is slow, and seldom needed.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

#if defined(MNIST_OPS_CUDA_EMULATOR)
// The tests run these kernels on the CPU: there is no device to choose, <<<>>> is not C++, and
// small tensors must take the paths of large ones.
using cuda_emulator::cluster_arrive;
using cuda_emulator::cluster_peer;
using cuda_emulator::cluster_wait;
using cuda_emulator::CurrentStream;
using cuda_emulator::dynamic_shared_memory;
using cuda_emulator::free_shared_memory;
using cuda_emulator::largest_narrow_index;
using cuda_emulator::multiprocessor_count;
using cuda_emulator::Multiprocessors;
using cuda_emulator::multiprocessors;
using cuda_emulator::shared_memory_limit;
#else
inline int64_t largest_narrow_index() {
  return std::numeric_limits<int32_t>::max();
}

inline int current_device() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, current_device()));
  return value;
}

// The most bytes of shared memory that a block can ask for on the current device.
inline int64_t shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Multiprocessors of the current device.
inline int multiprocessor_count() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// What ask() answers for this key on the current device. It is called once in a thread: to ask the
// driver about a kernel takes about as long as to launch it. Each ask is one type, with a memory of
// its own.
template <typename Ask, typename... Key>
auto remembered(const Ask& ask, const Key&... key) {
  thread_local std::map<std::tuple<int, Key...>, decltype(ask())> answers;
  const std::tuple<int, Key...> asked(current_device(), key...);
  auto found = answers.find(asked);
  if (found == answers.end()) found = answers.emplace(asked, ask()).first;
  return found->second;
}

// Kernels of one type are told apart by their address.
template <typename Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

inline cudaFuncAttributes attributes_of(const void* kernel) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes;
}

// The bytes of dynamic shared memory that a kernel's blocks can ask for.
template <typename Kernel>
int64_t free_shared_memory(Kernel* kernel) {
  return shared_memory_limit() -
         static_cast<int64_t>(attributes_of(address_of(kernel)).sharedSizeBytes);
}

// Lets launches of a kernel have all of them. Not only as much as the next launch takes: another
// thread might be about to launch it with more.
inline void allow_shared_memory(const void* kernel) {
  remembered(
      [kernel] {
        STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(free_shared_memory(kernel))));
        return true;
      },
      kernel);
}

// How many blocks of a kernel the device holds at once.
inline int64_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes) {
  int each = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads,
                                                               static_cast<size_t>(shared_bytes)));
  return int64_t{each} * multiprocessor_count();
}

// What kernels that keep much in shared memory are planned for.
struct Multiprocessors {
  int count;
  int64_t shared_bytes, shared_per_block;  // of shared memory
  int largest_cluster;                     // blocks of a cluster, 1 where there are none
  int block_threads;                       // of this kernel at most, and its registers for all
};

// Whether the device has clusters and this kernel was compiled for one that has: where it was not,
// and PTX for an older device is what runs, its barriers of a cluster are none.
inline bool has_clusters(const void* kernel) {
  return device_attribute(cudaDevAttrClusterLaunch) != 0 && attributes_of(kernel).ptxVersion >= 90;
}

// A launch of so many blocks in clusters of so many neighbours.
struct ClusterLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(int64_t blocks, int cluster, dim3 threads, int64_t shared_bytes,
                cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  // Whether the device can hold one such cluster: a part of a device (MIG) may have too few
  // multiprocessors next to each other.
  bool fits(const void* kernel) const {
    int resident = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&resident, kernel, &config));
    return resident > 0;
  }
};

// Blocks of the largest cluster, up to kMaxCluster, that the device can hold of this kernel with as
// many threads and as much shared memory as it may take. 1 where there are no clusters.
inline int largest_cluster(const void* kernel) {
  if (!has_clusters(kernel)) return 1;
  allow_shared_memory(kernel);
  const dim3 threads(static_cast<unsigned>(attributes_of(kernel).maxThreadsPerBlock));
  const int64_t shared = free_shared_memory(kernel);
  int cluster = kMaxCluster;
  while (cluster > 1 && !ClusterLaunch(cluster, cluster, threads, shared, nullptr).fits(kernel)) {
    cluster /= 2;
  }
  return cluster;
}

// For launches of this kernel.
template <typename Kernel>
Multiprocessors multiprocessors(Kernel* kernel) {
  const void* const address = address_of(kernel);
  return remembered(
      [address] {
        return Multiprocessors{multiprocessor_count(),
                               device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                               shared_memory_limit(), largest_cluster(address),
                               attributes_of(address).maxThreadsPerBlock};
      },
      address);
}

// What the launch asked for, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The barrier of the blocks of a cluster, in two halves: memory is in order between what threads
// did before they arrived and what others do after they waited. All threads call both, in turns.
// (Where there are no clusters nobody is to be waited for, and nobody calls them.)
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The address of a variable in shared memory in another block of the cluster.
template <typename A>
__device__ __forceinline__ A* cluster_peer(A* variable, int block) {
#if __CUDA_ARCH__ >= 900
  A* theirs;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(variable), "r"(block));
  return theirs;
#else
  static_cast<void>(block);
  return variable;
#endif
}

// Makes a tensor's device the current one for as long as it lives, and launches on its stream.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // With shared_bytes of dynamic shared memory, up to shared_memory_limit().
  template <typename Kernel, typename... Arguments>
  void launch(Kernel* kernel, int64_t blocks, dim3 threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    if (shared_bytes > (int64_t{48} << 10)) {  // more than that only for those that ask
      allow_shared_memory(address_of(kernel));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream_>>>(
        arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Blocks in clusters of so many neighbours, with up to 48 KiB of dynamic shared memory; false if
  // the device, or the code that was compiled for it, has none of this size.
  template <typename Kernel, typename... Arguments>
  bool launch_clusters(Kernel* kernel, int64_t blocks, int cluster, dim3 threads,
                       int64_t shared_bytes, const Arguments&... arguments) const {
    const ClusterLaunch launch(blocks, cluster, threads, shared_bytes, stream_);
    const void* const address = address_of(kernel);
    const bool fits = remembered([&] { return has_clusters(address) && launch.fits(address); },
                                 address, cluster, threads.x, shared_bytes);
    if (fits) STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
    return fits;
  }

  // As many clusters of blocks as the device holds at once, if there are so many items: each takes
  // one at a time. Few items a cluster are not worth waiting for the slowest: one each, then.
  template <typename Kernel, typename... Arguments>
  void launch_clusters_with_shared(Kernel* kernel, int64_t items, int cluster, int threads,
                                   int64_t shared_bytes, const Arguments&... arguments) const {
    const void* const address = address_of(kernel);
    const int64_t blocks = remembered(
        [&] {
          allow_shared_memory(address);
          STD_CUDA_CHECK(cudaFuncSetAttribute(kernel,
                                              cudaFuncAttributePreferredSharedMemoryCarveout,
                                              cudaSharedmemCarveoutMaxShared));
          return resident_blocks(address, threads, shared_bytes);
        },
        address, threads, shared_bytes);
    const int64_t room = std::max<int64_t>(1, blocks / cluster);
    const int64_t clusters = cluster > 1 && items <= 4 * room ? items : std::min(items, room);
    const ClusterLaunch launch(clusters * cluster, cluster, dim3(static_cast<unsigned>(threads)),
                               shared_bytes, stream_);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
  }

  // How many blocks of a cooperative kernel the device holds at once; 0: it knows no such kernels.
  template <typename Kernel>
  int64_t resident_together(Kernel* kernel, int threads, int64_t shared_bytes) const {
    if (device_attribute(cudaDevAttrCooperativeLaunch) == 0) return 0;
    allow_shared_memory(address_of(kernel));
    return resident_blocks(address_of(kernel), threads, shared_bytes);
  }

  // All blocks run at the same time, or the launch fails.
  template <typename Kernel, typename... Arguments>
  void launch_together(Kernel* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                       const Arguments&... arguments) const {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    STD_CUDA_CHECK(cudaLaunchCooperativeKernel(address_of(kernel),
                                               dim3(static_cast<unsigned>(blocks)),
                                               dim3(static_cast<unsigned>(threads)), pointers,
                                               static_cast<size_t>(shared_bytes), stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

// Both halves of a cluster's barrier at once.
__device__ __forceinline__ void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// Whether indices below count fit into int32_t, with room for the step of a grid-stride loop.
inline bool fits_32_bits(int64_t count) {
  return count <= largest_narrow_index() - kMaxBlocks * kThreads;
}

// Launches on the device and stream of a tensor. Made after the arguments were checked: the tensor
// must be on a CUDA device, and where one argument is and another is not, the operators say so.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : stream_(tensor) {}

  // Blocks of kThreads threads, shaped (threads_x, kThreads / threads_x), each of which takes
  // items_per_block of the items at a time. No items, no launch.
  template <typename Kernel, typename... Arguments>
  void run(Kernel* kernel, int64_t items, int64_t items_per_block, int threads_x,
           const Arguments&... arguments) const {
    if (items == 0) return;
    const int64_t blocks = std::min(ceil_div(items, items_per_block), kMaxBlocks);
    const dim3 threads(static_cast<unsigned>(threads_x),
                       static_cast<unsigned>(kThreads / threads_x));
    stream_.launch(kernel, blocks, threads, 0, arguments...);
  }

  // The same with another number of threads, all in a row.
  template <typename Kernel, typename... Arguments>
  void run_blocks(Kernel* kernel, int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    run_blocks_with_shared(kernel, blocks, threads, 0, arguments...);
  }

  // One block for each item, with so many threads and bytes of dynamic shared memory.
  template <typename Kernel, typename... Arguments>
  void run_blocks_with_shared(Kernel* kernel, int64_t items, int threads, int64_t shared_bytes,
                              const Arguments&... arguments) const {
    if (items == 0) return;
    stream_.launch(kernel, std::min(items, kMaxBlocks), dim3(static_cast<unsigned>(threads)),
                   shared_bytes, arguments...);
  }

  // A cluster of so many blocks for each item; false, and nothing done, where there are none. One
  // block is not called a cluster.
  template <typename Kernel, typename... Arguments>
  bool run_clusters(Kernel* kernel, int64_t items, int cluster, int threads, int64_t shared_bytes,
                    const Arguments&... arguments) const {
    if (cluster == 1) {
      run_blocks_with_shared(kernel, items, threads, shared_bytes, arguments...);
      return true;
    }
    return items == 0 || stream_.launch_clusters(
                             kernel, std::min(items, kMaxBlocks / cluster) * cluster, cluster,
                             dim3(static_cast<unsigned>(threads)), shared_bytes, arguments...);
  }

  // Clusters of blocks, each of which takes one item at a time.
  template <typename Kernel, typename... Arguments>
  void run_clusters_with_shared(Kernel* kernel, int64_t items, int cluster, int threads,
                                int64_t shared_bytes, const Arguments&... arguments) const {
    if (items == 0) return;
    stream_.launch_clusters_with_shared(kernel, items, cluster, threads, shared_bytes,
                                        arguments...);
  }

  // The usual case: one item a thread.
  template <typename Kernel, typename... Arguments>
  void run_over(Kernel* kernel, int64_t items, const Arguments&... arguments) const {
    run(kernel, items, kThreads, kThreads, arguments...);
  }

 private:
  CurrentStream stream_;
};

// This thread's first item, and the distance to its next one, where each thread takes one at a
// time.
template <typename I>
__device__ __forceinline__ I first_item() {
  return static_cast<I>(blockIdx.x) * kThreads + threadIdx.x;
}
template <typename I>
__device__ __forceinline__ I item_stride() {
  return static_cast<I>(gridDim.x) * kThreads;
}

}  // namespace mnist_ops::cuda
