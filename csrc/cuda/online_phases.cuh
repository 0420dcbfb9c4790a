// The phases of online SGD (../online/program.h) as a block of threads runs them.
//
// A block takes tasks first, first +
// blocks, ... of a phase; the threads of a block take a task's elements, and meet at barriers of
// the block only. What a block keeps in its own memory lives no longer than the phase.
//
// Where the time goes for the original network, a step of 35 million multiplications: waiting, for
// the other blocks at the end of a level and for the second-level cache at its start. The maps and
// weights (2.5 MB in float32 with all gradients) never leave that cache. So phases are few, and a
// task first asks for all that it needs, into the block's own memory or registers, waits once, and
// computes from there: a warp has a channel of the sum in each lane and a row's outputs in its
// registers, so that an operand read is used several times, and adds its lanes up at the end.
#pragma once

#include "online_convolution.cuh"
#include "online_layers.cuh"
#include "online_linear.cuh"
#include "online_norm.cuh"
#include "online_update.cuh"

#include <new>

namespace mnist_ops::cuda {

// Runs this block's share of a phase. `shared` is the block's own memory, as the program wants,
// which no thread of the block uses any more when all of them have returned.
template <typename T>
__device__ void run_phase(const Phase& p, const Step<T>& s, T* shared) {
  if (s.block >= p.tasks) return;
  switch (p.op) {
    case Op::kConvolution:
      return convolution(p, s, shared);
    case Op::kConvolutionUpdate:
      return convolution_update(p, s, shared);
    case Op::kLinear:
      return linear(p, s, shared);
    case Op::kLinearBackward:
      return linear_backward(p, s, shared);
    case Op::kLinearUpdate:
      return linear_update(p, s);
    case Op::kLoss:
      return loss_phase(p, s);
    case Op::kActivation:
      return activation(p, s);
    case Op::kActivationBackward:
      return activation_backward(p, s);
    case Op::kDropout:
      return dropout(p, s);
    case Op::kPool:
      return pool(p, s);
    case Op::kPoolBackward:
      return pool_backward(p, s);
    case Op::kChannelSum:
      return channel_sums(p, s);
    case Op::kMean:
      return mean_plane(p, s);
    case Op::kSubtract:
      return subtract_mean(p, s, shared);
    case Op::kLocalBackward:
      return local_backward(p, s, shared);
    case Op::kPermute:
      return permute(p, s);
    case Op::kLogSoftmax:
      return log_softmax(p.log_softmax, p.number, s.map(p.x), s.at(p.y), p.C);
    case Op::kLogSoftmaxBackward:
      return log_softmax_backward(p.log_softmax, p.number, s.at(p.y), s.at(p.dy), s.at(p.dx), p.C);
  }
}

namespace {

// `steps` steps of all phases of the program, for the models from first_model on. After those that
// end a level all blocks of a model wait for each other. A program of more phases than a block
// keeps is read phase by phase.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    run_phases(const Phase* program, int32_t phases, const __grid_constant__ Run<T> run,
               int64_t first_model, int64_t steps, unsigned* barriers) {
  T* shared = reinterpret_cast<T*>(dynamic_shared_memory());
  __shared__ double own_program[kMaxPhases * sizeof(Phase) / sizeof(double)];
  static_assert(sizeof(Phase) % sizeof(double) == 0);
  const auto read = [&](const Phase* from, int32_t count) {
    const auto* words = reinterpret_cast<const double*>(from);
    const auto size = static_cast<unsigned>(count * sizeof(Phase) / sizeof(double));
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x) own_program[i] = words[i];
    __syncthreads();
  };
  const auto* own = reinterpret_cast<const Phase*>(own_program);
  const bool fits = phases <= kMaxPhases;
  if (fits) read(program, phases);
  // Phases are functions of their own, which take the step by its address: of local memory, were it
  // not here. Each warp has one and writes it before every phase, from little that is kept.
  using Step = cuda::Step<T>;
  __shared__ double own_steps[512 / kWarp * sizeof(Step) / sizeof(double)];
  static_assert(sizeof(Step) % sizeof(double) == 0);
  const auto own_step = [&]() -> Step& {
    return reinterpret_cast<Step*>(own_steps)[not_hoisted(threadIdx.x) / kWarp];
  };
  for (int32_t i = 0; i < static_cast<int32_t>(steps); ++i) {
    for (int32_t p = 0; p < phases; ++p) {
      if (!fits) read(program + p, 1);
      const Phase& phase = own[fits ? p : 0];
      if (threadIdx.x % kWarp == 0) {
        const auto blocks = static_cast<unsigned>(run.blocks);
        const unsigned mine = not_hoisted(blockIdx.x);
        const int64_t model = first_model + mine / blocks;
        // The first tasks of a phase go to the blocks that have none of the phases before it.
        const unsigned from = mine + blocks - static_cast<unsigned>(phase.first_task) % blocks;
        new (&own_step()) Step{run, run.workspace + model * run.model_stride, model, run.first + i,
                               static_cast<int32_t>(from % blocks)};
      }
      __syncwarp();
      run_phase(phase, own_step(), shared);
      if (phase.ends_level != 0) {
        const int32_t levels = program[phases - 1].ends_level;
        const int32_t round = i * levels + phase.ends_level;
        wait_for_blocks(barriers + kBarrierStride * own_step().model,
                        static_cast<unsigned>(run.blocks), static_cast<unsigned>(round));
      } else {
        __syncthreads();
      }
    }
  }
}

}  // namespace

template <typename T>
RunPhases<T>* run_phases_kernel() {
  return run_phases<T>;
}

}  // namespace mnist_ops::cuda
