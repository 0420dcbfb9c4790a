// Activations, one number at a time: for the operator stage2d and for the layers of the online-SGD
// engine, on both backends.
#pragma once

#include "elementary.h"
#include "sigmoid.h"

#include <type_traits>

namespace mnist_ops {

enum class ActivationKind : int32_t { kIdentity, kTanh, kRelu, kSigmoid };

template <ActivationKind kind>
using ActivationTag = std::integral_constant<ActivationKind, kind>;

// Calls body with the activation's tag, so that each activation is compiled on its own.
template <typename F>
MNIST_OPS_HD auto dispatch_activation(ActivationKind kind, const F& body) {
  switch (kind) {
    case ActivationKind::kTanh:
      return body(ActivationTag<ActivationKind::kTanh>{});
    case ActivationKind::kRelu:
      return body(ActivationTag<ActivationKind::kRelu>{});
    case ActivationKind::kSigmoid:
      return body(ActivationTag<ActivationKind::kSigmoid>{});
    case ActivationKind::kIdentity:
      break;
  }
  return body(ActivationTag<ActivationKind::kIdentity>{});
}

// act(x).
template <ActivationKind kind, typename A>
MNIST_OPS_HD A activation_value(A x) {
  if constexpr (kind == ActivationKind::kTanh) {
    return elementary::tanh(x);
  } else if constexpr (kind == ActivationKind::kRelu) {
    return x < A(0) ? A(0) : x;  // NaN stays NaN
  } else if constexpr (kind == ActivationKind::kSigmoid) {
    return elementary::sigmoid(x);
  } else {
    return x;
  }
}

template <typename A>
MNIST_OPS_HD A activation_value(ActivationKind kind, A x) {
  return dispatch_activation(kind,
                             [x](auto tag) { return activation_value<decltype(tag)::value>(x); });
}

// grad times act'(x), from a = act(x).
template <ActivationKind kind, typename A>
MNIST_OPS_HD A activation_gradient(A grad, A a) {
  if constexpr (kind == ActivationKind::kTanh) {
    return grad * (A(1) - a * a);
  } else if constexpr (kind == ActivationKind::kRelu) {
    return a <= A(0) ? A(0) : grad;
  } else if constexpr (kind == ActivationKind::kSigmoid) {
    return sigmoid_gradient(grad, a);
  } else {
    return grad;
  }
}

template <typename A>
MNIST_OPS_HD A activation_gradient(ActivationKind kind, A grad, A a) {
  return dispatch_activation(
      kind, [=](auto tag) { return activation_gradient<decltype(tag)::value>(grad, a); });
}

}  // namespace mnist_ops
