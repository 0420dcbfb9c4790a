// Phases of online SGD: fully connected layers.
#pragma once

#include "online_loss.cuh"

namespace mnist_ops::cuda {

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
__device__ void linear(const Phase& p, const Step<T>& s, T* shared) {
  constexpr int kAhead = 4;
  const int32_t block = s.block;
  const T* x = s.map(p.x);
  T ahead[kAhead] = {}, ahead_bias = T(0);
  const auto load = [&](int32_t task) {
    const T* row = s.at(p.weight) + static_cast<int64_t>(task) * p.C;
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int32_t i = thread_index() + q * thread_count();
      if (i < p.C) ahead[q] = row[i];
    }
    if (p.bias != kNowhere && thread_index() == 0) ahead_bias = s.at(p.bias)[task];
  };
  if (p.per_task == 1) load(block);
  const int32_t lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int32_t warps = thread_count() / kWarp;
  if (p.permute) {
    const BlurPlan& b = p.blur;
    const int32_t pixels = p.H * p.W, channels = p.C / pixels;
    const Divider by_channel(channels), by_pixel(pixels);
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
    each_of_blocks(p, s, p.C, [&](int32_t i) { s.at(p.flat)[i] = vector[i]; });
    x = vector;
  }
  each_task(p, s, [&](int32_t task) {
    if (p.per_task == 1) {  // the whole block for one output
      const T* row = s.at(p.weight) + static_cast<int64_t>(task) * p.C;
      if (task != block) {
        __syncthreads();  // the task before may still be reading
        load(task);
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
__device__ void linear_backward(const Phase& p, const Step<T>& s, T* shared) {
  constexpr int kAhead = 4;
  const int32_t block = s.block;
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
  each_task(p, s, [&](int32_t task) {
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
__device__ void linear_update(const Phase& p, const Step<T>& s) {
  const Update<T> update = s.update(s.steps_before());
  const T* g = s.at(p.dy);
  each_element(p, s, p.C * p.O, [&](int32_t i) {
    update.one(*s.at(p.weight + i), s.velocity(p.weight + i), g[i / p.C] * s.map(p.flat)[i % p.C]);
    if (p.bias != kNowhere && i % p.C == 0) {
      const int64_t at = p.bias + i / p.C;
      update.one(*s.at(at), s.velocity(at), g[i / p.C]);
    }
  });
}

}  // namespace mnist_ops::cuda
