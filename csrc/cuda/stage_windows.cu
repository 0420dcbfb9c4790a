// Stages with any other windows, and those whose maps are too large for a block.

#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr int kStageThreads = 512;  // of a block that takes windows one by one

// An input plane as lp_pool.h reads it, activated element by element.
template <typename T>
struct ActivatedPlane {
  using math_type = opmath_t<T>;
  const T* first;
  ActivationKind kind;

  template <typename I>
  __device__ math_type operator[](I i) const {
    return activation_value(kind, static_cast<math_type>(first[i]));
  }
};

// Where the index-th element, in the order of memory, of images with planes of H x W lies.
template <typename I>
struct Position {
  I n, c, h, w;
};

template <typename I>
__device__ __forceinline__ Position<I> position_of(I index, bool channels_last, I C, I H, I W) {
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  U rest = static_cast<U>(index), c = 0;
  if (channels_last) {
    c = rest % static_cast<U>(C);
    rest /= static_cast<U>(C);
  }
  const U w = rest % static_cast<U>(W);
  rest /= static_cast<U>(W);
  const U h = rest % static_cast<U>(H);
  rest /= static_cast<U>(H);
  if (!channels_last) {
    c = rest % static_cast<U>(C);
    rest /= static_cast<U>(C);
  }
  return {static_cast<I>(rest), static_cast<I>(c), static_cast<I>(h), static_cast<I>(w)};
}

// -------------------------------------------------------------------------------- any other window

template <Norm norm, typename T, typename A>
__device__ void pool_windows(const Fused<T>& s, const T* x, A* map) {
  for (int32_t i = this_thread(); i < s.map_size(); i += block_threads()) {
    const auto at = position_of(i, s.channels_last, s.g.C, s.g.OH, s.g.OW);
    const ActivatedPlane<T> plane{x + s.g.input_offset(0, at.c), s.activation};
    map[at.c * s.step_c() + (at.h * s.g.OW + at.w) * s.step_pixel()] =
        window_norm<norm>(plane, s.g, s.p, at.h, at.w);
  }
}

template <Norm norm, typename T, typename A>
__device__ void unpool_windows(const Fused<T>& s, const SharedMemory<A>& m, const T* x, T* gx) {
  PoolGeometryOf<int32_t> g = s.g;  // of the maps in shared memory
  g.out_c = s.step_c(), g.out_w = s.step_pixel(), g.out_h = s.g.OW * s.step_pixel();
  each_map_element<1>(s, [&](int32_t, int32_t at, int32_t pixel) { m.map[at] -= m.mean[pixel]; });
  __syncthreads();
  for (int32_t i = this_thread(); i < g.C * g.H * g.W; i += block_threads()) {
    const auto at = position_of(i, s.channels_last, g.C, g.H, g.W);
    const ActivatedPlane<T> plane{x + g.input_offset(0, at.c), s.activation};
    const int32_t o = g.output_offset(0, at.c);
    const A grad = input_gradient<norm>(static_cast<const A*>(m.map + o), plane,
                                        static_cast<const A*>(m.norms + o), g, s.p, at.h, at.w);
    gx[i] = static_cast<T>(
        activation_gradient(s.activation, grad, plane[at.h * g.in_h + at.w * g.in_w]));
  }
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s, 1);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    pool_windows<norm>(s, input + image * s.g.in_n, m.map);
    blur_map<false>(s, m, image == blockIdx.x);
    write_map(s, m, output + image * s.g.out_n);
    __syncthreads();
  }
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_backward_kernel(Fused<T> s, const T* __restrict__ grad_output,
                          const T* __restrict__ input, T* __restrict__ grad_input) {
  const auto m = shared_memory(s, 2);
  prepare(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T* x = input + image * s.g.in_n;
    read_map(s, m, grad_output + image * s.g.out_n);
    pool_windows<norm>(s, x, m.norms);
    blur_map<true>(s, m, image == blockIdx.x);
    unpool_windows<norm>(s, m, x, grad_input + image * s.g.in_n);
    __syncthreads();
  }
}

// -------------------------------------------------------------------------------------- large maps

template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(I count, PoolGeometryOf<I> g, bool channels_last, ActivationKind activation,
                opmath_t<T> p, const T* __restrict__ input, opmath_t<T>* __restrict__ pooled) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const auto at = position_of(i, channels_last, g.C, g.OH, g.OW);
    const ActivatedPlane<T> plane{input + g.input_offset(at.n, at.c), activation};
    pooled[i] = window_norm<norm>(plane, g, p, at.h, at.w);
  }
}

// grad: with respect to the pooled map.
template <Norm norm, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    unpool_kernel(I count, PoolGeometryOf<I> g, bool channels_last, ActivationKind activation,
                  opmath_t<T> p, const T* __restrict__ grad, const T* __restrict__ input,
                  const opmath_t<T>* __restrict__ pooled, T* __restrict__ grad_input) {
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const auto at = position_of(i, channels_last, g.C, g.H, g.W);
    const ActivatedPlane<T> plane{input + g.input_offset(at.n, at.c), activation};
    const I o = g.output_offset(at.n, at.c);
    const opmath_t<T> gradient =
        input_gradient<norm>(grad + o, plane, pooled + o, g, p, at.h, at.w);
    grad_input[i] = static_cast<T>(
        activation_gradient(activation, gradient, plane[at.h * g.in_h + at.w * g.in_w]));
  }
}

// Calls body(norm's tag, geometry) with the geometry in 32 bits where that is enough, for p = 2
// alone: others are bound by their powers, or rare enough to do without.
template <typename F>
void dispatch_large(const StageArguments& arguments, F&& body) {
  dispatch_norm(arguments.p, [&](auto tag) {
    if constexpr (decltype(tag)::value == Norm::kTwo) {
      if (fits_narrow(arguments.geometry, arguments.geometry.N)) {
        return body(tag, narrow(arguments.geometry));
      }
    }
    body(tag, arguments.geometry);
  });
}

// The pooled map in the type to compute in: unrounded, where the tensors are of a half type.
template <typename T, typename A = opmath_t<T>>
Tensor pooled_map(const Launcher& launcher, const Images& x, const StageArguments& arguments) {
  const PoolGeometry& geometry = arguments.geometry;
  Tensor pooled = empty_images(x, geometry.OH, geometry.OW, type_to_compute_in(x.data));
  dispatch_large(arguments, [&](auto tag, const auto& g) {
    using I = decltype(g.N + 0);
    launcher.run_over(pool_kernel<decltype(tag)::value, T, I>, pooled.numel(),
                      static_cast<I>(pooled.numel()), g, x.channels_last, arguments.activation,
                      static_cast<A>(arguments.p), x.data.const_data_ptr<T>(),
                      pooled.mutable_data_ptr<A>());
  });
  return pooled;
}

}  // namespace

}  // namespace mnist_ops::cuda
