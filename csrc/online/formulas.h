// The formulas of the engine's layers, losses and update, one number at a time: what the CPU's
// loops and the GPU's threads share.
#pragma once

#include "../activation.h"
#include "../lp_pool.h"

namespace mnist_ops::online {

// Torch7's dropout: kept where a uniform number is <= 1 - p, and scaled by 1 / (1 - p).
template <typename T>
MNIST_OPS_HD T dropout_factor(double uniform, double keep) {
  return uniform <= keep ? static_cast<T>(1.0 / keep) : T(0);
}

// ------------------------------------------------------------------------------------- update
//
// Plain SGD as in Torch7's optim.sgd, the arithmetic of mnist_ops.torch7.optim.SGD:
//   g += decay w;  v = momentum v + (1 - dampening) g, v = g in the first step;
//   w -= rate (g + momentum v | v | g)     Nesterov, momentum, neither

template <typename T>
MNIST_OPS_HD T plain_step(T w, T g, T rate) {
  return elementary::fmadd(-rate, g, w);
}

template <typename T>
MNIST_OPS_HD T decayed_step(T w, T g, T rate, T decay) {
  return w - rate * (g + decay * w);
}

// v = m v + k g with the decayed gradient, w = w - rate (now g + later v).
template <typename T>
MNIST_OPS_HD void momentum_step(T& w, T& v, T g, T rate, T decay, T m, T k, T now, T later) {
  const T gradient = g + decay * w;
  v = m * v + k * gradient;
  w -= rate * (now * gradient + later * v);
}

template <typename T>
struct Update {
  T rate, weight_decay, momentum, keep;  // keep = 1 - dampening
  bool first, nesterov;

  MNIST_OPS_HD bool plain() const { return weight_decay == T(0) && momentum == T(0); }

  // The new value of a parameter, and of its velocity where there is momentum.
  MNIST_OPS_HD void one(T& w, T* v, T g) const {
    if (plain()) {
      w = plain_step(w, g, rate);
    } else if (momentum == T(0)) {
      w = decayed_step(w, g, rate, weight_decay);
    } else {
      momentum_step(w, *v, g, rate, weight_decay, first ? T(0) : momentum, first ? T(1) : keep,
                    nesterov ? T(1) : T(0), nesterov ? momentum : T(1));
    }
  }
};

// A model's: kSteps were made before the call, kStarted: and have left velocities.
enum Setting { kLr, kLrDecay, kWeightDecay, kMomentum, kDampening, kSteps, kStarted, kSettings };

// The update of step `index` of a call; steps: s[kSteps].
template <typename T>
MNIST_OPS_HD Update<T> update_of_step(const double* s, double steps, int64_t index, bool nesterov) {
  const double t = steps + static_cast<double>(index);
  Update<T> u;
  u.rate = static_cast<T>(s[kLr] / (1.0 + t * s[kLrDecay]));
  u.weight_decay = static_cast<T>(s[kWeightDecay]);
  u.momentum = static_cast<T>(s[kMomentum]);
  u.keep = static_cast<T>(1.0 - s[kDampening]);
  u.first = index == 0 && s[kStarted] == 0.0;
  u.nesterov = nesterov;
  return u;
}

// ------------------------------------------------------------------------------------ pooling

// What an average is divided by; divisor 0: the elements of the window, those of the padding among
// them if count_padding.
template <typename T, typename I>
MNIST_OPS_HD T window_divisor(const PoolGeometryOf<I>& g, I oh, I ow, bool count_padding,
                              I divisor) {
  if (divisor != 0) return static_cast<T>(divisor);
  if (!count_padding) {
    return static_cast<T>((g.last_row(oh) - g.first_row(oh)) *
                          (g.last_column(ow) - g.first_column(ow)));
  }
  const I top = oh * g.stride_h - g.padding_h, left = ow * g.stride_w - g.padding_w;
  const I bottom = top + g.kernel_h < g.H + g.padding_h ? top + g.kernel_h : g.H + g.padding_h;
  const I right = left + g.kernel_w < g.W + g.padding_w ? left + g.kernel_w : g.W + g.padding_w;
  return static_cast<T>((bottom - top) * (right - left));
}

enum class PoolKind : int32_t { kLp, kMax, kAverage };

// Whether a replaces the largest element found so far: NaN does, and stays.
template <typename T>
MNIST_OPS_HD bool is_larger(T a, T best) {
  return a > best || a != a;
}

// ------------------------------------------------------------------------ log-softmax and losses

enum class LogSoftmaxKind : int32_t { kNone, kExact, kTorch7 };

// Torch7's approximate exp(-z) for z >= 0, in the sum of its log-softmax.
MNIST_OPS_HD double exp_minus(double z) {
  if (!(z < 13.0)) return z == z ? 0.0 : z;
  double w = 1.0 + z * (0.125 + z * (0.0078125 + z * (0.00032552083 + z * 1.0172526e-5)));
  w *= w;
  w *= w;
  w *= w;
  return 1.0 / w;
}

// Gradients of a score, from the log-probability l, the gradient g with respect to it, and the sum
// of all g.
template <typename T>
MNIST_OPS_HD T log_softmax_gradient(T g, T l, T sum, T beta) {
  return beta * (g - elementary::exp(l) * sum);
}
template <typename T>
MNIST_OPS_HD T torch7_log_softmax_gradient(T g, T l, double sum) {
  return static_cast<T>(g - std::exp(static_cast<double>(l)) * sum);
}

enum class Loss { kNll, kMultiMargin, kMse };

// The loss of one sample with scores x of n classes; its gradient goes to g.
template <typename T, typename I>
MNIST_OPS_HD T loss_and_gradient(Loss loss, const T* x, I n, I target, T* g) {
  for (I i = 0; i < n; ++i) g[i] = T(0);
  switch (loss) {
    case Loss::kNll:
      g[target] = T(-1);
      return -x[target];
    case Loss::kMultiMargin: {
      T sum = T(0);
      const T share = T(1) / static_cast<T>(n);
      for (I i = 0; i < n; ++i) {
        const T margin = T(1) - x[target] + x[i];
        if (i == target || !(margin > T(0))) {
          if (margin != margin) sum += margin;
          continue;
        }
        sum += margin;
        g[i] += share;
        g[target] -= share;
      }
      return sum / static_cast<T>(n);
    }
    case Loss::kMse: {
      T sum = T(0);
      for (I i = 0; i < n; ++i) {
        const T difference = x[i] - (i == target ? T(1) : T(-1));
        sum += difference * difference;
        g[i] = T(2) * difference;
      }
      return sum;
    }
  }
  return T(0);
}

// The class of the largest score, compared in float32 as Torch7's confusion matrix does; the first
// of equal ones, and NaN above all, as in torch.argmax.
template <typename T, typename I>
MNIST_OPS_HD I predicted_class(const T* x, I n) {
  I best = 0;
  for (I i = 1; i < n; ++i) {
    const float a = static_cast<float>(x[i]), b = static_cast<float>(x[best]);
    if (a > b || (a != a && b == b)) best = i;
  }
  return best;
}

}  // namespace mnist_ops::online
