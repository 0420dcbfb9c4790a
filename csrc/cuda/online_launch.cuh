// How online SGD gets onto a device: one cooperative kernel whose blocks wait for each other, and
// small kernels before and after it.
#pragma once

#include "launch.cuh"

#include <vector>

namespace mnist_ops::cuda {

#if defined(MNIST_OPS_CUDA_EMULATOR)
using cuda_emulator::block_threads;
using cuda_emulator::Cooperation;
using cuda_emulator::wait_for_blocks;
#else

constexpr int kBlockThreads = 512;
constexpr int block_threads() {
  return kBlockThreads;
}

inline void check_cuda(cudaError_t error, const char* what) {
  MNIST_OPS_CHECK(error == cudaSuccess, "online_sgd_models: ", what, ": ",
                  cudaGetErrorString(error));
}

// Waits until `blocks` blocks have come here for the round-th time; counter starts at 0. What any
// of their threads wrote before is then visible to all of them: the barriers of the blocks order it
// before the release, and after the acquire, which need no fences of their own. The counter only
// grows, so that no block can miss a turn; it wraps around after 2^32 arrivals, which the
// comparison allows for.
__device__ __forceinline__ void wait_for_blocks(unsigned* counter, unsigned blocks,
                                                unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned target = blocks * round;
    unsigned arrived;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (static_cast<int>(arrived - target) < 0);
  }
  __syncthreads();
}

// A device and stream to launch on, those of a tensor.
class Cooperation {
 public:
  explicit Cooperation(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    const int device = tensor.get_device_index();
    check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
               "cannot read the number of multiprocessors");
    check_cuda(cudaDeviceGetAttribute(&cooperative_, cudaDevAttrCooperativeLaunch, device),
               "cannot read whether kernels may be cooperative");
  }

  int multiprocessors() const { return multiprocessors_; }

  // The bytes of dynamic shared memory that a kernel's blocks can ask for.
  template <typename Kernel>
  int64_t free_shared_memory(Kernel* kernel) const {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
               "cannot read a kernel's attributes");
    return shared_memory_limit() - static_cast<int64_t>(attributes.sharedSizeBytes);
  }

  // To be called before the kernel is launched with more than 48 KiB. Not only as much as this
  // call takes: another thread might be about to launch it with more.
  template <typename Kernel>
  void allow_shared_memory(Kernel* kernel) const {
    cuda::allow_shared_memory(address_of(kernel));
  }

  // How many blocks of a cooperative kernel the device holds at once; 0: it knows no such kernels.
  template <typename Kernel>
  int resident_blocks(Kernel* kernel, int64_t shared_bytes) const {
    if (!cooperative_) return 0;
    int each = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kBlockThreads,
                                                             static_cast<size_t>(shared_bytes)),
               "cannot read how many blocks fit");
    return each * multiprocessors_;
  }

  template <typename Kernel, typename... Arguments>
  void launch(Kernel* kernel, int64_t blocks, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // All blocks run at the same time, or the launch fails.
  template <typename Kernel, typename... Arguments>
  void launch_together(Kernel* kernel, int64_t blocks, int64_t shared_bytes,
                       const Arguments&... arguments) const {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                           dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads),
                                           pointers, static_cast<size_t>(shared_bytes), stream_),
               "the cooperative kernel does not start");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int multiprocessors_ = 0, cooperative_ = 0;
};

#endif

}  // namespace mnist_ops::cuda
