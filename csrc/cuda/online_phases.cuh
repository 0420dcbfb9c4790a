// The phases of online SGD (../online/program.h) as a block of threads runs them.
//
// run_phase() is the same code in both drivers (online_sgd.cu). A block takes tasks first, first +
// blocks, ... of a phase; the threads of a block take a task's elements, and meet at barriers of
// the block only. What a block keeps in its own memory lives no longer than the phase.
//
// Where the time goes for the original network, a step of 35 million multiplications: waiting, for
// the other blocks at the end of a level and for the second-level cache at its start. The maps and
// weights (2.5 MB in float32 with all gradients) never leave that cache. So phases are few and wide
// rather than frugal: a warp for a tile of 2 x 2 outputs of the convolution, its lanes sharing the
// sum over input channels (3136 warps for the input's gradient, 1600 forward), a block for an
// output of the fully connected layer.
#pragma once

#include "../online/program.h"

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

enum Setting { kLr, kLrDecay, kWeightDecay, kMomentum, kDampening, kSteps, kStarted, kSettings };

// One step of one model, seen by one block.
template <typename T>
struct Step {
  const Run<T>& run;
  T* base;
  int64_t model, index;  // index of the sample in the call
  int32_t block;         // of the model's blocks

  __device__ T* at(int64_t offset) const { return base + offset; }
  __device__ const T* map(int64_t offset) const {
    if (offset != kImage) return base + offset;
    return run.samples + (model * run.piece + index - run.first) * run.image_size;
  }
  __device__ T* velocity(int64_t offset) const {
    return run.velocity_shift == 0 ? nullptr : base + offset + run.velocity_shift;
  }
  __device__ int32_t target() const {
    return static_cast<int32_t>(run.targets[model * run.count + index]);
  }
  __device__ const double* uniform(int64_t first) const {
    return run.uniform + (model * run.count + index) * run.uniforms + first;
  }
  __device__ Update<T> update() const {
    const double* s = run.settings + model * kSettings;
    const double t = s[kSteps] + static_cast<double>(index);
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

// ------------------------------------------------------------------------------- normalization

// The sum over channels of one pixel, by a warp; every lane gets it.
template <typename T>
__device__ __forceinline__ T channel_sum(const T* map, int32_t C, int32_t pixel, int32_t lane) {
  T sum = T(0);
  for (int32_t c = lane; c < C; c += kWarp) sum += map[pixel * C + c];
  return lane_sum(sum, kWarp);
}

// The plane that a normalization subtracts from every channel of a map, or of a gradient, where the
// whole block can read it: computed in `shared` (2 H W numbers), or there already. To be called by
// all threads of a block.
template <typename T>
__device__ const T* prepare_mean(const BlurPlan& b, const Step<T>& s, const T* map, T* shared) {
  if (b.source == MeanSource::kNone) return nullptr;
  if (b.source == MeanSource::kReady) return s.at(b.mean);
  const int32_t pixels = b.H * b.W;
  T* sum = shared;
  T* mean = shared + pixels;
  const T* coef = s.at(b.coef);
  const T* taps = s.at(b.taps);
  if (b.source == MeanSource::kMap) {
    const int32_t lane = thread_index() % kWarp;
#pragma unroll 4
    for (int32_t i = thread_index() / kWarp; i < pixels; i += thread_count() / kWarp) {
      const T total = channel_sum(map, b.C, i, lane);
      if (lane == 0) sum[i] = b.adjoint ? total / coef[i] : total;
    }
  } else {
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) sum[i] = s.at(b.sum)[i];
  }
  __syncthreads();
  if (b.separable) {
    for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
      mean[i] = blur_row_at(b, sum, taps, i / b.W, i % b.W);
    }
    __syncthreads();
    T* rows = mean;
    mean = sum;
    sum = rows;
  }
  const T channels = static_cast<T>(b.C);
  for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
    const T blurred = (b.separable ? blur_column_at(b, sum, taps, i / b.W, i % b.W)
                                   : blur_at(b, sum, taps, i / b.W, i % b.W)) /
                      channels;
    mean[i] = b.adjoint ? blurred : blurred / coef[i];
  }
  __syncthreads();
  return mean;
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

template <typename T>
__device__ void convolution(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                            T* shared) {
  const T* x = s.map(p.x);
  const T* mean = prepare_mean(p.blur, s, x, shared);
  const ConvolutionInput<T> in{x, mean, p.C, p.H, p.W};
  if (mean != nullptr) {
    shared += 2 * p.H * p.W;
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

// The gradient of a convolution's output at one pixel and channel, from that of what comes behind:
// a normalization, whose plane is mean, a pooling and an activation, as far as they are there.
template <typename T>
__device__ __forceinline__ T local_gradient(const Phase& p, const T* y, const T* pooled,
                                            const T* dy, const T* mean, int32_t h, int32_t w,
                                            int32_t W, int32_t c, int32_t C) {
  const int32_t pixel = h * W + w;
  const int32_t behind = p.fused_pool ? h / 2 * (W / 2) + w / 2 : pixel;
  T g = dy[behind * C + c];
  if (mean != nullptr) g -= mean[behind];
  const T value = y[pixel * C + c];
  if (p.fused_pool) g *= norm_gradient<Norm::kTwo>(value, pooled[behind * C + c], T(2));
  return activation_gradient(p.activation, g, value);
}

template <typename T>
__device__ void local_backward(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                               T* shared) {
  const T* dy = s.at(p.dy);
  const T* mean = prepare_mean(p.blur, s, dy, shared);
  const T* pooled = p.fused_pool ? s.at(p.pooled) : nullptr;
  each_element(p, p.C * p.H * p.W, block, blocks, [&](int32_t i) {
    const int32_t pixel = i / p.C;
    s.at(p.dx)[i] =
        local_gradient(p, s.at(p.y), pooled, dy, mean, pixel / p.W, pixel % p.W, p.W, i % p.C, p.C);
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
  const int32_t pixels = p.OH * p.OW, taps = p.kernel_h * p.kernel_w, weights = p.C * taps;
  const T* dy = s.at(p.dy);
  const T* mean = prepare_mean(p.blur, s, dy, shared);
  const ConvolutionInput<T> in{s.map(p.x), nullptr, p.C, p.H, p.W};
  T* plane = shared + (mean != nullptr ? 2 * p.blur.H * p.blur.W : 0);
  T* partial = plane + (p.staged ? pixels : 0);
  const T* pooled = p.local && p.fused_pool ? s.at(p.pooled) : nullptr;
  const Update<T> update = s.update();
  each_task(p.tasks, block, blocks, [&](int32_t o) {
    const T* d = dy + o;
    int32_t d_step = p.O;
    if (p.staged) {
      __syncthreads();  // the task before may still be reading
      for (int32_t i = thread_index(); i < pixels; i += thread_count()) {
        plane[i] = p.local ? local_gradient(p, s.at(p.y), pooled, dy, mean, i / p.OW, i % p.OW,
                                            p.OW, o, p.O)
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
    const T scale = static_cast<T>(beta);
    T largest = -std::numeric_limits<T>::infinity(), sum = T(0);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      largest = scale * x[i] > largest ? scale * x[i] : largest;
    }
    largest = lane_max(largest, kWarp);
    for (int32_t i = thread_index(); i < n; i += kWarp) {
      sum += elementary::exp(scale * x[i] - largest);
    }
    const T total = largest + std::log(lane_sum(sum, kWarp));
    for (int32_t i = thread_index(); i < n; i += kWarp) l[i] = scale * x[i] - total;
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

// The gradient of the network's output to g; this block also keeps loss and prediction, if told to.
// Thread 0 alone must know the target.
template <typename T>
__device__ void sample_loss(const Step<T>& s, const T* output, T* g, int32_t n, int32_t target,
                            bool keep) {
  const int64_t at = s.model * s.run.count + s.index;
  if (thread_index() == 0) {
    const T loss = loss_and_gradient(s.run.loss, output, n, target, g);
    if (keep) s.run.losses[at] = loss;
  }
  // Another warp, where there is one.
  if (keep && thread_index() == thread_count() - 1) {
    s.run.predictions[at] = predicted_class(output, n);
  }
}

template <typename T>
__device__ void loss_phase(const Phase& p, const Step<T>& s, int32_t block) {
  if (block == 0) sample_loss(s, s.map(p.x), s.at(p.dy), p.C, s.target(), true);
}

// ------------------------------------------------------------------------------- fully connected

template <typename T>
__device__ void linear(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks, T* shared) {
  if (block >= p.tasks) return;
  const T* x = s.map(p.x);
  if (p.permute) {
    const int32_t pixels = p.H * p.W, channels = p.C / pixels;
    const T* mean = prepare_mean(p.blur, s, x, shared);
    if (mean != nullptr) shared += 2 * pixels;
    for (int32_t i = thread_index(); i < p.C; i += thread_count()) {
      const T value = x[map_index(i, channels, pixels)];
      shared[i] = mean == nullptr ? value : value - mean[i % pixels];
      if (block == 0) s.at(p.flat)[i] = shared[i];
    }
    __syncthreads();
    x = shared;
    shared += p.C;
  }
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  const auto finish = [&](int32_t o, T sum) {
    if (p.bias != kNowhere) sum += s.at(p.bias)[o];
    s.at(p.y)[o] = activation_value(p.activation, sum);
  };
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    T sum = T(0);
    if (p.per_task == 1) {  // the whole block for one output
      const T* row = s.at(p.weight) + static_cast<int64_t>(task) * p.C;
      for (int32_t i = thread_index(); i < p.C; i += thread_count()) sum += row[i] * x[i];
      sum = lane_sum(sum, kWarp);
      if (lane == 0) shared[warp] = sum;
      __syncthreads();
      if (thread_index() == 0) {
        sum = T(0);
        for (int32_t i = 0; i < warps; ++i) sum += shared[i];
        finish(task, sum);
      }
      __syncthreads();
      return;
    }
    const int32_t o = task * warps + warp;
    if (o >= p.O) return;
    const T* row = s.at(p.weight) + static_cast<int64_t>(o) * p.C;
    for (int32_t i = lane; i < p.C; i += kWarp) sum += row[i] * x[i];
    sum = lane_sum(sum, kWarp);
    if (lane == 0) finish(o, sum);
  });
}

// The last fully connected layer, log-softmax, loss, and back to the gradient of the layer's n
// inputs: a few thousand multiplications, which every block does for itself. Gives where that
// gradient lies in the block's own memory.
template <typename T>
__device__ const T* run_head(const HeadPlan& head, const Step<T>& s, const T* input, int32_t n,
                             T* shared, bool keep) {
  const int32_t classes = head.classes;
  const int32_t target = thread_index() == 0 ? s.target() : 0;  // on its way until it is wanted
  T* x = shared;
  T* dx = x + n;
  T* scores = dx + n;
  T* output = scores + classes;
  T* grad = output + classes;
  for (int32_t i = thread_index(); i < n; i += thread_count()) x[i] = input[i];
  __syncthreads();
  const int32_t lane = thread_index() % kWarp;
  const T* weight = s.at(head.weight);
  for (int32_t o = thread_index() / kWarp; o < classes; o += thread_count() / kWarp) {
    T sum = T(0);
    for (int32_t i = lane; i < n; i += kWarp) sum += weight[o * n + i] * x[i];
    sum = lane_sum(sum, kWarp);
    if (head.bias != kNowhere) sum += s.at(head.bias)[o];
    if (lane == 0) scores[o] = sum;
  }
  __syncthreads();
  if (head.log_softmax != LogSoftmaxKind::kNone) {
    log_softmax(head.log_softmax, head.beta, scores, output, classes);
  } else {
    for (int32_t i = thread_index(); i < classes; i += thread_count()) {
      output[i] = activation_value(head.activation, scores[i]);
    }
  }
  __syncthreads();
  sample_loss(s, output, grad, classes, target, keep);
  __syncthreads();
  if (head.log_softmax != LogSoftmaxKind::kNone) {
    log_softmax_backward(head.log_softmax, head.beta, output, grad, scores, classes);
  } else {
    for (int32_t i = thread_index(); i < classes; i += thread_count()) {
      scores[i] = activation_gradient(head.activation, grad[i], output[i]);
    }
  }
  __syncthreads();  // from here on scores holds their gradients
  for (int32_t i = thread_index(); i < n; i += thread_count()) {
    T sum = T(0);
    for (int32_t o = 0; o < classes; ++o) sum += weight[o * n + i] * scores[o];
    dx[i] = sum;
  }
  if (keep) {
    for (int32_t i = thread_index(); i < classes; i += thread_count()) {
      s.at(head.grad)[i] = scores[i];
    }
  }
  return dx;
}

// Tasks of kColumns inputs: threads share the rows of the weights, read each weight once, add its
// part to the input's gradient and change it. Bound by the weights' way from and to the caches.
template <typename T>
__device__ void linear_backward(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks,
                                T* shared) {
  if (block >= p.tasks) return;
  const T* dy = p.head.classes > 0 ? nullptr : s.at(p.dy);
  if (p.head.classes > 0) {
    dy = run_head(p.head, s, s.at(p.y), p.O, shared, block == 0);
    shared += 2 * p.O + 3 * p.head.classes;
  }
  const T* dz = dy;
  if (p.staged) {
    // Each thread its own elements, with those that it wrote in run_head.
    for (int32_t i = thread_index(); i < p.O; i += thread_count()) {
      shared[i] = activation_gradient(
          p.activation, dy[i], p.activation == ActivationKind::kIdentity ? T(0) : s.at(p.y)[i]);
    }
    dz = shared;
    shared += p.O;
    __syncthreads();
  }
  const Update<T> update = s.update();
  const T* x = s.map(p.flat);
  const int32_t column = thread_index() % kColumns, group = thread_index() / kColumns;
  const int32_t groups = thread_count() / kColumns;
  each_task(p.tasks, block, blocks, [&](int32_t task) {
    const int32_t i = task * kColumns + column;
    T sum = T(0);
    if (i < p.C) {
      const T value = x[i];
#pragma unroll 4
      for (int32_t o = group; o < p.O; o += groups) {
        const int64_t at = p.weight + static_cast<int64_t>(o) * p.C + i;
        T weight = *s.at(at);
        sum += weight * dz[o];
        update.one(weight, s.velocity(at), dz[o] * value);
        *s.at(at) = weight;
      }
    }
    if (task == 0 && p.bias != kNowhere) {
      for (int32_t o = thread_index(); o < p.O; o += thread_count()) {
        update.one(*s.at(p.bias + o), s.velocity(p.bias + o), dz[o]);
      }
    }
    if (p.dx == kNowhere) return;
    shared[group * (kColumns + 1) + column] = sum;
    __syncthreads();
    if (group == 0 && i < p.C) {
      sum = T(0);
      for (int32_t j = 0; j < groups; ++j) sum += shared[j * (kColumns + 1) + column];
      const int32_t pixels = p.H * p.W;
      s.at(p.dx)[p.permute ? map_index(i, p.C / pixels, pixels) : i] = sum;
    }
    __syncthreads();
  });
}

template <typename T>
__device__ void linear_update(const Phase& p, const Step<T>& s, int32_t block, int32_t blocks) {
  if (block >= p.tasks) return;
  const Update<T> update = s.update();
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

// Runs this block's share of a phase. `shared` is the block's own memory, kScratch numbers, which
// no thread of the block uses any more when all of them have returned.
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
