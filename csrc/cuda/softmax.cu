// Softmax, log-softmax and softmax + NLL on CUDA.
//
// Bound by memory: one read and one write of every element where a line fits into registers, two
// reads and one write elsewhere, the second of which finds most of its data in L2.
//
// Short rows, of up to 1024 elements innermost in memory: the lanes of a warp share a row and hold
// it in registers; rows of up to 16 elements share a warp.
//
// Other lines: a block takes one long row, or 32 to 256 neighbouring lines where the dimension is
// not innermost (threadIdx.x across them, so that reads are coalesced; threadIdx.y shares out each
// line). One pass finds the largest value and the sum together.
//
// Sums are added in an order that depends on the shape alone.
//
// softmax_nll: a target outside of [0, classes) gives NaN, as loss and as gradient of its row. To
// refuse it, as the CPU does, the host would have to wait for the device.

#include "../softmax.h"

#include "common.cuh"

namespace mnist_ops::cuda {
namespace {

enum class Kind { kSoftmax, kLogSoftmax, kNll };

// The largest of some values v, and the sum of exp(v - largest).
template <typename A>
struct Partial {
  A largest = -std::numeric_limits<A>::infinity();
  A sum = A(0);

  __device__ void add(A v) {
    if (v > largest) {
      sum = sum * std::exp(largest - v) + A(1);
      largest = v;
    } else if (v != -std::numeric_limits<A>::infinity()) {  // whose share is 0, not exp(-inf + inf)
      sum += std::exp(v - largest);
    }
  }

  __device__ void merge(const Partial& other) {
    const A m = other.largest > largest ? other.largest : largest;
    // Equal infinities must not become NaN here: a part that holds nothing else counts for 0.
    const A mine = largest == m ? sum : sum * std::exp(largest - m);
    const A theirs = other.largest == m ? other.sum : other.sum * std::exp(other.largest - m);
    largest = m;
    sum = mine + theirs;
  }

  // Where the largest value is infinite, of either sign, the row is NaN, as it is when exp(v -
  // largest) is added up after the largest value has been found.
  __device__ void finish() { sum += largest - largest; }
};

template <typename T>
struct Forward {
  using A = opmath_t<T>;
  SoftmaxGeometry g;
  A scale;
  const T* in;
  T* out;  // every element's (log-)probability, or every line's loss
  // softmax_nll only
  const int64_t* target = nullptr;
  A* logsumexp = nullptr;
};

template <Kind kind, typename A>
__device__ __forceinline__ A line_value(A v, A largest, A sum, A log_sum) {
  return kind == Kind::kSoftmax ? std::exp(v - largest) / sum : v - log_sum;
}

// Loss and log of the sum of one line; first is its first element.
template <typename T, typename A>
__device__ __forceinline__ void write_loss(const Forward<T>& f, int64_t line, const T* first,
                                           A largest, A sum) {
  const int64_t t = f.target[line];
  const A log_sum = std::log(sum);
  A loss = std::numeric_limits<A>::quiet_NaN();
  if (t >= 0 && t < f.g.size) {
    // The difference to the largest first: exact where both are large.
    loss = log_sum - (f.scale * static_cast<A>(first[t * f.g.inner]) - largest);
  }
  f.out[line] = static_cast<T>(loss);
  f.logsumexp[line] = largest + log_sum;
}

// ------------------------------------------------------------------------------------- short rows

// kHeld elements a thread, `lanes` threads a row. The missing elements of a row count as -inf.
template <Kind kind, int kHeld, typename T>
__global__ void __launch_bounds__(kThreads) forward_rows_kernel(Forward<T> f, int lanes) {
  using A = opmath_t<T>;
  const int64_t rows = f.g.outer;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int size = static_cast<int>(f.g.size);
  // The same number of turns for every thread of a warp: they meet in the shuffles.
  for (int64_t base = blockIdx.x * per_block; base < rows; base += gridDim.x * per_block) {
    const int64_t row = base + threadIdx.x / static_cast<unsigned>(lanes);
    const T* first = f.in + row * size;
    A values[kHeld];
    A largest = -std::numeric_limits<A>::infinity();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = lane + k * lanes;
      values[k] = row < rows && i < size ? f.scale * static_cast<A>(first[i])
                                         : -std::numeric_limits<A>::infinity();
      largest = values[k] > largest ? values[k] : largest;
    }
    largest = lane_max(largest, lanes);
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const A power = std::exp(values[k] - largest);
      sum += power;
      if (kind == Kind::kSoftmax) values[k] = power;
    }
    sum = lane_sum(sum, lanes);
    if (row >= rows) continue;
    if constexpr (kind == Kind::kNll) {
      if (lane == 0) write_loss(f, row, first, largest, sum);
    } else {
      const A log_sum = kind == Kind::kLogSoftmax ? largest + std::log(sum) : A(0);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = lane + k * lanes;
        if (i < size) {
          f.out[row * size + i] =
              static_cast<T>(kind == Kind::kSoftmax ? values[k] / sum : values[k] - log_sum);
        }
      }
    }
  }
}

template <typename T>
struct Backward {
  SoftmaxGeometry g;
  opmath_t<T> scale;
  const T *grad, *out;
  T* result;
};

// What is added up along a line, and the gradient of one element.
template <Kind kind, typename A>
__device__ __forceinline__ A gradient_term(A grad, A y) {
  return kind == Kind::kSoftmax ? grad * y : grad;
}

template <Kind kind, typename A>
__device__ __forceinline__ A gradient_value(A grad, A y, A sum, A scale) {
  return kind == Kind::kSoftmax ? scale * y * (grad - sum) : scale * (grad - std::exp(y) * sum);
}

template <Kind kind, int kHeld, typename T>
__global__ void __launch_bounds__(kThreads) backward_rows_kernel(Backward<T> b, int lanes) {
  using A = opmath_t<T>;
  const int64_t rows = b.g.outer;
  const int64_t per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int size = static_cast<int>(b.g.size);
  for (int64_t base = blockIdx.x * per_block; base < rows; base += gridDim.x * per_block) {
    const int64_t row = base + threadIdx.x / static_cast<unsigned>(lanes);
    const int64_t first = row * size;
    A grads[kHeld], ys[kHeld];
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = lane + k * lanes;
      const bool inside = row < rows && i < size;
      grads[k] = inside ? static_cast<A>(b.grad[first + i]) : A(0);
      ys[k] = inside ? static_cast<A>(b.out[first + i]) : A(0);
      sum += gradient_term<kind>(grads[k], ys[k]);
    }
    sum = lane_sum(sum, lanes);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = lane + k * lanes;
      if (row < rows && i < size) {
        b.result[first + i] = static_cast<T>(gradient_value<kind>(grads[k], ys[k], sum, b.scale));
      }
    }
  }
}

// ------------------------------------------------------------------------------------ other lines

// Combines what the threads of one threadIdx.x hold, by a tree over threadIdx.y, and gives the
// result to all of them. All threads of the block must take part.
template <typename V, typename Combine>
__device__ __forceinline__ V combine_lines(V value, V* shared, const Combine& combine) {
  const unsigned slot = threadIdx.y * blockDim.x + threadIdx.x;
  shared[slot] = value;
  __syncthreads();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      value = shared[slot];
      combine(value, shared[slot + half * blockDim.x]);
      shared[slot] = value;
    }
    __syncthreads();
  }
  value = shared[threadIdx.x];
  __syncthreads();  // before shared is used again
  return value;
}

// Shared memory for one value a thread; V may have constructors, which __shared__ may not.
template <typename V>
struct alignas(V) SharedValues {
  unsigned char bytes[sizeof(V) * kThreads];
  __device__ V* get() { return reinterpret_cast<V*>(bytes); }
};

// The first element of a line; its elements are g.inner apart.
__device__ __forceinline__ int64_t line_offset(const SoftmaxGeometry& g, int64_t line) {
  const int64_t outer = line / g.inner;
  return outer * g.size * g.inner + (line - outer * g.inner);
}

template <Kind kind, typename T>
__global__ void __launch_bounds__(kThreads) forward_lines_kernel(Forward<T> f) {
  using A = opmath_t<T>;
  __shared__ SharedValues<Partial<A>> shared;
  const int64_t lines = f.g.outer * f.g.inner, size = f.g.size, step = f.g.inner;
  // The same number of turns for every thread of a block: they meet at the barriers.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < lines;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = base + threadIdx.x;
    const int64_t offset = line < lines ? line_offset(f.g, line) : 0;
    const int64_t end = line < lines ? size : 0;
    const T* in = f.in + offset;
    Partial<A> whole;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
      whole.add(f.scale * static_cast<A>(in[i * step]));
    }
    whole =
        combine_lines(whole, shared.get(), [](Partial<A>& a, const Partial<A>& b) { a.merge(b); });
    whole.finish();
    if constexpr (kind == Kind::kNll) {
      if (threadIdx.y == 0 && line < lines) {
        write_loss(f, line, in, whole.largest, whole.sum);
      }
    } else {
      const A log_sum = kind == Kind::kLogSoftmax ? whole.largest + std::log(whole.sum) : A(0);
      T* out = f.out + offset;
#pragma unroll 4
      for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
        const A v = f.scale * static_cast<A>(in[i * step]);
        out[i * step] = static_cast<T>(line_value<kind>(v, whole.largest, whole.sum, log_sum));
      }
    }
  }
}

template <Kind kind, typename T>
__global__ void __launch_bounds__(kThreads) backward_lines_kernel(Backward<T> b) {
  using A = opmath_t<T>;
  __shared__ SharedValues<A> shared;
  const int64_t lines = b.g.outer * b.g.inner, size = b.g.size, step = b.g.inner;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < lines;
       base += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = base + threadIdx.x;
    const int64_t offset = line < lines ? line_offset(b.g, line) : 0;
    const int64_t end = line < lines ? size : 0;
    const T *grad = b.grad + offset, *out = b.out + offset;
    A sum = A(0);
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
      sum += gradient_term<kind>(static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]));
    }
    sum = combine_lines(sum, shared.get(), [](A& a, const A& other) { a += other; });
    T* result = b.result + offset;
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < end; i += blockDim.y) {
      result[i * step] = static_cast<T>(gradient_value<kind>(
          static_cast<A>(grad[i * step]), static_cast<A>(out[i * step]), sum, b.scale));
    }
  }
}

// ------------------------------------------------------------------------- gradient of the loss

// Element by element in the order of memory: the forward left the log of the sum.
template <typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    nll_gradient_kernel(I count, I size, I inner, opmath_t<T> scale,
                        const T* __restrict__ grad_loss, const T* __restrict__ input,
                        const int64_t* __restrict__ target,
                        const opmath_t<T>* __restrict__ logsumexp, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  for (I i = first_item<I>(); i < count; i += item_stride<I>()) {
    const U above = inner == 1 ? static_cast<U>(i) : static_cast<U>(i) / static_cast<U>(inner);
    const U outer = above / static_cast<U>(size);
    const U index = above - outer * static_cast<U>(size);  // along the line
    const U line =
        outer * static_cast<U>(inner) + (static_cast<U>(i) - above * static_cast<U>(inner));
    const int64_t t = target[line];
    A factor = scale * static_cast<A>(grad_loss[line]);
    if (t < 0 || t >= static_cast<int64_t>(size)) factor = std::numeric_limits<A>::quiet_NaN();
    A value = factor * std::exp(scale * static_cast<A>(input[i]) - logsumexp[line]);
    if (static_cast<int64_t>(index) == t) value -= factor;
    grad_input[i] = static_cast<T>(value);
  }
}

// --------------------------------------------------------------------------------------- launches

constexpr int64_t kLongestHeldRow = 1024;

template <int n>
struct Held {
  static constexpr int value = n;
};

// Calls body(elements a thread holds, lanes) for a row of up to kLongestHeldRow elements.
template <typename F>
void dispatch_held(int64_t size, F&& body) {
  if (size <= kWarp) return body(Held<1>{}, lanes_for(size));
  if (size <= 4 * kWarp) return body(Held<4>{}, kWarp);
  if (size <= 16 * kWarp) return body(Held<16>{}, kWarp);
  return body(Held<32>{}, kWarp);
}

// How many lines a block takes side by side.
int lines_of_block(const SoftmaxGeometry& g) {
  if (g.inner == 1) return 1;
  return g.size < 64 ? kThreads : kWarp;
}

template <Kind kind, typename T>
void launch_forward(const Launcher& launcher, const Forward<T>& f) {
  if (f.g.inner == 1 && f.g.size <= kLongestHeldRow) {
    dispatch_held(f.g.size, [&](auto held, int lanes) {
      launcher.run(forward_rows_kernel<kind, decltype(held)::value, T>, f.g.outer, kThreads / lanes,
                   kThreads, f, lanes);
    });
  } else {
    const int lines = lines_of_block(f.g);
    launcher.run(forward_lines_kernel<kind, T>, f.g.outer * f.g.inner, lines, lines, f);
  }
}

template <Kind kind, typename T>
void launch_backward(const Launcher& launcher, const Backward<T>& b) {
  if (b.g.inner == 1 && b.g.size <= kLongestHeldRow) {
    dispatch_held(b.g.size, [&](auto held, int lanes) {
      launcher.run(backward_rows_kernel<kind, decltype(held)::value, T>, b.g.outer,
                   kThreads / lanes, kThreads, b, lanes);
    });
  } else {
    const int lines = lines_of_block(b.g);
    launcher.run(backward_lines_kernel<kind, T>, b.g.outer * b.g.inner, lines, lines, b);
  }
}

// ------------------------------------------------------------------------------------- operators

template <Kind kind>
Tensor softmax_forward(const char* op, const Tensor& input, int64_t dim, double beta) {
  dim = checked_dim(op, input, dim);
  const Launcher launcher(input);
  Tensor output = torch::stable::empty_like(input);
  const Tensor x = in_memory_order_of(output, input);
  const SoftmaxGeometry g = softmax_geometry(output, dim);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_forward<kind>(launcher, Forward<T>{g, static_cast<opmath_t<T>>(beta),
                                              x.const_data_ptr<T>(), output.mutable_data_ptr<T>()});
  });
  return output;
}

template <Kind kind>
Tensor softmax_gradient(const char* op, const Tensor& grad_output, const Tensor& output,
                        int64_t dim, double beta) {
  dim = checked_dim(op, output, dim);
  check_like(op, "grad_output", grad_output, "output", output);
  const Launcher launcher(output);
  Tensor grad_input = torch::stable::empty_like(output);
  const Tensor y = in_memory_order_of(grad_input, output);
  const Tensor grad = in_memory_order_of(grad_input, grad_output);
  const SoftmaxGeometry g = softmax_geometry(grad_input, dim);
  dispatch_floating(op, output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_backward<kind>(launcher,
                          Backward<T>{g, static_cast<opmath_t<T>>(beta), grad.const_data_ptr<T>(),
                                      y.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>()});
  });
  return grad_input;
}

Tensor softmax(const Tensor& input, int64_t dim, double beta) {
  return softmax_forward<Kind::kSoftmax>("softmax", input, dim, beta);
}
Tensor log_softmax(const Tensor& input, int64_t dim, double beta) {
  return softmax_forward<Kind::kLogSoftmax>("log_softmax", input, dim, beta);
}
Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, double beta) {
  return softmax_gradient<Kind::kSoftmax>("softmax_backward", grad_output, output, dim, beta);
}
Tensor log_softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim,
                            double beta) {
  return softmax_gradient<Kind::kLogSoftmax>("log_softmax_backward", grad_output, output, dim,
                                             beta);
}

template <typename A>
constexpr ScalarType kWide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

std::tuple<Tensor, Tensor> softmax_nll(const Tensor& input, const Tensor& target, double beta) {
  const char* op = "softmax_nll";
  const int64_t dim = check_softmax_nll(op, input, target);
  const Launcher launcher(input);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = torch::stable::contiguous(target);
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor loss = torch::stable::new_empty(x, classes.sizes());
  Tensor logsumexp;
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    logsumexp = torch::stable::new_empty(x, classes.sizes(), kWide<A>);
    launch_forward<Kind::kNll>(
        launcher,
        Forward<T>{g, static_cast<A>(beta), x.const_data_ptr<T>(), loss.mutable_data_ptr<T>(),
                   classes.const_data_ptr<int64_t>(), logsumexp.mutable_data_ptr<A>()});
  });
  return {loss, logsumexp};
}

Tensor softmax_nll_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                            const Tensor& logsumexp, double beta) {
  const char* op = "softmax_nll_backward";
  const int64_t dim = check_softmax_nll(op, input, target);
  const Tensor x = dense(input, is_channels_last(input));
  const Tensor classes = torch::stable::contiguous(target);
  MNIST_OPS_CHECK(same_shape(grad_loss, target) && same_shape(logsumexp, target), op,
                  ": grad_loss and logsumexp must have the shape of target, ", shape_string(target),
                  ", got ", shape_string(grad_loss), " and ", shape_string(logsumexp));
  MNIST_OPS_CHECK(grad_loss.scalar_type() == input.scalar_type(), op,
                  ": grad_loss must have the dtype of input, ",
                  torch::headeronly::toString(input.scalar_type()), ", got ",
                  torch::headeronly::toString(grad_loss.scalar_type()));
  MNIST_OPS_CHECK(grad_loss.device() == input.device() && logsumexp.device() == input.device(), op,
                  ": grad_loss, logsumexp and input are on different devices");
  const Launcher launcher(input);
  const Tensor grad = torch::stable::contiguous(grad_loss);
  const Tensor saved = torch::stable::contiguous(logsumexp);
  const SoftmaxGeometry g = softmax_geometry(x, dim);
  Tensor grad_input = torch::stable::empty_like(x);
  dispatch_floating(op, input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    MNIST_OPS_CHECK(saved.scalar_type() == kWide<A>, op, ": logsumexp must be ",
                    torch::headeronly::toString(kWide<A>), ", got ",
                    torch::headeronly::toString(saved.scalar_type()));
    const auto launch = [&](auto index) {
      using I = decltype(index);
      launcher.run_over(nll_gradient_kernel<T, I>, x.numel(), static_cast<I>(x.numel()),
                        static_cast<I>(g.size), static_cast<I>(g.inner), static_cast<A>(beta),
                        grad.const_data_ptr<T>(), x.const_data_ptr<T>(),
                        classes.const_data_ptr<int64_t>(), saved.const_data_ptr<A>(),
                        grad_input.mutable_data_ptr<T>());
    };
    if (fits_32_bits(x.numel())) {
      launch(int32_t{});
    } else {
      launch(int64_t{});
    }
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("log_softmax", TORCH_BOX(&log_softmax));
  m.impl("log_softmax_backward", TORCH_BOX(&log_softmax_backward));
  m.impl("softmax_nll", TORCH_BOX(&softmax_nll));
  m.impl("softmax_nll_backward", TORCH_BOX(&softmax_nll_backward));
}

}  // namespace mnist_ops::cuda
