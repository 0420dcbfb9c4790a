// The phases of online SGD (../online/program.h) as a block of threads runs them.
//
// run_phase() is the same code in both drivers (online_sgd.cu). A block takes tasks first, first +
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

#include "../online/program.h"
#include "../softmax.h"  // Differences

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

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

enum Setting { kLr, kLrDecay, kWeightDecay, kMomentum, kDampening, kSteps, kStarted, kSettings };

// One step of one model, seen by one block.
template <typename T>
struct Step {
  const Run<T>& run;
  T* base;
  int64_t model, index;  // index of the sample in the call
  int32_t block;         // of the model's blocks

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
    const double* s = run.settings + model * kSettings;
    const double t = steps + static_cast<double>(index);
    Update<T> u;
    u.rate = static_cast<T>(s[kLr] / (1.0 + t * s[kLrDecay]));
    u.weight_decay = static_cast<T>(s[kWeightDecay]);
    u.momentum = static_cast<T>(s[kMomentum]);
    u.keep = static_cast<T>(1.0 - s[kDampening]);
    u.first = index == 0 && s[kStarted] == 0.0;
    u.nesterov = run.nesterov;
    return u;
  }
};

__device__ __forceinline__ int32_t thread_index() {
  return static_cast<int32_t>(threadIdx.x);
}
__device__ __forceinline__ int32_t thread_count() {
  return static_cast<int32_t>(blockDim.x);
}

// Calls body(task) for the tasks of this block; `block` counts from the phase's first task.
template <typename F>
__device__ __forceinline__ void each_task(int32_t tasks, int32_t block, int32_t blocks,
                                          const F& body) {
  for (int32_t task = block; task < tasks; task += blocks) body(task);
}

// body(i) for this thread's element of each task, of n elements in all.
template <typename F>
__device__ __forceinline__ void each_element(const Phase& p, int32_t n, int32_t block,
                                             int32_t blocks, const F& body) {
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t i = task * thread_count() + thread_index();
    if (i < n) body(i);
  });
}

// Quotients of small numbers, below 2^20, by one divisor: a few instructions each.
struct Divisor {
  float reciprocal;

  __device__ explicit Divisor(int32_t by) : reciprocal(1.0f / static_cast<float>(by)) {}
  __device__ int32_t quotient(int32_t n) const {
    return static_cast<int32_t>((static_cast<float>(n) + 0.5f) * reciprocal);
  }
};

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

// ------------------------------------------------------------------------------- normalization

// The sum over channels of one pixel, by a warp; every lane gets it.
template <typename T>
__device__ __forceinline__ T channel_sum(const T* map, int32_t C, int32_t pixel, int32_t lane) {
  T sum = T(0);
  for (int32_t c = lane; c < C; c += kWarp) sum += map[pixel * C + c];
  return lane_sum(sum, kWarp);
}

// What a blur reads from the workspace is asked for early: the taps of a short separable kernel go
// into the block's own memory, behind its planes, and each thread gets the coefficient of its first
// pixel. To be followed by a wait_for_copies() of all threads.
template <typename T>
__device__ __forceinline__ T load_blur(const BlurPlan& b, const Step<T>& s, T* shared) {
  if (b.source != MeanSource::kMap && b.source != MeanSource::kSum) return T(1);
  const int32_t pixels = b.H * b.W, i = thread_index();
  if (blurs_by_short_taps(b) && i < b.taps_w) {
    copy_pack<1>(shared + 2 * pixels + (b.adjoint ? b.taps_w - 1 - i : i), s.at(b.taps) + i);
  }
  return i < pixels ? s.at(b.coef)[i] : T(1);
}

template <typename T>
__device__ __forceinline__ T coef_at(const BlurPlan& b, const Step<T>& s, T own, int32_t i) {
  return i == thread_index() ? own : s.at(b.coef)[i];
}

// From the sums over the channels, in `shared`, to the plane, there too. The sums of an adjoint
// blur come divided by the coefficients. All threads of a block come here.
template <typename T>
__device__ const T* finish_mean(const BlurPlan& b, const Step<T>& s, T own_coef, T* shared) {
  const int32_t pixels = b.H * b.W;
  const Divisor across(b.W);
  const bool is_short = blurs_by_short_taps(b);
  const T channels = static_cast<T>(b.C);
  T* sum = shared;
  T* mean = shared + pixels;
  const T* short_taps = shared + 2 * pixels;
  wait_for_copies();
  __syncthreads();
  if (b.separable) {
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
      const int32_t h = across.quotient(i), w = i - h * b.W, first = w - b.taps_w / 2;
      if (is_short) {
        T total = T(0);
#pragma unroll
        for (int k = 0; k < kShortTaps; ++k) {
          const int32_t column = first + k;
          if (k < b.taps_w && column >= 0 && column < b.W) {
            total += sum[h * b.W + column] * short_taps[k];
          }
        }
        mean[i] = total;
      } else {
        mean[i] = blur_row_at(b, sum, s.at(b.taps), h, w);
      }
    }
    __syncthreads();
    T* rows = mean;
    mean = sum;
    sum = rows;
  }
  for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
    const int32_t h = across.quotient(i), w = i - h * b.W, first = h - b.taps_h / 2;
    T total = T(0);
    if (is_short) {
#pragma unroll
      for (int k = 0; k < kShortTaps; ++k) {
        const int32_t row = first + k;
        if (k < b.taps_h && row >= 0 && row < b.H) total += sum[row * b.W + w] * short_taps[k];
      }
    } else if (b.separable) {
      total = blur_column_at(b, sum, s.at(b.taps), h, w);
    } else {
      total = blur_at(b, sum, s.at(b.taps), h, w);
    }
    const T blurred = total / channels;
    mean[i] = b.adjoint ? blurred : blurred / coef_at(b, s, own_coef, i);
  }
  __syncthreads();
  return mean;
}

// The plane that a normalization subtracts from every channel of a map, or of a gradient, where the
// whole block can read it: computed in `shared` (mean_numbers() of them), or there already. To be
// called by all threads of a block.
template <typename T>
__device__ const T* prepare_mean(const BlurPlan& b, const Step<T>& s, const T* map, T* shared) {
  if (b.source == MeanSource::kNone) return nullptr;
  if (b.source == MeanSource::kReady) return s.at(b.mean);
  const T own_coef = load_blur(b, s, shared);
  const int32_t pixels = b.H * b.W;
  if (b.source == MeanSource::kMap) {
    constexpr int kAtOnce = 4;
    const int32_t lane = thread_index() % kWarp, warps = thread_count() / kWarp;
    for (int32_t i = thread_index() / kWarp; i < pixels; i += kAtOnce * warps) {
      T total[kAtOnce] = {};
#pragma unroll 2
      for (int32_t c = lane; c < b.C; c += kWarp) {
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          if (i + q * warps < pixels) total[q] += map[(i + q * warps) * b.C + c];
        }
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        total[q] = lane_sum(total[q], kWarp);
        if (lane == 0 && i + q * warps < pixels) shared[i + q * warps] = total[q];
      }
    }
    if (b.adjoint) {
      __syncthreads();
      for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
        shared[i] /= coef_at(b, s, own_coef, i);
      }
    }
  } else {
    const T* sums = s.at(b.sum);
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
      T total = T(0);
#pragma unroll 8
      for (int32_t j = 0; j < b.parts; ++j) total += sums[j * pixels + i];
      shared[i] = b.adjoint ? total / coef_at(b, s, own_coef, i) : total;
    }
  }
  return finish_mean(b, s, own_coef, shared);
}

template <typename T>
__device__ void channel_sums(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const BlurPlan& b = p.blur;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t i = task * warps + warp;
    if (i >= b.H * b.W) return;
    const T total = channel_sum(s.map(p.x), b.C, i, lane);
    if (lane == 0) s.at(b.sum)[i] = b.adjoint ? total / s.at(b.coef)[i] : total;
  });
}

template <typename T>
__device__ void mean_plane(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const BlurPlan& b = p.blur;
  const T channels = static_cast<T>(b.C);
  each_element(p, b.H * b.W, block, blocks, [&](int32_t i) {
    const T blurred = blur_at(b, s.at(b.sum), s.at(b.taps), i / b.W, i % b.W) / channels;
    s.at(b.mean)[i] = b.adjoint ? blurred : blurred / s.at(b.coef)[i];
  });
}

template <typename T>
__device__ void subtract_mean(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                              T* shared) {
  const T* x = s.map(p.x);
  const T* mean = prepare_mean(p.blur, s, x, shared);
  each_element(p, p.C * p.H * p.W, block, blocks,
               [&](int32_t i) { s.at(p.y)[i] = x[i] - mean[i / p.C]; });
}

// --------------------------------------------------------------------------------- convolution

// A convolution's input, zero outside; mean: what is subtracted from every channel, or nullptr.
template <typename T>
struct ConvolutionInput {
  const T* data;
  const T* mean;
  int32_t C, H, W;

  __device__ T operator()(int32_t h, int32_t w, int32_t c) const {
    if (h < 0 || h >= H || w < 0 || w >= W) return T(0);
    const int32_t pixel = h * W + w;
    return mean == nullptr ? data[pixel * C + c] : data[pixel * C + c] - mean[pixel];
  }
};

// Adds one input channel's part to the 2 x 2 outputs whose first input is (h0, w0); weight(k) gives
// the channel's weights. K is the size of a square kernel that was compiled for, or 0.
template <int K, typename T, typename W>
__device__ __forceinline__ void correlate(T (&sum)[4], const ConvolutionInput<T>& in, int32_t c,
                                          int32_t h0, int32_t w0, int32_t kernel_h,
                                          int32_t kernel_w, const W& weight) {
  if constexpr (K == 0) {
    for (int32_t kh = 0; kh < kernel_h; ++kh) {
      for (int32_t kw = 0; kw < kernel_w; ++kw) {
        const T a = weight(kh * kernel_w + kw);
        sum[0] += a * in(h0 + kh, w0 + kw, c);
        sum[1] += a * in(h0 + kh, w0 + kw + 1, c);
        sum[2] += a * in(h0 + kh + 1, w0 + kw, c);
        sum[3] += a * in(h0 + kh + 1, w0 + kw + 1, c);
      }
    }
  } else {
    // A row of the input serves two rows of weights: the one it came with, and the one before.
    T before[K] = {};
#pragma unroll
    for (int r = 0; r <= K; ++r) {
      T now[K];
#pragma unroll
      for (int k = 0; k < K; ++k) now[k] = r < K ? weight(r * K + k) : T(0);
      if (h0 + r >= 0 && h0 + r < in.H) {  // the same for all lanes, and half of a gradient's rows
        T x[K + 1];
#pragma unroll
        for (int q = 0; q <= K; ++q) x[q] = in(h0 + r, w0 + q, c);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          sum[0] += now[k] * x[k];
          sum[1] += now[k] * x[k + 1];
          sum[2] += before[k] * x[k];
          sum[3] += before[k] * x[k + 1];
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k) before[k] = now[k];
    }
  }
}

// The L2 norm of four numbers.
template <typename T>
__device__ __forceinline__ T norm_of_four(const T (&v)[4]) {
  const T sum = v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3]);
  if (is_safe_square_sum(sum)) return std::sqrt(sum);
  PoolGeometryOf<int32_t> g{};
  g.H = g.W = g.kernel_h = g.kernel_w = 2;
  g.OH = g.OW = g.stride_h = g.stride_w = 1;
  g.in_h = 2, g.in_w = 1;
  return scaled_window_norm<Norm::kTwo>(v, g, T(2), 0, 0);
}

// Writes a tile's outputs of channel o, and the pooled one, which it returns.
template <typename T>
__device__ __forceinline__ T store_tile(const Phase& p, const Step<T>& s, T (&v)[4], int32_t h,
                                        int32_t w, int32_t o) {
  const T bias = p.bias == kNowhere ? T(0) : s.at(p.bias)[o];
  T* y = s.at(p.y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t row = h + i / 2, column = w + i % 2;
    v[i] = activation_value(p.activation, v[i] + bias);
    if (row < p.OH && column < p.OW) y[(row * p.OW + column) * p.O + o] = v[i];
  }
  if (!p.fused_pool) return v[0];
  const T norm = norm_of_four(v);
  s.at(p.pooled)[(h / 2 * (p.OW / 2) + w / 2) * p.O + o] = norm;
  return norm;
}

// Tasks of one output channel and some tiles, a warp for a tile, lanes for input channels. Bound by
// reading: a lane reads (K + 1)^2 inputs and K^2 weights for 4 K^2 multiplications, the inputs in
// whole lines from the caches, the weights from the block's own memory.
template <int K, typename T>
__device__ void convolution_by_warps(const Phase& p, const Step<T>& s, int32_t block,
                                     int32_t blocks, const ConvolutionInput<T>& in, T* shared) {
  const int32_t taps = p.kernel_h * p.kernel_w, step = odd(taps);
  const int32_t lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  const Tiles tiles = tiles_of(p.OH, p.OW);
  const int32_t chunks = (tiles.count + p.per_task - 1) / p.per_task;
  const T* weights = s.at(p.weight);
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t o = task / chunks, begin = task % chunks * p.per_task;
    const int32_t end = begin + p.per_task < tiles.count ? begin + p.per_task : tiles.count;
    if (K > 0 || p.staged) {
      __syncthreads();  // the task before may still be reading
      for (int32_t i = thread_index(); i < p.C * taps; i += thread_count()) {
        shared[i / taps * step + i % taps] = weights[weight_index(p, o, i / taps, i % taps)];
      }
      __syncthreads();
    }
    for (int32_t tile = begin + thread_index() / kWarp; tile < end; tile += warps) {
      const int32_t h = tile / tiles.across * 2, w = tile % tiles.across * 2;
      T sum[4] = {};
      for (int32_t c = lane; c < p.C; c += kWarp) {
        if (K > 0 || p.staged) {
          const T* row = shared + c * step;
          correlate<K>(sum, in, c, h - p.padding_h, w - p.padding_w, p.kernel_h, p.kernel_w,
                       [&](int32_t k) { return row[k]; });
        } else {
          correlate<0>(sum, in, c, h - p.padding_h, w - p.padding_w, p.kernel_h, p.kernel_w,
                       [&](int32_t k) { return weights[weight_index(p, o, c, k)]; });
        }
      }
      for (auto& part : sum) part = lane_sum(part, kWarp);
      if (lane == 0) store_tile(p, s, sum, h, w, o);
    }
  });
}

// Tasks of some tiles and all output channels, a thread for a tile and a channel: for the few input
// channels of an image. All weights are in the block's own memory.
template <int K, typename T>
__device__ void convolution_by_threads(const Phase& p, const Step<T>& s, int32_t block,
                                       int32_t blocks, const ConvolutionInput<T>& in, T* shared) {
  const int32_t taps = p.kernel_h * p.kernel_w, step = odd(p.C * taps);
  for (int32_t i = thread_index(); i < p.O * p.C * taps; i += thread_count()) {
    const int32_t o = i / (p.C * taps), j = i % (p.C * taps);
    shared[o * step + j] = s.at(p.weight)[weight_index(p, o, j / taps, j % taps)];
  }
  T* partial = shared + p.O * step;  // sums over the channels of a warp
  __syncthreads();
  const int32_t lanes = (p.O + kWarp - 1) / kWarp * kWarp < thread_count()
                            ? (p.O + kWarp - 1) / kWarp * kWarp
                            : thread_count() / kWarp * kWarp;
  const int32_t group = thread_index() / lanes, first = thread_index() % lanes;
  const Tiles tiles = tiles_of(p.OH, p.OW);
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t tile = task * p.per_task + group;
    const bool mine = group < p.per_task && tile < tiles.count;
    const int32_t h = tile / tiles.across * 2, w = tile % tiles.across * 2;
    T total = T(0);
    if (mine) {
      for (int32_t o = first; o < p.O; o += lanes) {
        T sum[4] = {};
        for (int32_t c = 0; c < p.C; ++c) {
          const T* row = shared + o * step + c * taps;
          correlate<K>(sum, in, c, h - p.padding_h, w - p.padding_w, p.kernel_h, p.kernel_w,
                       [&](int32_t k) { return row[k]; });
        }
        total += store_tile(p, s, sum, h, w, o);
      }
    }
    if (p.channel_sum == kNowhere) return;
    total = lane_sum(total, kWarp);
    if (thread_index() % kWarp == 0) partial[thread_index() / kWarp] = total;
    __syncthreads();
    if (mine && first == 0) {
      T sum = T(0);
      for (int32_t i = 0; i < lanes / kWarp; ++i) sum += partial[group * (lanes / kWarp) + i];
      s.at(p.channel_sum)[tile] = sum;
    }
    __syncthreads();
  });
}

// The gradient of a convolution's output at one pixel and channel, from what its activation gave
// (y), the pooled value, and the gradient that comes from behind, less the normalization's plane.
template <typename T>
__device__ __forceinline__ T local_value(const LocalPlan& l, T y, T pooled, T g) {
  if (l.pooling) g *= norm_gradient<Norm::kTwo>(y, pooled, T(2));
  return activation_gradient(l.activation, g, y);
}

// A tiled convolution, forward or for the input's gradient. A task has two rows of the output and G
// output channels. The rows of the input that it needs go into the block's own memory, zeros where
// they reach into the padding's columns, and the weights of its channels. Then a warp has S columns
// of one of the rows and M of the output channels: its lanes take an input channel each, of 32, and
// rows of the kernel; S M sums stay in registers, and S + 4 inputs and 5 M weights feed 5 S M
// multiplications. What lanes, and then warps, have added up meets in the block's memory, in a
// fixed order.
template <int S, int G, int M, typename T>
__device__ void tiled_convolution(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                                  T* shared) {
  static_assert(G % M == 0);
  constexpr int K = kTile, kTaps = K * K, kSums = S * G, kPack = kPackSize<T>, kShares = G / M;
  constexpr int kFlipStep = (G * kTaps) | 1;
  const TilePlan& t = p.tile;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  const int32_t groups = (p.O + G - 1) / G, segments = (t.width - K + 1) / S;
  const int32_t chunks = p.C / kWarp, depth = chunks * t.parts;
  const int32_t channel_step = p.flip ? kFlipStep : kTaps;
  const int32_t output_step = p.flip ? kTaps : p.C * kTaps;
  const int32_t all_weights = p.flip ? p.C * kFlipStep : G * p.C * kTaps;
  const int32_t all_sums = 2 * segments * kSums;
  T* map = shared;  // (row, column, channel)
  T* weights = map + (K + 1) * t.width * p.C;
  T* sums = weights + (all_weights + 3) / 4 * 4;
  T* biases = sums + depth * all_sums;
  const bool local = p.local.present != 0;
  const T* x = local ? s.at(p.local.y) : s.map(p.x);
  const T* dy = local ? s.at(p.dy) : nullptr;
  const T* pooled = p.local.pooling ? s.at(p.local.pooled) : nullptr;
  const Divisor across(p.W), row_packs(p.W * p.C / kPack), row_numbers(p.W * p.C), by_chunk(chunks);

  // Of a task: its first output row and channel, the input's rows [first, last) that are there, and
  // the row in the padding or not that is the first one in `map`.
  struct Task {
    int32_t pair, group, top, first, last;
  };
  const auto task_at = [&](int32_t task) {
    Task k;
    k.pair = task / groups, k.group = task - k.pair * groups;
    k.top = 2 * k.pair - p.padding_h;
    k.first = k.top > 0 ? k.top : 0;
    k.last = k.top + K + 1 < p.H ? k.top + K + 1 : p.H;
    return k;
  };
  const auto stage = [&](const Task& k) {
    const int32_t packs = p.W * p.C / kPack;
    const T* from = x + k.first * p.W * p.C;
    T* to = map + ((k.first - k.top) * t.width + p.padding_w) * p.C;
    for (int32_t i = thread_index(); i < (k.last - k.first) * packs; i += thread_count()) {
      const int32_t row = row_packs.quotient(i);
      copy_pack<kPackSize<T>>(to + row * t.width * p.C + (i - row * packs) * kPack,
                              from + i * kPack);
    }
    const int32_t o = k.group * G, present = p.O - o < G ? p.O - o : G;
    if (p.flip) {
      // In the order of the transposed convolution, whose kernels are turned around.
      const T* source = s.at(p.weight) + o * kTaps;
      for (int32_t i = thread_index(); i < p.C * G * kTaps; i += thread_count()) {
        const int32_t c = i / (G * kTaps), j = i % (G * kTaps), g = j / kTaps;
        if (g < present) {
          copy_pack<1>(weights + c * kFlipStep + g * kTaps + kTaps - 1 - j % kTaps,
                       source + c * p.O * kTaps + j);
        }
      }
    } else {
      const T* source = s.at(p.weight) + o * p.C * kTaps;
      for (int32_t i = thread_index() * kPack; i < present * p.C * kTaps;
           i += thread_count() * kPack) {
        copy_pack<kPackSize<T>>(weights + i, source + i);
      }
    }
    if (p.bias != kNowhere && thread_index() < present) {
      copy_pack<1>(biases + thread_index(), s.at(p.bias) + o + thread_index());
    }
    const int32_t padding = t.width - p.W;
    for (int32_t i = warp; i < (k.last - k.first) * padding; i += warps) {
      const int32_t row = i / padding, j = i % padding;
      const int32_t column = j < p.padding_w ? j : j + p.W;
      T* at = map + ((k.first - k.top + row) * t.width + column) * p.C;
      for (int32_t c = lane; c < p.C; c += kWarp) at[c] = T(0);
    }
  };

  // Where the operand is a gradient that goes back through what is local: kAhead loads on their way
  // for 32 channels of a pixel each.
  constexpr int kAhead = 8;
  T ahead_dy[kAhead] = {}, ahead_pooled[kAhead] = {};
  const auto place = [&](const Task& k, int32_t unit, int32_t& behind, int32_t& at) {
    const int32_t i = by_chunk.quotient(unit), c = (unit - i * chunks) * kWarp + lane;
    const int32_t row = across.quotient(i), h = k.first + row, w = i - row * p.W;
    behind = p.local.pooling ? h / 2 * (p.W / 2) + w / 2 : h * p.W + w;
    at = ((h - k.top) * t.width + p.padding_w + w) * p.C + c;
    return behind * p.C + c;
  };
  const auto load_local = [&](const Task& k, int32_t first) {
    const int32_t units = (k.last - k.first) * p.W * chunks;
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int32_t unit = first + q * warps;
      if (unit >= units) continue;
      int32_t behind, at;
      const int32_t from = place(k, unit, behind, at);
      ahead_dy[q] = dy[from];
      if (pooled != nullptr) ahead_pooled[q] = pooled[from];
    }
  };

  if (block < p.tasks) {
    const Task k = task_at(block);
    stage(k);
    if (local) load_local(k, warp);
  }
  const T* mean = prepare_mean(local ? p.local.blur : p.blur, s, local ? dy : x, shared + t.memory);
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const Task k = task_at(task);
    if (task != block) {
      __syncthreads();  // the task before may still be reading
      stage(k);
      if (local) load_local(k, warp);
    }
    wait_for_copies();
    __syncthreads();
    if (local) {
      const int32_t units = (k.last - k.first) * p.W * chunks;
      for (int32_t first = warp; first < units; first += kAhead * warps) {
        if (first != warp) load_local(k, first);
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int32_t unit = first + q * warps;
          if (unit >= units) continue;
          int32_t behind, at;
          place(k, unit, behind, at);
          const T g = mean == nullptr ? ahead_dy[q] : ahead_dy[q] - mean[behind];
          map[at] = local_value(p.local, map[at], ahead_pooled[q], g);
        }
      }
      __syncthreads();
    } else if (mean != nullptr) {
      for (int32_t i = warp; i < (k.last - k.first) * p.W; i += warps) {
        const int32_t row = across.quotient(i), h = k.first + row, w = i - row * p.W;
        T* at = map + ((h - k.top) * t.width + p.padding_w + w) * p.C;
        const T m = mean[h * p.W + w];
        for (int32_t c = lane; c < p.C; c += kWarp) at[c] -= m;
      }
      __syncthreads();
      // The normalized input is left for the update: each row by the tasks of its pair of rows.
      const int32_t begin = k.pair == 0 ? 0 : k.first;
      const int32_t next = k.top + 2 > 0 ? k.top + 2 : 0;
      const int32_t end = 2 * k.pair + 2 >= p.OH || next > p.H ? p.H : next;
      T* flat = s.at(p.flat) + begin * p.W * p.C;
      for (int32_t i = k.group * thread_count() + thread_index(); i < (end - begin) * p.W * p.C;
           i += groups * thread_count()) {
        const int32_t row = row_numbers.quotient(i);
        flat[i] = map[((begin + row - k.top) * t.width + p.padding_w) * p.C + i - row * p.W * p.C];
      }
    }
    for (int32_t unit = warp; unit < depth * 2 * segments * kShares; unit += warps) {
      const int32_t place_of_sums = unit / kShares, m = unit % kShares * M;
      const int32_t d = place_of_sums / (2 * segments), j = place_of_sums - d * 2 * segments;
      const int32_t r = j >= segments, segment = j - r * segments;
      const int32_t part = d / chunks, c = (d - part * chunks) * kWarp + lane;
      T sum[S * M] = {};
      const int32_t kh_end = (part + 1) * K / t.parts;
      for (int32_t kh = part * K / t.parts; kh < kh_end; ++kh) {
        const int32_t h = k.top + r + kh;
        if (h < 0 || h >= p.H) continue;
        const T* from = map + ((r + kh) * t.width + segment * S) * p.C + c;
        const T* weight = weights + c * channel_step + m * output_step + kh * K;
        T in[S + K - 1];
#pragma unroll
        for (int i = 0; i < S + K - 1; ++i) in[i] = from[i * p.C];
#pragma unroll
        for (int g = 0; g < M; ++g) {
#pragma unroll
          for (int kw = 0; kw < K; ++kw) {
            const T a = weight[g * output_step + kw];
#pragma unroll
            for (int i = 0; i < S; ++i) sum[i * M + g] += a * in[i + kw];
          }
        }
      }
      const T total = lane_sums(sum, lane);
      if (lane < S * M) sums[place_of_sums * kSums + lane / M * G + m + lane % M] = total;
    }
    __syncthreads();
    for (int32_t i = thread_index(); i < all_sums; i += thread_count()) {
      const int32_t at = i / kSums, r = at >= segments, g = i % kSums % G;
      const int32_t row = 2 * k.pair + r, o = k.group * G + g;
      const int32_t column = (at - r * segments) * S + i % kSums / G;
      T value = sums[i];
      for (int32_t d = 1; d < depth; ++d) value += sums[d * all_sums + i];
      const bool inside = row < p.OH && column < p.OW && o < p.O;
      if (!inside) {
        value = T(0);
      } else {
        if (p.bias != kNowhere) value += biases[g];
        if (!p.flip) value = activation_value(p.activation, value);
        s.at(p.y)[(row * p.OW + column) * p.O + o] = value;
      }
      sums[i] = value;
    }
    if (!p.fused_pool && t.group_sum == kNowhere) return;
    __syncthreads();
    const auto value_at = [&](int32_t r, int32_t column, int32_t g) {
      return sums[(r * segments + column / S) * kSums + column % S * G + g];
    };
    if (p.fused_pool) {
      for (int32_t i = thread_index(); i < p.OW / 2 * G; i += thread_count()) {
        const int32_t g = i % G, w = i / G * 2, o = k.group * G + g;
        if (o >= p.O) continue;
        const T v[4] = {value_at(0, w, g), value_at(0, w + 1, g), value_at(1, w, g),
                        value_at(1, w + 1, g)};
        s.at(p.pooled)[(k.pair * (p.OW / 2) + w / 2) * p.O + o] = norm_of_four(v);
      }
    }
    if (t.group_sum != kNowhere) {
      for (int32_t i = thread_index(); i < 2 * p.OW; i += thread_count()) {
        const int32_t r = i >= p.OW, column = i - r * p.OW, row = 2 * k.pair + r;
        if (row >= p.OH) continue;
        T sum = T(0);
#pragma unroll
        for (int g = 0; g < G; ++g) sum += value_at(r, column, g);
        s.at(t.group_sum)[(k.group * p.OH + row) * p.OW + column] = sum;
      }
    }
  });
}

// Takes a map of few channels into the block's own memory as planes with their padding.
template <typename T>
__device__ __forceinline__ void stage_planes(const Phase& p, const T* x, T* planes) {
  const int32_t height = p.H + 2 * p.padding_h, width = p.W + 2 * p.padding_w;
  const Divisor across(width);
  for (int32_t i = thread_index(); i < height * width; i += thread_count()) {
    const int32_t row = across.quotient(i), h = row - p.padding_h;
    const int32_t w = i - row * width - p.padding_w;
    const bool inside = h >= 0 && h < p.H && w >= 0 && w < p.W;
    for (int32_t c = 0; c < p.C; ++c) {
      T* to = planes + c * height * width + i;
      if (inside) {
        copy_pack<1>(to, x + (h * p.W + w) * p.C + c);
      } else {
        *to = T(0);
      }
    }
  }
}

// A convolution of few input channels: a task is some tiles of 2 x 2 outputs and all channels, a
// thread an output. The whole input and all weights are in the block's own memory.
template <int K, typename T>
__device__ void first_convolution(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                                  T* shared) {
  const int32_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int32_t taps = p.C * kernel_h * kernel_w, step = odd(taps);
  const int32_t height = p.H + 2 * p.padding_h, width = p.tile.width;
  const int32_t lanes = (p.O + kWarp - 1) / kWarp * kWarp, lane = thread_index() % kWarp;
  const Divisor by_taps(taps), by_lanes(lanes), by_width(p.W);
  T* weights = shared;
  T* planes = weights + p.O * step;
  T* values = planes + p.C * height * width;
  T* partial = values + p.tile.group * 4 * p.O;
  T* biases = partial + p.tile.group * (lanes / kWarp);
  const T* x = s.map(p.x);
  stage_planes(p, x, planes);
  for (int32_t i = thread_index(); i < p.O * taps; i += thread_count()) {
    const int32_t o = by_taps.quotient(i);
    copy_pack<1>(weights + o * step + i - o * taps, s.at(p.weight) + i);
  }
  if (p.bias != kNowhere) {
    for (int32_t o = thread_index(); o < p.O; o += thread_count()) {
      copy_pack<1>(biases + o, s.at(p.bias) + o);
    }
  }
  const T* mean = prepare_mean(p.blur, s, x, shared + p.tile.memory);
  wait_for_copies();
  __syncthreads();
  if (mean != nullptr) {
    for (int32_t i = thread_index(); i < p.H * p.W; i += thread_count()) {
      const int32_t h = by_width.quotient(i), w = i - h * p.W;
      for (int32_t c = 0; c < p.C; ++c) {
        T& at = planes[(c * height + h + p.padding_h) * width + w + p.padding_w];
        at -= mean[i];
        if (block == 0) s.at(p.flat)[i * p.C + c] = at;
      }
    }
    __syncthreads();
  }
  const Tiles tiles = tiles_of(p.OH, p.OW);
  const Divisor across(tiles.across);
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t first = task * p.tile.group;
    const int32_t count = tiles.count - first < p.tile.group ? tiles.count - first : p.tile.group;
    if (task != block) __syncthreads();  // the task before may still be reading
    for (int32_t i = thread_index(); i < count * 4 * lanes; i += thread_count()) {
      const int32_t j = by_lanes.quotient(i), o = i - j * lanes, tile = first + j / 4;
      if (o >= p.O) continue;
      const int32_t tile_row = across.quotient(tile);
      const int32_t row = tile_row * 2 + j % 4 / 2;
      const int32_t column = (tile - tile_row * tiles.across) * 2 + j % 2;
      if (row >= p.OH || column >= p.OW) continue;
      T sum = p.bias == kNowhere ? T(0) : biases[o];
      for (int32_t c = 0; c < p.C; ++c) {
        const T* weight = weights + o * step + c * kernel_h * kernel_w;
        const T* from = planes + (c * height + row) * width + column;
#pragma unroll
        for (int32_t kh = 0; kh < kernel_h; ++kh) {
#pragma unroll
          for (int32_t kw = 0; kw < kernel_w; ++kw) {
            sum += weight[kh * kernel_w + kw] * from[kh * width + kw];
          }
        }
      }
      sum = activation_value(p.activation, sum);
      s.at(p.y)[(row * p.OW + column) * p.O + o] = sum;
      values[j * p.O + o] = sum;
    }
    if (!p.fused_pool) return;
    __syncthreads();
    for (int32_t i = thread_index(); i < count * lanes; i += thread_count()) {
      const int32_t j = by_lanes.quotient(i), o = i - j * lanes;
      T norm = T(0);
      if (o < p.O) {
        const T* v = values + j * 4 * p.O + o;
        const T window[4] = {v[0], v[p.O], v[2 * p.O], v[3 * p.O]};
        norm = norm_of_four(window);
        s.at(p.pooled)[(first + j) * p.O + o] = norm;
      }
      if (p.channel_sum == kNowhere) continue;
      norm = lane_sum(norm, kWarp);
      if (lane == 0) partial[i / kWarp] = norm;
    }
    if (p.channel_sum == kNowhere) return;
    __syncthreads();
    for (int32_t i = thread_index(); i < count; i += thread_count()) {
      T sum = T(0);
      for (int32_t j = 0; j < lanes / kWarp; ++j) sum += partial[i * (lanes / kWarp) + j];
      s.at(p.channel_sum)[first + i] = sum;
    }
  });
}

template <typename T>
__device__ void convolution(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                            T* shared) {
  if (p.tile.group != 0) {
    if (!p.split) {
      return p.kernel_h == 5 && p.kernel_w == 5 ? first_convolution<5>(p, s, block, blocks, shared)
                                                : first_convolution<0>(p, s, block, blocks, shared);
    }
    if (p.tile.group == 3) return tiled_convolution<5, 3, 3>(p, s, block, blocks, shared);
    return p.tile.segment == 5 ? tiled_convolution<5, 4, 2>(p, s, block, blocks, shared)
                               : tiled_convolution<7, 4, 2>(p, s, block, blocks, shared);
  }
  const T* x = s.map(p.x);
  const T* mean = prepare_mean(p.blur, s, x, shared);
  const ConvolutionInput<T> in{x, mean, p.C, p.H, p.W};
  if (mean != nullptr) {
    shared += mean_numbers(p.blur);
    // Each block leaves a part of the normalized input for the update.
    const int32_t parts = p.tasks < blocks ? p.tasks : blocks;
    for (int32_t i = block * thread_count() + thread_index(); i < p.C * p.H * p.W;
         i += parts * thread_count()) {
      s.at(p.flat)[i] = x[i] - mean[i / p.C];
    }
  }
  const bool square = p.kernel_h == p.kernel_w && p.staged;
  if (p.split) {
    if (square && p.kernel_h == 5) {
      convolution_by_warps<5>(p, s, block, blocks, in, shared);
    } else if (square && p.kernel_h == 3) {
      convolution_by_warps<3>(p, s, block, blocks, in, shared);
    } else {
      convolution_by_warps<0>(p, s, block, blocks, in, shared);
    }
  } else if (square && p.kernel_h == 5) {
    convolution_by_threads<5>(p, s, block, blocks, in, shared);
  } else {
    convolution_by_threads<0>(p, s, block, blocks, in, shared);
  }
}

// The same with its operands read: y, pooled and dy are maps of C channels, W columns wide (pooled
// and dy: W / 2, behind a pooling), and mean the normalization's plane, or nullptr.
template <typename T>
__device__ __forceinline__ T local_gradient(const LocalPlan& l, const T* y, const T* pooled,
                                            const T* dy, const T* mean, int32_t h, int32_t w,
                                            int32_t W, int32_t c, int32_t C) {
  const int32_t pixel = h * W + w;
  const int32_t behind = l.pooling ? h / 2 * (W / 2) + w / 2 : pixel;
  T g = dy[behind * C + c];
  if (mean != nullptr) g -= mean[behind];
  return local_value(l, y[pixel * C + c], l.pooling ? pooled[behind * C + c] : T(0), g);
}

template <typename T>
__device__ void local_backward(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                               T* shared) {
  const T* dy = s.at(p.dy);
  const T* mean = prepare_mean(p.local.blur, s, dy, shared);
  const T* pooled = p.local.pooling ? s.at(p.local.pooled) : nullptr;
  each_element(p, p.C * p.H * p.W, block, blocks, [&](int32_t i) {
    const int32_t pixel = i / p.C;
    s.at(p.dx)[i] = local_gradient(p.local, s.at(p.local.y), pooled, dy, mean, pixel / p.W,
                                   pixel % p.W, p.W, i % p.C, p.C);
  });
}

// The gradient of output channel o of a convolution as a plane in the block's own memory, rows
// `columns` apart, zeros behind them. mean() gives the plane of the normalization; it is called
// when the first loads are on their way.
template <typename T, typename Mean>
__device__ __forceinline__ void make_plane(const Phase& p, const Step<T>& s, int32_t o,
                                           int32_t columns, T* plane, const Mean& mean) {
  constexpr int kAhead = 2;
  const bool local = p.local.present != 0;
  const T* dy = s.at(p.dy) + o;
  const T* y = local ? s.at(p.local.y) + o : nullptr;
  const T* pooled = p.local.pooling ? s.at(p.local.pooled) + o : nullptr;
  const Divisor across(columns);
  struct Operands {
    T y, pooled, dy;
    int32_t behind;
  };
  const auto load = [&](int32_t i) {
    Operands a{};
    const int32_t h = across.quotient(i), w = i - h * columns;
    if (h >= p.OH || w >= p.OW) return a;
    a.behind = p.local.pooling ? h / 2 * (p.OW / 2) + w / 2 : h * p.OW + w;
    a.dy = dy[a.behind * p.O];
    if (local) a.y = y[(h * p.OW + w) * p.O];
    if (pooled != nullptr) a.pooled = pooled[a.behind * p.O];
    return a;
  };
  const auto finish = [&](int32_t i, const Operands& a, const T* m) {
    const int32_t h = across.quotient(i), w = i - h * columns;
    if (h >= p.OH) return;
    T g = a.dy;
    if (local) g = local_value(p.local, a.y, a.pooled, m == nullptr ? a.dy : a.dy - m[a.behind]);
    plane[i] = w < p.OW ? g : T(0);
  };
  Operands ahead[kAhead];
#pragma unroll
  for (int q = 0; q < kAhead; ++q) ahead[q] = load(thread_index() + q * thread_count());
  const T* m = mean();
#pragma unroll
  for (int q = 0; q < kAhead; ++q) finish(thread_index() + q * thread_count(), ahead[q], m);
  for (int32_t i = thread_index() + kAhead * thread_count(); i < p.OH * columns;
       i += thread_count()) {
    finish(i, load(i), m);
  }
}

// The last warp changes a bias by the sum over the plane; `old` is for its first lane.
template <typename T>
__device__ __forceinline__ void update_bias(const Phase& p, const Step<T>& s,
                                            const Update<T>& update, int32_t o, T old,
                                            const T* plane, int32_t numbers) {
  if (p.bias == kNowhere || thread_index() / kWarp != thread_count() / kWarp - 1) return;
  T sum = T(0);
  for (int32_t i = thread_index() % kWarp; i < numbers; i += kWarp) sum += plane[i];
  sum = lane_sum(sum, kWarp);
  if (thread_index() % kWarp != 0) return;
  update.one(old, s.velocity(p.bias + o), sum);
  s.at(p.bias)[o] = old;
}

// A tiled update. A task has an output channel, whose gradient plane goes into the block's own
// memory, and some of the input channels, which go there too. A warp takes 32 of them, a row of the
// kernel and a part of the output's rows: each lane slides the kernel's 5 columns along the rows.
// The parts are added up in a fixed order, and all threads change the weights, which lie together.
template <typename T>
__device__ void tiled_update(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                             T* shared) {
  constexpr int K = kTile, kTaps = K * K, kPack = kPackSize<T>, kColumn = 4, kOld = 4;
  const TilePlan& t = p.tile;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  const int32_t pieces = p.C / t.group, chunks = t.group / kWarp, columns = t.width - K + 1;
  const int32_t packs = t.group / kPack, pixels = p.H * p.W, count = t.group * kTaps;
  T* map = shared;  // (row, column, channel)
  T* plane = map + p.H * t.width * t.group;
  T* partial = plane + p.OH * columns;
  const T* x = s.map(p.x);
  const T* dy = s.at(p.dy);
  const Divisor by_pack(packs), across(p.W);
  const double steps = s.steps_before();
  Update<T> update{};
  const T* mean = nullptr;
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t o = task / pieces, c0 = (task - o * pieces) * t.group;
    const int64_t first_weight = p.weight + static_cast<int64_t>(o * p.C + c0) * kTaps;
    if (task != block) __syncthreads();  // the task before may still be reading
    for (int32_t i = thread_index(); i < pixels * packs; i += thread_count()) {
      const int32_t pixel = by_pack.quotient(i), at = (i - pixel * packs) * kPack;
      const int32_t h = across.quotient(pixel), w = pixel - h * p.W;
      copy_pack<kPackSize<T>>(map + (h * t.width + w + p.padding_w) * t.group + at,
                              x + pixel * p.C + c0 + at);
    }
    T old[kOld] = {}, old_bias = T(0);
#pragma unroll
    for (int q = 0; q < kOld; ++q) {
      const int32_t i = thread_index() + q * thread_count();
      if (i < count) old[q] = s.at(first_weight)[i];
    }
    const bool has_bias = p.bias != kNowhere && c0 == 0;
    if (has_bias && thread_index() == thread_count() - kWarp) old_bias = s.at(p.bias)[o];
    const int32_t padding = t.width - p.W;
    for (int32_t i = warp; i < p.H * padding; i += warps) {
      const int32_t h = i / padding, j = i - h * padding;
      T* at = map + (h * t.width + (j < p.padding_w ? j : j + p.W)) * t.group;
      for (int32_t c = lane; c < t.group; c += kWarp) at[c] = T(0);
    }
    make_plane(p, s, o, columns, plane, [&] {
      if (task == block) {
        mean = prepare_mean(p.local.blur, s, dy, shared + t.memory);
        update = s.update(steps);
      }
      return mean;
    });
    wait_for_copies();
    __syncthreads();
    for (int32_t unit = warp; unit < t.parts * chunks * K; unit += warps) {
      const int32_t group = unit / K, kh = unit - group * K;
      const int32_t part = group / chunks, c = (group - part * chunks) * kWarp + lane;
      T sum[K] = {};
      const int32_t last = (part + 1) * p.OH / t.parts;
      for (int32_t oh = part * p.OH / t.parts; oh < last; ++oh) {
        const int32_t h = oh + kh - p.padding_h;
        if (h < 0 || h >= p.H) continue;
        const T* from = map + h * t.width * t.group + c;
        const T* g_row = plane + oh * columns;
        T in[kColumn + K - 1];
#pragma unroll
        for (int i = 0; i < K - 1; ++i) in[i] = from[i * t.group];
        for (int32_t ow = 0; ow < columns; ow += kColumn) {
          T g[kColumn];
#pragma unroll
          for (int i = 0; i < kColumn; i += kPack) {
            const Pack<T, kPack> pack = load_pack<kPack>(g_row + ow + i);
#pragma unroll
            for (int j = 0; j < kPack; ++j) g[i + j] = pack.values[j];
          }
#pragma unroll
          for (int i = 0; i < kColumn; ++i) in[K - 1 + i] = from[(ow + K - 1 + i) * t.group];
#pragma unroll
          for (int i = 0; i < kColumn; ++i) {
#pragma unroll
            for (int kw = 0; kw < K; ++kw) sum[kw] += g[i] * in[i + kw];
          }
#pragma unroll
          for (int i = 0; i < K - 1; ++i) in[i] = in[i + kColumn];
        }
      }
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        partial[(group * kTaps + kh * K + kw) * (kWarp + 1) + lane] = sum[kw];
      }
    }
    __syncthreads();
    const auto change = [&](int32_t i, T weight) {
      const int32_t c = i / kTaps, k = i - c * kTaps;
      const T* part = partial + (c / kWarp * kTaps + k) * (kWarp + 1) + c % kWarp;
      T sum = T(0);
      for (int32_t j = 0; j < t.parts; ++j) sum += part[j * chunks * kTaps * (kWarp + 1)];
      T* velocity = s.velocity(first_weight);
      update.one(weight, velocity == nullptr ? nullptr : velocity + i, sum);
      s.at(first_weight)[i] = weight;
    };
#pragma unroll
    for (int q = 0; q < kOld; ++q) {
      const int32_t i = thread_index() + q * thread_count();
      if (i < count) change(i, old[q]);
    }
    for (int32_t i = thread_index() + kOld * thread_count(); i < count; i += thread_count()) {
      change(i, s.at(first_weight)[i]);
    }
    if (has_bias) update_bias(p, s, update, o, old_bias, plane, p.OH * columns);
  });
}

// The update of a convolution of few input channels: a task has an output channel. Its gradient
// plane and the whole input are in the block's own memory; the lanes of a warp take the columns of
// a row, each with a sum for all 25 weights of an input channel, which lanes and then warps add up.
template <typename T>
__device__ void first_update(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                             T* shared) {
  constexpr int K = kTile, kTaps = K * K;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  const int32_t height = p.H + 2 * p.padding_h, width = p.tile.width;
  T* planes = shared;
  T* plane = planes + p.C * height * width;
  T* partial = plane + p.OH * p.OW;
  const double steps = s.steps_before();
  Update<T> update{};
  const T* mean = nullptr;
  stage_planes(p, s.map(p.x), planes);
  each_task(p.tasks, block, blocks, [&](int32_t o) {
    const int64_t first_weight = p.weight + static_cast<int64_t>(o) * p.C * kTaps;
    if (o != block) __syncthreads();  // the task before may still be reading
    T old = T(0), old_bias = T(0);
    if (thread_index() < kTaps) old = s.at(first_weight)[thread_index()];
    if (p.bias != kNowhere && thread_index() == thread_count() - kWarp) {
      old_bias = s.at(p.bias)[o];
    }
    make_plane(p, s, o, p.OW, plane, [&] {
      if (o == block) {
        mean = prepare_mean(p.local.blur, s, s.at(p.dy), shared + p.tile.memory);
        update = s.update(steps);
      }
      return mean;
    });
    wait_for_copies();
    __syncthreads();
    for (int32_t c = 0; c < p.C; ++c) {
      T sum[kTaps] = {};
      for (int32_t oh = warp; oh < p.OH; oh += warps) {
        for (int32_t ow = lane; ow < p.OW; ow += kWarp) {
          const T g = plane[oh * p.OW + ow];
          const T* from = planes + (c * height + oh) * width + ow;
#pragma unroll
          for (int k = 0; k < kTaps; ++k) sum[k] += g * from[k / K * width + k % K];
        }
      }
      const T total = lane_sums(sum, lane);
      partial[warp * kWarp + lane] = total;
      __syncthreads();
      if (thread_index() < kTaps) {
        T gradient = T(0);
        for (int32_t j = 0; j < warps; ++j) gradient += partial[j * kWarp + thread_index()];
        const int64_t at = first_weight + c * kTaps + thread_index();
        T weight = c == 0 ? old : *s.at(at);
        update.one(weight, s.velocity(at), gradient);
        *s.at(at) = weight;
      }
      if (c + 1 < p.C) __syncthreads();
    }
    update_bias(p, s, update, o, old_bias, plane, p.OH * p.OW);
  });
}

// The gradients of K weights of one row of the kernel, for one input channel; inside: no column of
// the input lies in the padding.
template <int K, bool inside, typename T>
__device__ __forceinline__ void row_gradient(T (&sum)[K], const Phase& p, const T* map, const T* d,
                                             int32_t d_step, int32_t c, int32_t kh) {
  for (int32_t oh = 0; oh < p.OH; ++oh) {
    const int32_t h = oh + kh - p.padding_h;
    if (h < 0 || h >= p.H) continue;
    const T* row = map + h * p.W * p.C + c;
    const auto at = [&](int32_t w) {
      if constexpr (inside) {
        return row[w * p.C];
      } else {
        const int32_t column = w - p.padding_w;
        return column >= 0 && column < p.W ? row[column * p.C] : T(0);
      }
    };
    T x[K];
#pragma unroll
    for (int k = 0; k < K - 1; ++k) x[k] = at(k);
#pragma unroll K
    for (int32_t ow = 0; ow < p.OW; ++ow) {
      x[K - 1] = at(ow + K - 1);
      const T g = d[(oh * p.OW + ow) * d_step];
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] += g * x[k];
#pragma unroll
      for (int k = 0; k < K - 1; ++k) x[k] = x[k + 1];
    }
  }
}

template <int K, typename T>
__device__ __forceinline__ void update_rows(const Phase& p, const Step<T>& s,
                                            const ConvolutionInput<T>& in, const T* d,
                                            int32_t d_step, int32_t o, const Update<T>& update) {
  for (int32_t i = thread_index(); i < p.C * K; i += thread_count()) {
    const int32_t c = i % p.C, kh = i / p.C;
    T sum[K] = {};
    if (p.padding_w == 0) {
      row_gradient<K, true>(sum, p, in.data, d, d_step, c, kh);
    } else {
      row_gradient<K, false>(sum, p, in.data, d, d_step, c, kh);
    }
    const int64_t first = p.weight + (o * p.C + c) * K * K + kh * K;
    T* velocity = s.velocity(first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      update.one(s.at(first)[k], velocity == nullptr ? nullptr : velocity + k, sum[k]);
    }
  }
}

// A task is an output channel: its gradient plane goes into the block's own memory, then a thread
// makes the gradients of a row of weights for one input channel, neighbouring threads neighbouring
// channels, and applies them. With few input channels threads share the pixels of one weight.
template <typename T>
__device__ void convolution_update(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                                   T* shared) {
  if (block >= p.tasks) return;
  if (p.tile.group != 0) {
    return p.tile.group == p.C && p.C < kWarp ? first_update(p, s, block, blocks, shared)
                                              : tiled_update(p, s, block, blocks, shared);
  }
  const int32_t pixels = p.OH * p.OW, taps = p.kernel_h * p.kernel_w, weights = p.C * taps;
  const T* dy = s.at(p.dy);
  const T* mean = prepare_mean(p.local.blur, s, dy, shared);
  const ConvolutionInput<T> in{s.map(p.x), nullptr, p.C, p.H, p.W};
  T* plane = shared + (mean != nullptr ? mean_numbers(p.local.blur) : 0);
  T* partial = plane + (p.staged ? pixels : 0);
  const T* pooled = p.local.pooling ? s.at(p.local.pooled) : nullptr;
  const Update<T> update = s.update(s.steps_before());
  each_task(p.tasks, block, blocks, [&](int32_t o) {
    const T* d = dy + o;
    int32_t d_step = p.O;
    if (p.staged) {
      __syncthreads();  // the task before may still be reading
      for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
        plane[i] = p.local.present ? local_gradient(p.local, s.at(p.local.y), pooled, dy, mean,
                                                    i / p.OW, i % p.OW, p.OW, o, p.O)
                                   : d[i * p.O];
      }
      __syncthreads();
      d = plane, d_step = 1;
    }
    const int32_t groups = p.staged ? thread_count() / weights : 0;
    if (p.C >= 16 && p.kernel_h == 5 && p.kernel_w == 5) {
      update_rows<5>(p, s, in, d, d_step, o, update);
    } else if (p.C >= 16 && p.kernel_h == 3 && p.kernel_w == 3) {
      update_rows<3>(p, s, in, d, d_step, o, update);
    } else {
      // Thread (group, weight); one group where there are more weights than threads.
      const int32_t step = groups < 2 ? thread_count() : weights;
      const int32_t group = groups < 2 ? 0 : thread_index() / weights;
      const int32_t first = groups < 2 ? thread_index() : thread_index() % weights;
      for (int32_t i = first; i < weights && (groups < 2 || group < groups); i += step) {
        const int32_t c = i / taps, kh = i % taps / p.kernel_w, kw = i % p.kernel_w;
        T sum = T(0);
        for (int32_t pixel = group; pixel < pixels; pixel += groups < 2 ? 1 : groups) {
          sum += d[pixel * d_step] *
                 in(pixel / p.OW + kh - p.padding_h, pixel % p.OW + kw - p.padding_w, c);
        }
        if (groups < 2) {
          const int64_t at = p.weight + o * weights + i;
          update.one(*s.at(at), s.velocity(at), sum);
        } else {
          partial[group * weights + i] = sum;
        }
      }
      if (groups >= 2) {
        __syncthreads();
        for (int32_t i = thread_index(); i < weights; i += thread_count()) {
          T sum = T(0);
          for (int32_t j = 0; j < groups; ++j) sum += partial[j * weights + i];
          const int64_t at = p.weight + o * weights + i;
          update.one(*s.at(at), s.velocity(at), sum);
        }
      }
    }
    // The last warp, which had the least to do.
    const int32_t lane = thread_index() % kWarp;
    if (p.bias != kNowhere && thread_index() / kWarp == thread_count() / kWarp - 1) {
      T sum = T(0);
      for (int32_t i = lane; i < pixels; i += kWarp) sum += d[i * d_step];
      sum = lane_sum(sum, kWarp);
      if (lane == 0) update.one(*s.at(p.bias + o), s.velocity(p.bias + o), sum);
    }
  });
}

// ------------------------------------------------------------------------ log-softmax and losses

// Log-probabilities of n scores in the block's own memory or the workspace, by the first warp.
template <typename T>
__device__ void log_softmax(LogSoftmaxKind kind, double beta, const T* x, T* l, int32_t n) {
  if (thread_index() >= kWarp) return;
  if (kind == LogSoftmaxKind::kExact) {
    const Differences<T> difference(beta);
    T largest = -std::numeric_limits<T>::infinity(), sum = T(0);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      const T scaled = difference.scaled(x[i]);
      largest = scaled > largest ? scaled : largest;
    }
    largest = lane_max(largest, kWarp);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      sum += elementary::exp(difference(x[i], largest));
    }
    const T log_sum = std::log(lane_sum(sum, kWarp));
    for (int32_t i = thread_index(); i < n; i += kWarp) l[i] = difference(x[i], largest) - log_sum;
  } else {
    T largest = -std::numeric_limits<T>::infinity();
    for (int32_t i = thread_index(); i < n; i += kWarp) largest = x[i] > largest ? x[i] : largest;
    largest = lane_max(largest, kWarp);
    double sum = 0;
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      sum += exp_minus(static_cast<double>(largest - x[i]));
    }
    const double total = static_cast<double>(largest) + std::log(lane_sum(sum, kWarp));
    for (int32_t i = thread_index(); i < n; i += kWarp) l[i] = static_cast<T>(x[i] - total);
  }
}

// The gradient of the scores from that of the log-probabilities, by the first warp.
template <typename T>
__device__ void log_softmax_backward(LogSoftmaxKind kind, double beta, const T* l, const T* g,
                                     T* dx, int32_t n) {
  if (thread_index() >= kWarp) return;
  if (kind == LogSoftmaxKind::kExact) {
    T sum = T(0);
    for (int32_t i = thread_index(); i < n; i += kWarp) sum += g[i];
    sum = lane_sum(sum, kWarp);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      dx[i] = log_softmax_gradient(g[i], l[i], sum, static_cast<T>(beta));
    }
  } else {
    double sum = 0;
    for (int32_t i = thread_index(); i < n; i += kWarp) sum += static_cast<double>(g[i]);
    sum = lane_sum(sum, kWarp);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      dx[i] = torch7_log_softmax_gradient(g[i], l[i], sum);
    }
  }
}

// The loss of the network's output, whose gradient goes to g, by the first warp: lane 0 knows the
// loss, and all lanes must know the target.
template <typename T>
__device__ __forceinline__ T loss_of_warp(const Step<T>& s, const T* output, T* g, int32_t n,
                                          int32_t target) {
  T loss = T(0);
  if (s.run.loss == Loss::kNll) {
    for (int32_t i = thread_index(); i < n; i += kWarp) g[i] = i == target ? T(-1) : T(0);
    loss = -output[target];
  } else if (thread_index() == 0) {
    loss = loss_and_gradient(s.run.loss, output, n, target, g);
  }
  __syncwarp();
  return loss;
}

template <typename T>
__device__ void loss_phase(const Phase& p, const Step<T>& s, int32_t block) {
  if (block != 0) return;
  const T* output = s.map(p.x);
  const int64_t at = s.model * s.run.count + s.index;
  if (thread_index() < kWarp) {
    const T loss = loss_of_warp(s, output, s.at(p.dy), p.C, s.target());
    if (thread_index() == 0) s.run.losses[at] = loss;
  }
  // Another warp, where there is one.
  if (thread_index() == thread_count() - 1) s.run.predictions[at] = predicted_class(output, p.C);
}

// ------------------------------------------------------------------------------- fully connected

// The sum over the block, for thread 0: shared has a number for each warp.
template <typename T>
__device__ __forceinline__ T sum_of_block(T value, T* shared) {
  const int32_t lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  value = lane_sum(value, kWarp);
  if (lane == 0) shared[thread_index() / kWarp] = value;
  __syncthreads();
  if (thread_index() >= kWarp) return T(0);
  return lane_sum(lane < warps ? shared[lane] : T(0), kWarp);
}

// A task is an output, or a warp's worth of them. The first one's weights are on their way before
// anything else is looked at.
template <typename T>
__device__ void linear(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks, T* shared) {
  if (block >= p.tasks) return;
  constexpr int kAhead = 4;
  const T* x = s.map(p.x);
  T ahead[kAhead] = {}, ahead_bias = T(0);
  if (p.per_task == 1) {
    const T* row = s.at(p.weight) + static_cast<int64_t>(block) * p.C;
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int32_t i = thread_index() + q * thread_count();
      if (i < p.C) ahead[q] = row[i];
    }
    if (p.bias != kNowhere && thread_index() == 0) ahead_bias = s.at(p.bias)[block];
  }
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  if (p.permute) {
    const BlurPlan& b = p.blur;
    const int32_t pixels = p.H * p.W, channels = p.C / pixels;
    const Divisor by_channel(channels), by_pixel(pixels);
    const bool sums = b.source == MeanSource::kMap;  // of what is in `vector` already
    const T* mean = nullptr;
    T* vector = shared;
    shared += p.C;
    const T own_coef = load_blur(b, s, shared);
    for (int32_t i = thread_index(); i < p.C; i += thread_count()) {
      const int32_t pixel = by_channel.quotient(i);
      copy_pack<1>(vector + (i - pixel * channels) * pixels + pixel, x + i);
    }
    wait_for_copies();
    __syncthreads();
    if (sums) {
      for (int32_t i = warp; i < pixels; i += warps) {
        T total = T(0);
        for (int32_t c = lane; c < channels; c += kWarp) total += vector[c * pixels + i];
        total = lane_sum(total, kWarp);
        if (lane == 0) shared[i] = total;
      }
      mean = finish_mean(b, s, own_coef, shared);
    } else {
      mean = prepare_mean(b, s, x, shared);
    }
    if (mean != nullptr) {
      shared += mean_numbers(b);
      for (int32_t i = thread_index(); i < p.C; i += thread_count()) {
        vector[i] -= mean[i - by_pixel.quotient(i) * pixels];
      }
    }
    __syncthreads();
    // Each block leaves a part of the vector for the update.
    const int32_t parts = p.tasks < blocks ? p.tasks : blocks;
    for (int32_t i = block * thread_count() + thread_index(); i < p.C;
         i += parts * thread_count()) {
      s.at(p.flat)[i] = vector[i];
    }
    x = vector;
  }
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    if (p.per_task == 1) {  // the whole block for one output
      const T* row = s.at(p.weight) + static_cast<int64_t>(task) * p.C;
      if (task != block) {
        __syncthreads();  // the task before may still be reading
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int32_t i = thread_index() + q * thread_count();
          if (i < p.C) ahead[q] = row[i];
        }
        if (p.bias != kNowhere && thread_index() == 0) ahead_bias = s.at(p.bias)[task];
      }
      T sum = T(0);
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const int32_t i = thread_index() + q * thread_count();
        if (i < p.C) sum += ahead[q] * x[i];
      }
      for (int32_t i = thread_index() + kAhead * thread_count(); i < p.C; i += thread_count()) {
        sum += row[i] * x[i];
      }
      sum = sum_of_block(sum, shared);
      if (thread_index() == 0) {
        s.at(p.y)[task] = activation_value(p.activation, sum + ahead_bias);
      }
      return;
    }
    const int32_t o = task * warps + warp;
    if (o >= p.O) return;
    const T* row = s.at(p.weight) + static_cast<int64_t>(o) * p.C;
    T sum = T(0);
#pragma unroll 4
    for (int32_t i = lane; i < p.C; i += kWarp) sum += row[i] * x[i];
    sum = lane_sum(sum, kWarp);
    if (lane != 0) return;
    if (p.bias != kNowhere) sum += s.at(p.bias)[o];
    s.at(p.y)[o] = activation_value(p.activation, sum);
  });
}

// The last fully connected layer, log-softmax, loss, and back to the gradient of the layer's n
// inputs: a few thousand multiplications, which every block does for itself, the first warp what is
// as long as there are classes. start_head() asks for the operands, run_head() gives where the
// gradient lies in the block's own memory: each thread may read what it wrote itself, elements
// thread_index(), + thread_count(), ...
template <typename T>
__device__ __forceinline__ void start_head(const HeadPlan& head, const Step<T>& s, const T* input,
                                           int32_t n, T* shared) {
  T* x = shared;
  T* biases = x + 2 * n + 3 * head.classes;
  for (int32_t i = thread_index(); i < n; i += thread_count()) {
    copy_pack<1>(x + i, input + i);
  }
  for (int32_t i = thread_index(); i < head.classes; i += thread_count()) {
    if (head.bias == kNowhere) {
      biases[i] = T(0);
    } else {
      copy_pack<1>(biases + i, s.at(head.bias) + i);
    }
  }
  if (!head.staged) return;
  T* weights = biases + head.classes;
  for (int32_t i = thread_index(); i < n * head.classes; i += thread_count()) {
    copy_pack<1>(weights + i, s.at(head.weight) + i);
  }
}

template <typename T>
__device__ const T* run_head(const HeadPlan& head, const Step<T>& s, int32_t n, int32_t target,
                             T* shared, bool keep) {
  const int32_t classes = head.classes, lane = thread_index() % kWarp;
  const int32_t warps = thread_count() / kWarp;
  T* x = shared;
  T* dx = x + n;
  T* scores = dx + n;
  T* output = scores + classes;
  T* grad = output + classes;
  const T* biases = grad + classes;
  const T* weight = head.staged ? biases + classes : s.at(head.weight);
  wait_for_copies();
  __syncthreads();
  for (int32_t o = thread_index() / kWarp; o < classes; o += warps) {
    T sum = T(0);
#pragma unroll 4
    for (int32_t i = lane; i < n; i += kWarp) sum += weight[o * n + i] * x[i];
    sum = lane_sum(sum, kWarp);
    if (lane == 0) scores[o] = sum + biases[o];
  }
  __syncthreads();
  if (thread_index() < kWarp) {
    if (head.log_softmax != LogSoftmaxKind::kNone) {
      log_softmax(head.log_softmax, head.beta, scores, output, classes);
    } else {
      for (int32_t i = lane; i < classes; i += kWarp) {
        output[i] = activation_value(head.activation, scores[i]);
      }
    }
    __syncwarp();
    const T loss = loss_of_warp(s, output, grad, classes, target);
    if (keep && lane == 0) s.run.losses[s.model * s.run.count + s.index] = loss;
    if (head.log_softmax != LogSoftmaxKind::kNone) {
      log_softmax_backward(head.log_softmax, head.beta, output, grad, scores, classes);
    } else {
      for (int32_t i = lane; i < classes; i += kWarp) {
        scores[i] = activation_gradient(head.activation, grad[i], output[i]);
      }
    }
  }
  __syncthreads();  // from here on scores holds their gradients
  for (int32_t i = thread_index(); i < n; i += thread_count()) {
    T sum = T(0);
#pragma unroll 4
    for (int32_t o = 0; o < classes; ++o) sum += weight[o * n + i] * scores[o];
    dx[i] = sum;
  }
  if (keep) {
    for (int32_t i = thread_index(); i < classes; i += thread_count()) {
      s.at(head.grad)[i] = scores[i];
    }
    if (thread_index() == thread_count() - 1) {
      s.run.predictions[s.model * s.run.count + s.index] = predicted_class(output, classes);
    }
  }
  return dx;
}

// Tasks of kColumns inputs: threads share the rows of the weights, read each weight once, add its
// part to the input's gradient and change it. The first task's weights are on their way before
// the head or anything else is looked at.
template <typename T>
__device__ void linear_backward(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                                T* shared) {
  if (block >= p.tasks) return;
  constexpr int kAhead = 4;
  const T* x = s.map(p.flat);
  const int32_t column = thread_index() % kColumns, group = thread_index() / kColumns;
  const int32_t groups = thread_count() / kColumns;
  const bool head = p.head.classes > 0;
  const int32_t target = head && thread_index() < kWarp ? s.target() : 0;
  if (head) start_head(p.head, s, s.at(p.y), p.O, shared);
  T ahead[kAhead] = {}, value = T(0);
  const auto load = [&](int32_t task) {
    const int32_t i = task * kColumns + column;
    if (i >= p.C) return;
    value = x[i];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int32_t o = group + q * groups;
      if (o < p.O) ahead[q] = *s.at(p.weight + static_cast<int64_t>(o) * p.C + i);
    }
  };
  load(block);
  const double steps = s.steps_before();
  const T* y = s.at(p.y);
  const T* dy = head ? nullptr : s.at(p.dy);
  if (head) {
    dy = run_head(p.head, s, p.O, target, shared, block == 0);
    y = shared;  // where the head took it
    shared += 2 * p.O + 4 * p.head.classes + (p.head.staged ? p.O * p.head.classes : 0);
  }
  const T* dz = dy;
  if (p.staged) {
    // Each thread its own elements, with those that it wrote in run_head.
    for (int32_t i = thread_index(); i < p.O; i += thread_count()) {
      shared[i] = activation_gradient(p.activation, dy[i],
                                      p.activation == ActivationKind::kIdentity ? T(0) : y[i]);
    }
    dz = shared;
    shared += p.O;
    __syncthreads();
  }
  const Update<T> update = s.update(steps);
  // Neighbouring groups of a warp add up first.
  const int32_t together = kWarp / kColumns, partials = groups / together;
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    if (task != block) load(task);
    const int32_t i = task * kColumns + column;
    T sum = T(0);
    const auto change = [&](int32_t o, T weight) {
      const int64_t at = p.weight + static_cast<int64_t>(o) * p.C + i;
      sum += weight * dz[o];
      update.one(weight, s.velocity(at), dz[o] * value);
      *s.at(at) = weight;
    };
    if (i < p.C) {
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const int32_t o = group + q * groups;
        if (o < p.O) change(o, ahead[q]);
      }
#pragma unroll 4
      for (int32_t o = group + kAhead * groups; o < p.O; o += groups) {
        change(o, *s.at(p.weight + static_cast<int64_t>(o) * p.C + i));
      }
    }
    if (task == 0 && p.bias != kNowhere) {
      for (int32_t o = thread_index(); o < p.O; o += thread_count()) {
        update.one(*s.at(p.bias + o), s.velocity(p.bias + o), dz[o]);
      }
    }
    if (p.dx == kNowhere) return;
    static_assert(kWarp == 2 * kColumns);
    sum += __shfl_xor_sync(kWholeWarp, sum, kColumns);
    if (group % together == 0) shared[group / together * (kColumns + 1) + column] = sum;
    __syncthreads();
    if (group == 0 && i < p.C) {
      sum = T(0);
#pragma unroll 4
      for (int32_t j = 0; j < partials; ++j) sum += shared[j * (kColumns + 1) + column];
      const int32_t pixels = p.H * p.W;
      s.at(p.dx)[p.permute ? map_index(i, p.C / pixels, pixels) : i] = sum;
    }
    __syncthreads();
  });
}

template <typename T>
__device__ void linear_update(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  if (block >= p.tasks) return;
  const Update<T> update = s.update(s.steps_before());
  const T* g = s.at(p.dy);
  each_element(p, p.C * p.O, block, blocks, [&](int32_t i) {
    update.one(*s.at(p.weight + i), s.velocity(p.weight + i), g[i / p.C] * s.map(p.flat)[i % p.C]);
    if (p.bias != kNowhere && i % p.C == 0) {
      const int64_t at = p.bias + i / p.C;
      update.one(*s.at(at), s.velocity(at), g[i / p.C]);
    }
  });
}

// ------------------------------------------------------------------------- the layers on their own

template <typename T>
__device__ void activation(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const T* x = s.map(p.x);
  each_element(p, p.C * p.H * p.W, block, blocks,
               [&](int32_t i) { s.at(p.y)[i] = activation_value(p.activation, x[i]); });
}

template <typename T>
__device__ void activation_backward(const Phase& p, const Step<T>& s, int32_t block,
                                    int32_t blocks) {
  each_element(p, p.C * p.H * p.W, block, blocks, [&](int32_t i) {
    s.at(p.dx)[i] = activation_gradient(p.activation, s.at(p.dy)[i], s.at(p.y)[i]);
  });
}

// Forward and backward are the same: the random numbers come drawn, in the order (C, H, W).
template <typename T>
__device__ void dropout(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const T* from = s.map(p.x);
  const double* uniform = s.uniform(p.first_uniform);
  const int32_t pixels = p.H * p.W;
  each_element(p, p.C * pixels, block, blocks, [&](int32_t i) {
    s.at(p.y)[i] = from[i] * dropout_factor<T>(uniform[i % p.C * pixels + i / p.C], p.number);
  });
}

// Between the order (H, W, C) of a map and (C, H, W) of a vector; flip: from the vector to the map.
template <typename T>
__device__ void permute(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const int32_t pixels = p.H * p.W;
  const T* from = p.flip ? s.at(p.dy) : s.map(p.x);
  T* to = p.flip ? s.at(p.dx) : s.at(p.y);
  each_element(p, p.C * pixels, block, blocks, [&](int32_t i) {
    const int32_t in_map = map_index(i, p.C, pixels);
    to[p.flip ? in_map : i] = from[p.flip ? i : in_map];
  });
}

template <typename T>
__device__ T window_maximum(const T* plane, const PoolGeometryOf<int32_t>& g, int32_t oh,
                            int32_t ow) {
  T best = -std::numeric_limits<T>::infinity();
  for (int32_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (int32_t iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      const T a = plane[ih * g.in_h + iw * g.in_w];
      if (is_larger(a, best)) best = a;
    }
  }
  return best;
}

// Whether (ih, iw) is the first element of the window that equals its largest one, or NaN.
template <typename T>
__device__ bool is_first_maximum(const T* plane, const PoolGeometryOf<int32_t>& g, T largest,
                                 int32_t oh, int32_t ow, int32_t ih, int32_t iw) {
  for (int32_t h = g.first_row(oh); h <= ih; ++h) {
    for (int32_t w = g.first_column(ow); w < g.last_column(ow); ++w) {
      const T a = plane[h * g.in_h + w * g.in_w];
      if (a == largest || a != a) return h == ih && w == iw;
    }
  }
  return false;
}

template <typename T>
__device__ T window_average(const Phase& p, const T* plane, const PoolGeometryOf<int32_t>& g,
                            int32_t oh, int32_t ow) {
  T sum = T(0);
  for (int32_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (int32_t iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      sum += plane[ih * g.in_h + iw * g.in_w];
    }
  }
  return sum / window_divisor<T>(g, oh, ow, p.count_padding != 0, p.divisor);
}

// A thread a window.
template <typename T>
__device__ void pool(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const PoolGeometryOf<int32_t> g = pool_geometry_of(p);
  const T* x = s.map(p.x);
  const T norm_type = static_cast<T>(p.number);
  each_element(p, p.C * p.OH * p.OW, block, blocks, [&](int32_t i) {
    const int32_t pixel = i / p.C, oh = pixel / p.OW, ow = pixel % p.OW;
    const T* plane = x + i % p.C;
    T y = T(0);
    switch (p.pool) {
      case PoolKind::kLp1:
        y = window_norm<Norm::kOne>(plane, g, norm_type, oh, ow);
        break;
      case PoolKind::kLp2:
        y = window_norm<Norm::kTwo>(plane, g, norm_type, oh, ow);
        break;
      case PoolKind::kLpInf:
        y = window_norm<Norm::kInf>(plane, g, norm_type, oh, ow);
        break;
      case PoolKind::kLp:
        y = window_norm<Norm::kGeneral>(plane, g, norm_type, oh, ow);
        break;
      case PoolKind::kMax:
        y = window_maximum(plane, g, oh, ow);
        break;
      case PoolKind::kAverage:
        y = window_average(p, plane, g, oh, ow);
        break;
    }
    s.at(p.y)[i] = y;
  });
}

// A thread an input element: it adds up the windows that hold it.
template <typename T>
__device__ void pool_backward(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  const PoolGeometryOf<int32_t> g = pool_geometry_of(p);
  const T norm_type = static_cast<T>(p.number);
  each_element(p, p.C * p.H * p.W, block, blocks, [&](int32_t i) {
    const int32_t pixel = i / p.C, ih = pixel / p.W, iw = pixel % p.W, c = i % p.C;
    const T *x = s.map(p.x) + c, *y = s.at(p.y) + c, *dy = s.at(p.dy) + c;
    T sum = T(0);
    switch (p.pool) {
      case PoolKind::kLp1:
        sum = input_gradient<Norm::kOne>(dy, x, y, g, norm_type, ih, iw);
        break;
      case PoolKind::kLp2:
        sum = input_gradient<Norm::kTwo>(dy, x, y, g, norm_type, ih, iw);
        break;
      case PoolKind::kLpInf:
        sum = input_gradient<Norm::kInf>(dy, x, y, g, norm_type, ih, iw);
        break;
      case PoolKind::kLp:
        sum = input_gradient<Norm::kGeneral>(dy, x, y, g, norm_type, ih, iw);
        break;
      case PoolKind::kMax:
      case PoolKind::kAverage:
        for (int32_t oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
          for (int32_t ow = g.first_window_column(iw); ow < g.last_window_column(iw); ++ow) {
            const int32_t o = oh * g.out_h + ow * g.out_w;
            if (p.pool == PoolKind::kAverage) {
              sum += dy[o] / window_divisor<T>(g, oh, ow, p.count_padding != 0, p.divisor);
            } else if (is_first_maximum(x, g, y[o], oh, ow, ih, iw)) {
              sum += dy[o];
            }
          }
        }
        break;
    }
    s.at(p.dx)[i] = sum;
  });
}

// -------------------------------------------------------------------------------------- one phase

// Runs this block's share of a phase. `shared` is the block's own memory, as the program wants,
// which no thread of the block uses any more when all of them have returned.
template <typename T>
__device__ void run_phase(const Phase& p, const Step<T>& s, T* shared) {
  // The first tasks of a phase go to the blocks that have none of the phases before it.
  const int32_t blocks = s.run.blocks;
  const int32_t block = (s.block + blocks - p.first_task % blocks) % blocks;
  switch (p.op) {
    case Op::kConvolution:
      if (block < p.tasks) convolution(p, s, block, blocks, shared);
      break;
    case Op::kConvolutionUpdate:
      convolution_update(p, s, block, blocks, shared);
      break;
    case Op::kLinear:
      linear(p, s, block, blocks, shared);
      break;
    case Op::kLinearBackward:
      linear_backward(p, s, block, blocks, shared);
      break;
    case Op::kLinearUpdate:
      linear_update(p, s, block, blocks);
      break;
    case Op::kLoss:
      loss_phase(p, s, block);
      break;
    case Op::kActivation:
      activation(p, s, block, blocks);
      break;
    case Op::kActivationBackward:
      activation_backward(p, s, block, blocks);
      break;
    case Op::kDropout:
      dropout(p, s, block, blocks);
      break;
    case Op::kPool:
      pool(p, s, block, blocks);
      break;
    case Op::kPoolBackward:
      pool_backward(p, s, block, blocks);
      break;
    case Op::kChannelSum:
      channel_sums(p, s, block, blocks);
      break;
    case Op::kMean:
      mean_plane(p, s, block, blocks);
      break;
    case Op::kSubtract:
      if (block < p.tasks) subtract_mean(p, s, block, blocks, shared);
      break;
    case Op::kLocalBackward:
      if (block < p.tasks) local_backward(p, s, block, blocks, shared);
      break;
    case Op::kPermute:
      permute(p, s, block, blocks);
      break;
    case Op::kLogSoftmax:
      if (block == 0) log_softmax(p.log_softmax, p.number, s.map(p.x), s.at(p.y), p.C);
      break;
    case Op::kLogSoftmaxBackward:
      if (block == 0) {
        log_softmax_backward(p.log_softmax, p.number, s.at(p.y), s.at(p.dy), s.at(p.dx), p.C);
      }
      break;
  }
}

}  // namespace
}  // namespace mnist_ops::cuda
