// A stage (activation, LP pooling, subtractive normalization) on CUDA.
//
// Bound by memory: the forward pass reads the input and writes the output, the backward pass reads
// input and gradient and writes a gradient, each of them once. Two ways:
//
// One block takes one image where its pooled map, in the type to compute in, fits into shared
// memory. There the map waits for its mean: sums over channels, the blur of that one plane and the
// subtraction are between barriers of the block, not between kernels; coef and the normalised
// weights are made on the way. Windows of 2 x 2 with p = 2, the networks', are taken in pairs of
// rows, up to 4 elements of each by one instruction, all of a window in the registers of one
// thread. All others go through the functions of one window and one element in ../lp_pool.h; their
// backward pass keeps the norms in shared memory, too, and reads the input a second time, from
// cache.
//
// Larger maps: activation and pooling in one kernel, whose result (in the type to compute in) the
// normalization then takes; backwards the normalization first, then the pooled map once more, then
// one kernel from its gradient to that of the input. No atomics either way.

#include "../stage.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr int kStageThreads = 512;  // of a block: four blocks fill an SM where registers allow it

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

// ------------------------------------------------------------------------------- a block, an image

template <typename T>
struct Fused {
  using A = opmath_t<T>;
  int64_t N;
  PoolGeometryOf<int32_t> g;  // of one image
  ActivationKind activation;
  bool channels_last;
  A p;
  const double* kernel;
  int32_t taps_h, taps_w;
  bool separable;
  int32_t pack;   // elements of a row of the input that are read at once; 0: no pairs of rows
  bool map_pack;  // whether the tensors of the output's shape are read and written in packs

  MNIST_OPS_HD int32_t taps() const { return separable ? taps_w : taps_h * taps_w; }
  MNIST_OPS_HD int32_t pixels() const { return g.OH * g.OW; }
  MNIST_OPS_HD int32_t map_size() const { return g.C * pixels(); }
  // The map in shared memory. In NHWC an odd distance between pixels keeps the threads that add up
  // their channels in different banks.
  MNIST_OPS_HD int32_t step_pixel() const { return channels_last ? g.C | 1 : 1; }
  MNIST_OPS_HD int32_t step_c() const { return channels_last ? 1 : pixels(); }
  MNIST_OPS_HD int32_t shared_map_size() const {
    return channels_last ? pixels() * step_pixel() : map_size();
  }
  MNIST_OPS_HD int32_t plane_size() const {
    return pixels() > kStageThreads ? pixels() : kStageThreads;
  }
  int64_t shared_bytes(int maps) const {
    const int64_t size = maps * shared_map_size() + pixels() + plane_size() + 2 * taps();
    return size * static_cast<int64_t>(sizeof(A));
  }
};

template <typename A>
struct SharedMemory {
  A* map;        // pooled, or the gradient with respect to that
  A* norms;      // pooled, where the map is the gradient
  A* mean;       // a plane: the sum over channels, then what is subtracted
  A* plane;      // another one, or a number for each thread
  A* weight[2];  // normalised, [adjoint]
};

template <typename T, typename A = opmath_t<T>>
__device__ SharedMemory<A> shared_memory(const Fused<T>& s, int maps) {
  SharedMemory<A> m;
  m.map = reinterpret_cast<A*>(dynamic_shared_memory());
  m.norms = m.map + (maps - 1) * s.shared_map_size();
  m.mean = m.norms + s.shared_map_size();
  m.plane = m.mean + s.pixels();
  m.weight[0] = m.plane + s.plane_size();
  m.weight[1] = m.weight[0] + s.taps();
  return m;
}

// By one warp, while the others are busy with the image. A barrier must follow.
template <typename T, typename A>
__device__ void normalise_weights(const Fused<T>& s, const SharedMemory<A>& m) {
  if (threadIdx.x >= kWarp) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x);
  double sum = 0;
  for (int32_t i = lane; i < s.taps(); i += kWarp) sum += s.kernel[i];
  const double total = lane_sum(sum, kWarp);
  for (int32_t i = lane; i < s.taps(); i += kWarp) {
    const A weight = static_cast<A>(s.kernel[i] / total);
    m.weight[0][i] = weight;
    m.weight[1][s.taps() - 1 - i] = weight;
  }
}

// From the map to the plane that is subtracted: the mean or, adjoint, the share of its gradient.
// Begins and ends with a barrier.
template <bool adjoint, typename T, typename A>
__device__ void blur_map(const Fused<T>& s, const SharedMemory<A>& m) {
  const int32_t pixels = s.pixels(), thread = static_cast<int32_t>(threadIdx.x);
  const int32_t OH = s.g.OH, OW = s.g.OW, C = s.g.C;
  const auto coefficient = [&](int32_t pixel) {
    return coefficient_at<A>(pixel / OW, pixel % OW, OH, OW, m.weight[0], s.taps_h, s.taps_w,
                             s.separable);
  };
  const auto finish = [&](A blurred, int32_t pixel) {
    return adjoint ? blurred / static_cast<A>(C)
                   : local_mean(blurred, static_cast<A>(C), coefficient(pixel));
  };
  const A* weight = m.weight[adjoint];
  __syncthreads();
  // Several threads share the channels of a pixel; their sums are added in a fixed order.
  int32_t groups = kStageThreads / pixels;
  groups = groups < 1 ? 1 : groups < C ? groups : C;
  for (int32_t i = thread; i < groups * pixels; i += kStageThreads) {
    const int32_t group = i / pixels, pixel = i - group * pixels;
    const A* from = m.map + pixel * s.step_pixel();
    A sum = A(0);
    for (int32_t c = group; c < C; c += groups) sum += from[c * s.step_c()];
    m.plane[i] = sum;
  }
  __syncthreads();
  for (int32_t pixel = thread; pixel < pixels; pixel += kStageThreads) {
    A sum = m.plane[pixel];
    for (int32_t k = 1; k < groups; ++k) sum += m.plane[k * pixels + pixel];
    m.mean[pixel] = adjoint ? sum / coefficient(pixel) : sum;
  }
  __syncthreads();
  if (s.separable) {
    for (int32_t pixel = thread; pixel < pixels; pixel += kStageThreads) {
      const A* row = m.mean + pixel / OW * OW;
      m.plane[pixel] = correlate_at(row, 1, OW, pixel % OW, weight, s.taps_w);
    }
    __syncthreads();
    for (int32_t pixel = thread; pixel < pixels; pixel += kStageThreads) {
      const A* column = m.plane + pixel % OW;
      m.mean[pixel] = finish(correlate_at(column, OW, OH, pixel / OW, weight, s.taps_w), pixel);
    }
  } else {
    for (int32_t pixel = thread; pixel < pixels; pixel += kStageThreads) {
      A blurred = A(0);
      for (int32_t k = 0; k < s.taps_h; ++k) {
        const int32_t h = pixel / OW + k - s.taps_h / 2;
        if (h < 0 || h >= OH) continue;
        blurred +=
            correlate_at(m.mean + h * OW, 1, OW, pixel % OW, weight + k * s.taps_w, s.taps_w);
      }
      m.plane[pixel] = finish(blurred, pixel);
    }
    __syncthreads();
    for (int32_t pixel = thread; pixel < pixels; pixel += kStageThreads) {
      m.mean[pixel] = m.plane[pixel];
    }
  }
  __syncthreads();
}

// Calls body(index in the tensor, index in the shared map, pixel) for this thread's elements of a
// map, the first of n neighbours each.
template <int n, typename T, typename F>
__device__ void each_map_element(const Fused<T>& s, const F& body) {
  const uint32_t inner = static_cast<uint32_t>(s.channels_last ? s.g.C : s.pixels());
  for (int32_t i = static_cast<int32_t>(threadIdx.x) * n; i < s.map_size();
       i += kStageThreads * n) {
    const uint32_t outer = static_cast<uint32_t>(i) / inner;
    const uint32_t rest = static_cast<uint32_t>(i) - outer * inner;
    if (s.channels_last) {
      body(i, static_cast<int32_t>(outer) * s.step_pixel() + static_cast<int32_t>(rest),
           static_cast<int32_t>(outer));
    } else {
      body(i, i, static_cast<int32_t>(rest));
    }
  }
}

template <int n, typename T, typename A>
__device__ void write_map(const Fused<T>& s, const SharedMemory<A>& m, T* output) {
  each_map_element<n>(s, [&](int32_t i, int32_t at, int32_t pixel) {
    Pack<T, n> to;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      to.values[j] = static_cast<T>(m.map[at + j] - m.mean[pixel + (s.channels_last ? 0 : j)]);
    }
    store_pack(output + i, to);
  });
}

template <int n, typename T, typename A>
__device__ void read_map(const Fused<T>& s, const SharedMemory<A>& m, const T* input) {
  each_map_element<n>(s, [&](int32_t i, int32_t at, int32_t) {
    const Pack<T, n> from = load_pack<n>(input + i);
#pragma unroll
    for (int j = 0; j < n; ++j) m.map[at + j] = static_cast<A>(from.values[j]);
  });
}

// ---------------------------------------------------------------------- windows in pairs of rows

// How many neighbours of a row one thread takes at most: 16 bytes, or 8 in half types, where more
// of them would seldom divide the width of a map.
template <typename T>
constexpr int kMostPairs = kPackSize<T> < 4 ? kPackSize<T> : 4;

// n neighbours of two rows, activated: n / 2 windows.
template <typename A, int n>
struct Pair {
  A top[n], bottom[n];
};

template <ActivationKind kind, int n, typename T, typename A = opmath_t<T>>
__device__ __forceinline__ Pair<A, n> activated_pair(const T* x, int32_t W) {
  const Pack<T, n> top = load_pack<n>(x), bottom = load_pack<n>(x + W);
  Pair<A, n> pair;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    pair.top[j] = activation_value<kind>(static_cast<A>(top.values[j]));
    pair.bottom[j] = activation_value<kind>(static_cast<A>(bottom.values[j]));
  }
  return pair;
}

// The norm of window j of a pair. Rarely by way of its largest element, which is then read again.
template <int n, typename T, typename A = opmath_t<T>>
__device__ __forceinline__ A pair_norm(const Pair<A, n>& pair, int j, const T* x,
                                       const Fused<T>& s) {
  const A a = pair.top[2 * j], b = pair.top[2 * j + 1];
  const A c = pair.bottom[2 * j], d = pair.bottom[2 * j + 1];
  const A sum = a * a + b * b + c * c + d * d;
  if (is_safe_square_sum(sum)) return std::sqrt(sum);
  return scaled_window_norm<Norm::kTwo>(ActivatedPlane<T>{x + 2 * j, s.activation}, s.g, s.p, 0, 0);
}

// Calls body(offset in the input, index in the map) for this thread's pairs of rows.
template <int n, typename T, typename F>
__device__ __forceinline__ void each_pair(const Fused<T>& s, const F& body) {
  const uint32_t per_row = static_cast<uint32_t>(s.g.W / n);
  const uint32_t rows = static_cast<uint32_t>(s.g.C * s.g.OH);
  for (uint32_t unit = threadIdx.x; unit < rows * per_row; unit += kStageThreads) {
    const uint32_t row = unit / per_row, column = unit - row * per_row;
    // With an odd height the last row of each plane is in no window.
    const uint32_t odd = s.g.H % 2 != 0 ? row / static_cast<uint32_t>(s.g.OH) : 0;
    body(static_cast<int32_t>((2 * row + odd) * static_cast<uint32_t>(s.g.W) + column * n),
         static_cast<int32_t>(unit * (n / 2)));
  }
}

template <int n, typename T, typename A>
__device__ void pool_pairs(const Fused<T>& s, const SharedMemory<A>& m, const T* x) {
  const auto pool = [&](auto tag) {
    each_pair<n>(s, [&](int32_t i, int32_t o) {
      const Pair<A, n> pair = activated_pair<decltype(tag)::value, n>(x + i, s.g.W);
#pragma unroll
      for (int j = 0; j < n / 2; ++j) m.map[o + j] = pair_norm(pair, j, x + i, s);
    });
  };
  dispatch_activation(s.activation, pool);
}

template <int n, typename T, typename A>
__device__ void unpool_pairs(const Fused<T>& s, const SharedMemory<A>& m, const T* x, T* gx) {
  const auto unpool = [&](auto tag) {
    constexpr ActivationKind kind = decltype(tag)::value;
    each_pair<n>(s, [&](int32_t i, int32_t o) {
      const Pair<A, n> pair = activated_pair<kind, n>(x + i, s.g.W);
      Pack<T, n> top, bottom;
#pragma unroll
      for (int j = 0; j < n / 2; ++j) {
        const A y = pair_norm(pair, j, x + i, s);
        const int32_t pixel =
            static_cast<int32_t>(static_cast<uint32_t>(o + j) % static_cast<uint32_t>(s.pixels()));
        const A grad = m.map[o + j] - m.mean[pixel];
        const auto element = [&](A a) {
          return static_cast<T>(
              activation_gradient<kind>(grad * norm_gradient<Norm::kTwo>(a, y, s.p), a));
        };
        top.values[2 * j] = element(pair.top[2 * j]);
        top.values[2 * j + 1] = element(pair.top[2 * j + 1]);
        bottom.values[2 * j] = element(pair.bottom[2 * j]);
        bottom.values[2 * j + 1] = element(pair.bottom[2 * j + 1]);
      }
      store_pack(gx + i, top);
      store_pack(gx + i + s.g.W, bottom);
    });
  };
  dispatch_activation(s.activation, unpool);
  if (s.g.H % 2 != 0) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < s.g.C * s.g.W; i += kStageThreads) {
      const int32_t c = i / s.g.W, at = (c + 1) * s.g.H * s.g.W - s.g.W + (i - c * s.g.W);
      // Nothing but a NaN makes anything of it.
      const A a = ActivatedPlane<T>{x, s.activation}[at];
      gx[at] = static_cast<T>(activation_gradient(s.activation, A(0), a));
    }
  }
}

// -------------------------------------------------------------------------------- any other window

template <Norm norm, typename T, typename A>
__device__ void pool_windows(const Fused<T>& s, const T* x, A* map) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < s.map_size(); i += kStageThreads) {
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
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < g.C * g.H * g.W; i += kStageThreads) {
    const auto at = position_of(i, s.channels_last, g.C, g.H, g.W);
    const ActivatedPlane<T> plane{x + g.input_offset(0, at.c), s.activation};
    const int32_t o = g.output_offset(0, at.c);
    const A grad = input_gradient<norm>(static_cast<const A*>(m.map + o), plane,
                                        static_cast<const A*>(m.norms + o), g, s.p, at.h, at.w);
    gx[i] = static_cast<T>(
        activation_gradient(s.activation, grad, plane[at.h * g.in_h + at.w * g.in_w]));
  }
}

// --------------------------------------------------------------------------------- the two kernels

// Calls body with the number of elements of a row that are read at once, 0 for single windows.
template <int n>
struct PackTag {
  static constexpr int value = n;
};

template <Norm norm, typename T, typename F>
__device__ __forceinline__ void dispatch_pack(const Fused<T>& s, const F& body) {
  if constexpr (norm == Norm::kTwo) {
    if constexpr (kMostPairs<T> == 4) {
      if (s.pack == 4) return body(PackTag<4>{});
    }
    if (s.pack == 2) return body(PackTag<2>{});
  }
  body(PackTag<0>{});
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_forward_kernel(Fused<T> s, const T* __restrict__ input, T* __restrict__ output) {
  const auto m = shared_memory(s, 1);
  normalise_weights(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T* x = input + image * s.g.in_n;
    dispatch_pack<norm>(s, [&](auto tag) {
      if constexpr (decltype(tag)::value > 0) {
        pool_pairs<decltype(tag)::value>(s, m, x);
      } else {
        pool_windows<norm>(s, x, m.map);
      }
    });
    blur_map<false>(s, m);
    if (s.map_pack) {
      write_map<kPackSize<T>>(s, m, output + image * s.g.out_n);
    } else {
      write_map<1>(s, m, output + image * s.g.out_n);
    }
    __syncthreads();  // before the next image takes the map's place
  }
}

template <Norm norm, typename T>
__global__ void __launch_bounds__(kStageThreads)
    fused_backward_kernel(Fused<T> s, int maps, const T* __restrict__ grad_output,
                          const T* __restrict__ input, T* __restrict__ grad_input) {
  const auto m = shared_memory(s, maps);
  normalise_weights(s, m);
  for (int64_t image = blockIdx.x; image < s.N; image += gridDim.x) {
    const T* x = input + image * s.g.in_n;
    T* gx = grad_input + image * s.g.in_n;
    if (s.map_pack) {
      read_map<kPackSize<T>>(s, m, grad_output + image * s.g.out_n);
    } else {
      read_map<1>(s, m, grad_output + image * s.g.out_n);
    }
    if (maps == 2) pool_windows<norm>(s, x, m.norms);
    blur_map<true>(s, m);
    dispatch_pack<norm>(s, [&](auto tag) {
      if constexpr (decltype(tag)::value > 0) {
        unpool_pairs<decltype(tag)::value>(s, m, x, gx);
      } else {
        unpool_windows<norm>(s, m, x, gx);
      }
    });
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

// ------------------------------------------------------------------------------------- operators

PoolGeometryOf<int32_t> narrow(const PoolGeometry& g) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  PoolGeometryOf<int32_t> s{};
  s.N = narrow(g.N), s.C = narrow(g.C), s.H = narrow(g.H), s.W = narrow(g.W);
  s.OH = narrow(g.OH), s.OW = narrow(g.OW);
  s.kernel_h = narrow(g.kernel_h), s.kernel_w = narrow(g.kernel_w);
  s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.padding_h = narrow(g.padding_h), s.padding_w = narrow(g.padding_w);
  s.in_n = narrow(g.in_n), s.in_c = narrow(g.in_c);
  s.in_h = narrow(g.in_h), s.in_w = narrow(g.in_w);
  s.out_n = narrow(g.out_n), s.out_c = narrow(g.out_c);
  s.out_h = narrow(g.out_h), s.out_w = narrow(g.out_w);
  return s;
}

// Whether every index into `images` images, and every bound of a window, fits into 32 bits.
bool fits_narrow(const PoolGeometry& g, int64_t images) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  return fits_32_bits(images * g.in_n) && fits_32_bits(images * g.out_n) && fits_32_bits(rows) &&
         fits_32_bits(columns);
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

// How many elements of a row of the input are read at once where 2 x 2 windows tile it; 0 where
// windows are taken one by one.
template <typename T, typename... Pointers>
int32_t pair_pack(const StageArguments& arguments, bool channels_last, const Pointers*... rows) {
  const PoolGeometry& g = arguments.geometry;
  const bool tiles = g.kernel_h == 2 && g.kernel_w == 2 && g.stride_h == 2 && g.stride_w == 2 &&
                     g.padding_h == 0 && g.padding_w == 0;
  // With ceil_mode a last row of windows may hang over the image.
  const bool inside = 2 * g.OH <= g.H && 2 * g.OW <= g.W;
  if (arguments.p != 2.0 || !tiles || !inside || channels_last) return 0;
  for (int32_t n = kMostPairs<T>; n >= 2; n /= 2) {
    const auto aligned = [n](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (static_cast<size_t>(n) * sizeof(T)) == 0;
    };
    if (g.W % n == 0 && (aligned(rows) && ...)) return n;
  }
  return 0;
}

// The stage for one kernel, a block for each image. map: a tensor of the output's shape; rows:
// those of the input's. The kernel is in float64.
template <typename T, typename... Rows>
Fused<T> fused(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
               const T* map, const Rows*... rows) {
  const PoolGeometry& g = arguments.geometry;
  Fused<T> s{};
  s.N = g.N;
  s.g = narrow(g);
  s.activation = arguments.activation;
  s.channels_last = channels_last;
  s.p = static_cast<opmath_t<T>>(arguments.p);
  s.kernel = kernel.const_data_ptr<double>();
  s.taps_h = static_cast<int32_t>(kernel.size(0));
  s.taps_w = static_cast<int32_t>(kernel.size(kernel.dim() - 1));
  s.separable = kernel.dim() == 1;
  s.pack = pair_pack<T>(arguments, channels_last, rows...);
  s.map_pack = (channels_last ? g.C : g.OH * g.OW) % kPackSize<T> == 0 && is_aligned(map);
  return s;
}

// Whether a block can hold an image; every size that Fused has is then below 2^31.
template <typename T>
bool fits_block(const StageArguments& arguments, const Tensor& kernel, int maps) {
  const PoolGeometry& g = arguments.geometry;
  const int64_t most = shared_memory_limit() / static_cast<int64_t>(sizeof(opmath_t<T>));
  const int64_t map = (g.C + 1) * g.OH * g.OW;
  return fits_narrow(g, 1) &&
         maps * map + 2 * (g.OH * g.OW + kernel.numel()) + kStageThreads <= most;
}

// The pooled map in the type to compute in: unrounded, where the tensors are of a half type.
template <typename T, typename A = opmath_t<T>>
Tensor pooled_map(const Launcher& launcher, const Images& x, const StageArguments& arguments) {
  const PoolGeometry& geometry = arguments.geometry;
  std::vector<int64_t> size;
  if (x.batched) size.push_back(x.N);
  size.insert(size.end(), {x.C, geometry.OH, geometry.OW});
  Tensor pooled =
      torch::stable::empty(size, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float,
                           x.data.layout(), x.data.device(), std::nullopt,
                           x.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  dispatch_large(arguments, [&](auto tag, const auto& g) {
    using I = decltype(g.N + 0);
    launcher.run_over(pool_kernel<decltype(tag)::value, T, I>, pooled.numel(),
                      static_cast<I>(pooled.numel()), g, x.channels_last, arguments.activation,
                      static_cast<A>(arguments.p), x.data.const_data_ptr<T>(),
                      pooled.mutable_data_ptr<A>());
  });
  return pooled;
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (x.data.numel() == 0 || fits_block<T>(arguments, kernel, 1)) {
      output = empty_images(x, arguments.geometry.OH, arguments.geometry.OW);
      if (x.data.numel() == 0) return;
      const Tensor weights = kernel_in_double(kernel);
      const T* in = x.data.const_data_ptr<T>();
      T* out = output.mutable_data_ptr<T>();
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, out, in);
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_forward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(1), s, in, out);
      });
      return;
    }
    output = subtractive_norm2d(pooled_map<T>(launcher, x, arguments), kernel);
    if (output.scalar_type() != x.data.scalar_type()) {
      output = torch::stable::to(output, x.data.scalar_type());
    }
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const int maps = pair_pack<T>(arguments, x.channels_last, in, gi) > 0 ? 1 : 2;
    if (fits_block<T>(arguments, kernel, maps)) {
      const Tensor weights = kernel_in_double(kernel);
      const T* go = grad_output.const_data_ptr<T>();
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, go, in, gi);
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_backward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(maps), s, maps, go, in, gi);
      });
      return;
    }
    const Tensor grad = subtractive_norm2d_backward(grad_output, kernel);
    const Tensor pooled = pooled_map<T>(launcher, x, arguments);
    dispatch_large(arguments, [&](auto tag, const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run_over(unpool_kernel<decltype(tag)::value, T, I>, grad_input.numel(),
                        static_cast<I>(grad_input.numel()), g, x.channels_last,
                        arguments.activation, static_cast<A>(arguments.p), grad.const_data_ptr<T>(),
                        in, pooled.const_data_ptr<A>(), gi);
    });
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
