// Phases of online SGD: the gradient of a convolution's weights, and their update.
#pragma once

#include "online_convolution.cuh"

namespace mnist_ops::cuda {

template <typename T>
__device__ void local_backward(const Phase& p, const Step<T>& s, T* shared) {
  const LocalPlan& l = p.local;
  const T *dy = s.at(p.dy), *y = s.at(l.y), *pooled = l.pooling ? s.at(l.pooled) : nullptr;
  const T* mean = prepare_mean(l.blur, s, dy, shared);
  each_element(p, s, p.O * p.OH * p.OW, [&](int32_t i) {
    const int32_t pixel = i / p.O, h = pixel / p.OW, w = pixel % p.OW, o = i % p.O;
    const int32_t behind = l.pooling ? h / 2 * (p.OW / 2) + w / 2 : pixel;
    T g = dy[behind * p.O + o];
    if (mean != nullptr) g -= mean[behind];
    s.at(p.dx)[i] = local_value(l, y[i], l.pooling ? pooled[behind * p.O + o] : T(0), g);
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
  const Divider across(columns);
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

// The last warp, which had the least to do, changes a bias by the sum over the plane, whose numbers
// are `step` apart; `old` is for its first lane.
template <typename T>
__device__ __forceinline__ void update_bias(const Phase& p, const Step<T>& s,
                                            const Update<T>& update, int32_t o, T old,
                                            const T* plane, int32_t numbers, int32_t step = 1) {
  if (p.bias == kNowhere || thread_index() / kWarp != thread_count() / kWarp - 1) return;
  T sum = T(0);
  for (int32_t i = thread_index() % kWarp; i < numbers; i += kWarp) sum += plane[i * step];
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
__device__ void tiled_update(const Phase& p, const Step<T>& s, T* shared) {
  constexpr int K = kTile, kTaps = K * K, kPack = kPackSize<T>, kColumn = 4;
  constexpr int kOld = sizeof(T) == 8 ? 2 : 4;  // as many as stay in registers
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
  const Divider by_pack(packs), across(p.W);
  const int32_t block = s.block;
  const double steps = s.steps_before();
  Update<T> update{};
  const T* mean = nullptr;
  each_task(p, s, [&](int32_t task) {
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
    clear_padding(p, map, p.H, t.group);
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
__device__ void first_update(const Phase& p, const Step<T>& s, T* shared) {
  constexpr int K = kTile, kTaps = K * K;
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  const int32_t height = p.H + 2 * p.padding_h, width = p.tile.width;
  T* planes = shared;
  T* plane = planes + p.C * height * width;
  T* partial = plane + p.OH * p.OW;
  const int32_t block = s.block;
  const double steps = s.steps_before();
  Update<T> update{};
  const T* mean = nullptr;
  stage_planes(p, s.map(p.x), planes);
  each_task(p, s, [&](int32_t o) {
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

// What is not tiled: a task is an output channel. A thread makes the gradient of one weight and
// applies it, neighbouring threads for neighbouring channels; where there are few weights, threads
// share the pixels of one.
template <typename T>
__device__ void convolution_update(const Phase& p, const Step<T>& s, T* shared) {
  if (p.tile.group != 0) {
    return p.tile.group == p.C && p.C < kWarp ? first_update(p, s, shared)
                                              : tiled_update(p, s, shared);
  }
  const int32_t pixels = p.OH * p.OW, taps = p.kernel_h * p.kernel_w, weights = p.C * taps;
  const int32_t sharing = thread_count() / weights;
  const T* dy = s.at(p.dy);
  const ConvolutionInput<T> in{s.map(p.x), nullptr, p.C, p.H, p.W};
  const Update<T> update = s.update(s.steps_before());
  each_task(p, s, [&](int32_t o) {
    // Weight i is that of input channel i % C and tap i / C.
    const auto gradient = [&](int32_t i, int32_t first, int32_t step) {
      const int32_t c = i % p.C, kh = i / p.C / p.kernel_w, kw = i / p.C % p.kernel_w;
      T sum = T(0);
      for (int32_t pixel = first; pixel < pixels; pixel += step) {
        sum += dy[pixel * p.O + o] *
               in(pixel / p.OW + kh - p.padding_h, pixel % p.OW + kw - p.padding_w, c);
      }
      return sum;
    };
    if (sharing > 1) {
      __syncthreads();  // the task before may still be reading
      const int32_t i = thread_index() % weights, part = thread_index() / weights;
      if (part < sharing) shared[part * weights + i] = gradient(i, part, sharing);
      __syncthreads();
    }
    for (int32_t i = thread_index(); i < weights; i += thread_count()) {
      T sum = sharing > 1 ? shared[i] : gradient(i, 0, 1);
      for (int32_t part = 1; part < sharing; ++part) sum += shared[part * weights + i];
      const int64_t at = p.weight + o * weights + i % p.C * taps + i / p.C;
      update.one(*s.at(at), s.velocity(at), sum);
    }
    const T bias = p.bias == kNowhere ? T(0) : s.at(p.bias)[o];
    update_bias(p, s, update, o, bias, dy + o, pixels, p.O);
  });
}

}  // namespace mnist_ops::cuda
