// Online SGD on CUDA: one step of one model as a block of threads sees it, and what all phases use.
#pragma once

#include "../online/program.h"
#include "../softmax.h"

#include "memory.cuh"
#include "reduce.cuh"

namespace mnist_ops::cuda {

using namespace mnist_ops::online;

// What all steps of a call have in common.
template <typename T>
struct Run {
  T* workspace;
  int64_t model_stride, velocity_shift;  // velocity_shift 0: no momentum
  const T* samples;                      // (models, piece, H, W, C)
  int64_t first, piece, image_size;      // of this piece: index in the call, samples, elements
  const int64_t* targets;                // (models, count)
  const double* uniform;                 // (models, count, uniforms)
  int64_t count, uniforms;
  const double* settings;  // (models, kSettings)
  T* losses;               // (models, count)
  int64_t* predictions;
  int32_t models, blocks;  // blocks of each model
  Loss loss;
  bool nesterov;
};

// The same pointer, of which the compiler then knows that it is one to the device's memory: such
// loads are shorter, and may be moved ahead of stores to a block's own memory.
template <typename T>
__device__ __forceinline__ T* in_device_memory(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The same number, of which the compiler does not know that it is: what follows from it is computed
// where it is needed, and not kept from before a loop in registers that are not there.
template <typename I>
__device__ __forceinline__ I not_hoisted(I number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// One phase of a step of one model, seen by one block.
template <typename T>
struct Step {
  const Run<T>& run;
  T* base;
  int64_t model, index;  // index of the sample in the call
  int32_t block;         // of the model's blocks, from that on which has the phase's first task

  __device__ T* at(int64_t offset) const { return in_device_memory(base + offset); }
  __device__ const T* map(int64_t offset) const {
    const int64_t sample = model * run.piece + index - run.first;
    return in_device_memory(offset != kImage ? base + offset
                                             : run.samples + sample * run.image_size);
  }
  __device__ T* velocity(int64_t offset) const {
    return run.velocity_shift == 0 ? nullptr : at(offset + run.velocity_shift);
  }
  __device__ int32_t target() const {
    return static_cast<int32_t>(run.targets[model * run.count + index]);
  }
  __device__ const double* uniform(int64_t first) const {
    return run.uniform + (model * run.count + index) * run.uniforms + first;
  }
  // Steps that were made before the call. To be read early: the other settings lie beside it.
  __device__ double steps_before() const { return run.settings[model * kSettings + kSteps]; }
  __device__ Update<T> update(double steps) const {
    return update_of_step<T>(run.settings + model * kSettings, steps, index, run.nesterov);
  }
};

__device__ __forceinline__ int32_t thread_index() {
  return static_cast<int32_t>(threadIdx.x);
}
__device__ __forceinline__ int32_t thread_count() {
  return static_cast<int32_t>(blockDim.x);
}

// Calls body(task) for the tasks of this block.
template <typename T, typename F>
__device__ __forceinline__ void each_task(const Phase& p, const Step<T>& s, const F& body) {
  const int32_t tasks = p.tasks, blocks = s.run.blocks;
  for (int32_t task = s.block; task < tasks; task += blocks) body(task);
}

// body(i) for this thread's element of each task, of n elements in all.
template <typename T, typename F>
__device__ __forceinline__ void each_element(const Phase& p, const Step<T>& s, int32_t n,
                                             const F& body) {
  each_task(p, s, [&](int32_t task) {
    const int32_t i = task * thread_count() + thread_index();
    if (i < n) body(i);
  });
}

// body(i) for this thread's elements, of n that all blocks with a task share.
template <typename T, typename F>
__device__ __forceinline__ void each_of_blocks(const Phase& p, const Step<T>& s, int32_t n,
                                               const F& body) {
  const int32_t blocks = p.tasks < s.run.blocks ? p.tasks : s.run.blocks;
  for (int32_t i = s.block * thread_count() + thread_index(); i < n; i += blocks * thread_count()) {
    body(i);
  }
}

// The sums over the lanes of a warp of n values: lane i gets that of values[i].
template <int n, typename T>
__device__ __forceinline__ T lane_sums(const T (&values)[n], int32_t lane) {
  static_assert(n <= kWarp);
  T v[kWarp];
#pragma unroll
  for (int i = 0; i < kWarp; ++i) v[i] = i < n ? values[i] : T(0);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kWarp / 2; ++i) {
      if (i >= distance || i >= n) continue;
      const T give = upper ? v[i] : v[i + distance];
      const T keep = upper ? v[i + distance] : v[i];
      v[i] = keep + __shfl_xor_sync(kWholeWarp, give, distance);
    }
  }
  return v[0];
}

// ------------------------------------------------------------------------------------- the kernel

#if defined(MNIST_OPS_CUDA_EMULATOR)
using cuda_emulator::block_threads;
using cuda_emulator::wait_for_blocks;
#else
constexpr int block_threads() {
  return 512;
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
#endif

constexpr int kMaxPhases = 40;          // that a block keeps in its own memory
constexpr int64_t kBarrierStride = 32;  // numbers between the barriers of two models

// run_phases of online_phases.cuh, which has a file for each type: it takes the compiler longest.
template <typename T>
using RunPhases = void(const Phase* program, int32_t phases, Run<T> run, int64_t first_model,
                       int64_t steps, unsigned* barriers);
template <typename T>
RunPhases<T>* run_phases_kernel();

}  // namespace mnist_ops::cuda
