// Phases of online SGD: log-softmax and losses.
#pragma once

#include "online_step.cuh"

namespace mnist_ops::cuda {

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
__device__ void loss_phase(const Phase& p, const Step<T>& s) {
  const T* output = s.map(p.x);
  const int64_t at = s.model * s.run.count + s.index;
  if (thread_index() < kWarp) {
    const T loss = loss_of_warp(s, output, s.at(p.dy), p.C, s.target());
    if (thread_index() == 0) s.run.losses[at] = loss;
  }
  // Another warp, where there is one.
  if (thread_index() == thread_count() - 1) s.run.predictions[at] = predicted_class(output, p.C);
}

}  // namespace mnist_ops::cuda
