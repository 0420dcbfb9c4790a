// A stage (activation, LP pooling, subtractive normalization) on the CPU: the three operators, a
// few images at a time, so that what lies between them stays in cache. In float32 tanh, not memory,
// bounds the forward pass. Training therefore keeps it (ops/stage.py); where it does not, as in
// half types, the backward pass makes it once more.
#include "../stage.h"

#include "common.h"

namespace mnist_ops::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // elements converted at a time

// a = act(x). All types go by way of a buffer: from the image itself the compiler does not
// vectorise tanh.
template <typename T, typename A>
void activate(ActivationKind activation, const T* x, A* a, int64_t count) {
  dispatch_activation(activation, [&](auto tag) {
    A buffer[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t n = std::min(kChunk, count - i);
      convert(x + i, buffer, n);
      A* to = a + i;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) to[j] = activation_value<decltype(tag)::value>(buffer[j]);
    }
  });
}

// gx = act'(a) ga.
template <typename T, typename A>
void activate_backward(ActivationKind activation, const A* a, const A* ga, T* gx, int64_t count) {
  dispatch_activation(activation, [&](auto tag) {
    A buffer[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t n = std::min(kChunk, count - i);
      A* to = stage(gx + i, buffer);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        to[j] = activation_gradient<decltype(tag)::value>(ga[i + j], a[i + j]);
      }
      store(to, gx + i, n);
    }
  });
}

struct Backend {
  // So many that each thread has some hundred kilobytes.
  static int64_t images_at_once(const Images& x) {
    constexpr int64_t kElements = 1 << 17;
    const int64_t threads = torch::stable::get_num_threads();
    return threads * std::max<int64_t>(kElements / x.stride_n(), 1);
  }

  static void activate(ActivationKind activation, const Tensor& x, Tensor& a) {
    dispatch_floating("stage2d", x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const T* in = x.const_data_ptr<T>();
      auto* out = a.mutable_data_ptr<opmath_t<T>>();
      parallel_for(x.numel(), 8, [=](int64_t begin, int64_t end) {
        cpu::activate(activation, in + begin, out + begin, end - begin);
      });
    });
  }

  static void activate_backward(ActivationKind activation, const Tensor& a, const Tensor& grad_a,
                                Tensor& grad_x) {
    dispatch_floating("stage2d", grad_x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = opmath_t<T>;
      const A* value = a.const_data_ptr<A>();
      const A* grad = grad_a.const_data_ptr<A>();
      T* to = grad_x.mutable_data_ptr<T>();
      parallel_for(a.numel(), 1, [=](int64_t begin, int64_t end) {
        cpu::activate_backward(activation, value + begin, grad + begin, to + begin, end - begin);
      });
    });
  }

  static constexpr auto lp_pool2d = &cpu::lp_pool2d;
  static constexpr auto lp_pool2d_backward = &cpu::lp_pool2d_backward;
  static constexpr auto subtractive_norm2d = &cpu::subtractive_norm2d;
  static constexpr auto subtractive_norm2d_backward = &cpu::subtractive_norm2d_backward;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CPU, m) {
  StageOperators<Backend>::register_all(m);
}

}  // namespace mnist_ops::cpu
