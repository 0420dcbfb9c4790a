// Sigmoid on CUDA. Bound by memory: 2 words an element forward, 3 backward, one launch each. A
// thread takes 16 bytes at a time where the tensors are aligned to that, else one element;
// neighbouring threads take neighbouring memory either way. Where there is work for all of a large
// device a thread has four packs of each tensor on their way at once.

#include "../sigmoid.h"

#include "fast_math.cuh"
#include "memory.cuh"

namespace mnist_ops::cuda {
namespace {

// result = f(a), or f(a, b), of elements of type T.
struct Sigmoid {
  static constexpr bool kTwoInputs = false;
  template <typename T, typename A>
  static __device__ A value(A x, A) {
#if defined(__CUDA_ARCH__)
    // The rounding of half types hides that of the fast instructions: with 4 bytes an element the
    // exact ones would be the bound, not memory.
    if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
#endif
    return elementary::sigmoid(x);
  }
};

struct SigmoidGradient {
  static constexpr bool kTwoInputs = true;
  template <typename T, typename A>
  static __device__ A value(A grad, A y) {
    return sigmoid_gradient(grad, y);
  }
};

// n elements at a time, kFlight packs of a tensor in flight; what remains after the packs is left
// to the first threads.
template <int n, int kFlight, typename F, typename T>
__global__ void __launch_bounds__(kThreads)
    map_kernel(int64_t count, const T* __restrict__ a, const T* __restrict__ b,
               T* __restrict__ out) {
  using A = opmath_t<T>;
  const auto value = [](T from_a, T from_b) {
    return static_cast<T>(F::template value<T>(static_cast<A>(from_a), static_cast<A>(from_b)));
  };
  const int64_t packs = count / n;
  constexpr int64_t kTile = int64_t{kThreads} * kFlight;
  for (int64_t tile = blockIdx.x * kTile; tile < packs; tile += gridDim.x * kTile) {
    const int64_t first = tile + threadIdx.x;
    Pack<T, n> from_a[kFlight], from_b[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      const int64_t i = first + k * kThreads;
      if (i >= packs) continue;
      from_a[k] = load_pack<n>(a + i * n);
      if (F::kTwoInputs) from_b[k] = load_pack<n>(b + i * n);
    }
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      const int64_t i = first + k * kThreads;
      if (i >= packs) continue;
      Pack<T, n> to;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        to.values[j] =
            value(from_a[k].values[j], F::kTwoInputs ? from_b[k].values[j] : from_a[k].values[j]);
      }
      store_pack(out + i * n, to);
    }
  }
  const int64_t rest = packs * n + first_item<int64_t>();
  if (rest < count) out[rest] = value(a[rest], F::kTwoInputs ? b[rest] : a[rest]);
}

// Packs from which on a device of 150 multiprocessors is filled with kFlight packs a thread.
constexpr int64_t kManyPacks = int64_t{150} * 2048 * 4;

// b is not looked at where F has one input.
template <typename F, typename T>
void map(const Launcher& launcher, int64_t count, const T* a, const T* b, T* out) {
  constexpr int n = kPackSize<T>, kFlight = 4;
  if (are_aligned(a, b, out)) {
    // Rounded up, so that there is a block for a remainder even where there is no pack.
    const int64_t packs = ceil_div(count, n);
    if (packs >= std::min(kManyPacks, largest_narrow_index())) {
      launcher.run(map_kernel<n, kFlight, F, T>, packs, kThreads * kFlight, kThreads, count, a, b,
                   out);
    } else {
      launcher.run_over(map_kernel<n, 1, F, T>, packs, count, a, b, out);
    }
  } else {
    launcher.run_over(map_kernel<1, 1, F, T>, count, count, a, b, out);
  }
}

Tensor sigmoid(const Tensor& input) {
  const Launcher launcher(input);
  Tensor output = new_like(input);
  const Tensor x = in_memory_order_of(output, input);
  dispatch_floating("sigmoid", input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* in = x.const_data_ptr<T>();
    map<Sigmoid>(launcher, input.numel(), in, in, output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor sigmoid_backward(const Tensor& grad_output, const Tensor& output) {
  check_like("sigmoid_backward", "grad_output", grad_output, "output", output);
  const Launcher launcher(output);
  Tensor grad_input = new_like(output);
  const Tensor y = in_memory_order_of(grad_input, output);
  const Tensor g = in_memory_order_of(grad_input, grad_output);
  dispatch_floating("sigmoid_backward", output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    map<SigmoidGradient>(launcher, output.numel(), g.const_data_ptr<T>(), y.const_data_ptr<T>(),
                         grad_input.mutable_data_ptr<T>());
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("sigmoid", TORCH_BOX(&sigmoid));
  m.impl("sigmoid_backward", TORCH_BOX(&sigmoid_backward));
}

}  // namespace mnist_ops::cuda
