// Phases of online SGD: convolution, with what follows it in a stage.
#pragma once

#include "online_norm.cuh"

namespace mnist_ops::cuda {

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

// Tasks of one output channel and some tiles, a warp for a tile, lanes for input channels: where
// nothing is tiled. Bound by reading: a lane reads four inputs, in whole lines from the caches, for
// each weight, which is in the block's own memory where it fits.
template <typename T>
__device__ void convolution_by_warps(const Phase& p, const Step<T>& s,
                                     const ConvolutionInput<T>& in, T* shared) {
  const int32_t taps = p.kernel_h * p.kernel_w, step = odd(taps);
  const int32_t lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  const Tiles tiles = tiles_of(p.OH, p.OW);
  const int32_t chunks = (tiles.count + p.per_task - 1) / p.per_task;
  const T* weights = s.at(p.weight);
  each_task(p, s, [&](int32_t task) {
    const int32_t o = task / chunks, begin = task % chunks * p.per_task;
    const int32_t end = begin + p.per_task < tiles.count ? begin + p.per_task : tiles.count;
    if (p.staged) {
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
        for (int32_t kh = 0, k = 0; kh < p.kernel_h; ++kh) {
          for (int32_t kw = 0; kw < p.kernel_w; ++kw, ++k) {
            const T a = p.staged ? shared[c * step + k] : weights[weight_index(p, o, c, k)];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[i] += a * in(h - p.padding_h + kh + i / 2, w - p.padding_w + kw + i % 2, c);
            }
          }
        }
      }
      for (auto& part : sum) part = lane_sum(part, kWarp);
      if (lane != 0) continue;
      const T bias = p.bias == kNowhere ? T(0) : s.at(p.bias)[o];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t row = h + i / 2, column = w + i % 2;
        sum[i] = activation_value(p.activation, sum[i] + bias);
        if (row < p.OH && column < p.OW) s.at(p.y)[(row * p.OW + column) * p.O + o] = sum[i];
      }
      if (!p.fused_pool) continue;
      s.at(p.pooled)[(h / 2 * (p.OW / 2) + w / 2) * p.O + o] = norm_of_taps<Norm::kTwo>(sum, T(2));
    }
  });
}

// Writes zeros into the padding's columns of so many rows of a map in the block's own memory.
template <typename T>
__device__ __forceinline__ void clear_padding(const Phase& p, T* map, int32_t rows,
                                              int32_t channels) {
  const int32_t padding = p.tile.width - p.W, warps = thread_count() / kWarp;
  for (int32_t i = thread_index() / kWarp; i < rows * padding; i += warps) {
    const int32_t row = i / padding, j = i - row * padding;
    T* at = map + (row * p.tile.width + (j < p.padding_w ? j : j + p.W)) * channels;
#pragma unroll 1
    for (int32_t c = thread_index() % kWarp; c < channels; c += kWarp) at[c] = T(0);
  }
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
__device__ void tiled_convolution(const Phase& p, const Step<T>& s, T* shared) {
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
  const Divider across(p.W), by_chunk(chunks);

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
    const Divider row_packs(packs);
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
    clear_padding(p, map + (k.first - k.top) * t.width * p.C, k.last - k.first, p.C);
  };

  // Where the operand is a gradient that goes back through what is local: kAhead loads on their way
  // for 32 channels of a pixel each. In float64 more would not stay in registers.
  constexpr int kAhead = sizeof(T) == 8 ? 3 : 8;
  T ahead_dy[kAhead] = {}, ahead_pooled[kAhead] = {};
  const auto place = [&](const Task& k, int32_t unit, int32_t& behind, int32_t& at) {
    unit = not_hoisted(unit);
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

  const int32_t block = s.block;
  const Task own = task_at(block);
  stage(own);
  if (local) load_local(own, warp);
  const T* mean = prepare_mean(local ? p.local.blur : p.blur, s, local ? dy : x, shared + t.memory);
  each_task(p, s, [&](int32_t task) {
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
      const Divider row_numbers(p.W * p.C);
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
        s.at(p.pooled)[(k.pair * (p.OW / 2) + w / 2) * p.O + o] = norm_of_taps<Norm::kTwo>(v, T(2));
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
  const Divider across(width);
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
__device__ void first_convolution(const Phase& p, const Step<T>& s, T* shared) {
  const int32_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int32_t taps = p.C * kernel_h * kernel_w, step = odd(taps);
  const int32_t height = p.H + 2 * p.padding_h, width = p.tile.width;
  const int32_t lanes = (p.O + kWarp - 1) / kWarp * kWarp, lane = thread_index() % kWarp;
  const Divider by_taps(taps), by_lanes(lanes), by_width(p.W);
  T* weights = shared;
  T* planes = weights + p.O * step;
  T* values = planes + p.C * height * width;
  T* partial = values + p.tile.group * 4 * p.O;
  T* biases = partial + p.tile.group * (lanes / kWarp);
  const int32_t block = s.block;
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
  const Divider across(tiles.across);
  each_task(p, s, [&](int32_t task) {
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
        norm = norm_of_taps<Norm::kTwo>(window, T(2));
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
__device__ void convolution(const Phase& p, const Step<T>& s, T* shared) {
  if (p.tile.group != 0) {
    if (!p.split) {
      return p.kernel_h == 5 && p.kernel_w == 5 ? first_convolution<5>(p, s, shared)
                                                : first_convolution<0>(p, s, shared);
    }
    return p.tile.group == 3 ? tiled_convolution<5, 3, 3>(p, s, shared)
                             : tiled_convolution<7, 4, 2>(p, s, shared);
  }
  const T* x = s.map(p.x);
  const T* mean = prepare_mean(p.blur, s, x, shared);
  const ConvolutionInput<T> in{x, mean, p.C, p.H, p.W};
  if (mean != nullptr) {
    shared += mean_numbers(p.blur);
    // Each block leaves a part of the normalized input for the update.
    each_of_blocks(p, s, p.C * p.H * p.W,
                   [&](int32_t i) { s.at(p.flat)[i] = x[i] - mean[i / p.C]; });
  }
  convolution_by_warps(p, s, in, shared);
}

}  // namespace mnist_ops::cuda
