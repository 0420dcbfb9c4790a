// Softmax, log-softmax and softmax + NLL on CUDA: what the kernels share.
//
// Bound by memory; every operator is one launch. Each element is read once and written once
// (softmax_nll: read once) where threads can hold a line in registers (softmax_held.cuh), in packs
// of 16 bytes where rows, lines whose elements are neighbours, are aligned to that:
//   tile     rows of up to 256 elements that are no packs (the reports' 10 classes): a block brings
//            as many as its threads hold to shared memory, as one piece, and up to 32 lanes share a
//            row; the next rows are on their way meanwhile; blocks add up their losses themselves
//   even     the same for rows of 10 elements, a thread each
//   warp     rows of packs, of up to 1024 elements (512 in float64): up to 32 lanes share a row
//   block    rows of up to 32768 elements (half of it for each of these: backward, which holds two
//            numbers an element; float64; rows without packs): a block of as many threads as it
//            takes
//   cluster  where the device has them (compute capability 9.0) up to 8 blocks share a row of up to
//            8 times as many elements
//   columns  lines of up to 256 elements that are not rows, packs of them side by side: a block
//            takes 4 to 32 packs of lines, threadIdx.x across them, so that reads are coalesced,
//            threadIdx.y shares out each line
// and read twice elsewhere:
//   long     rows that are longer, a block each, and other lines, 32 to 256 neighbouring ones a
//            block; the second time from the end, whose elements are still in L2. A loss needs no
//            second time, and its rows of more than 131072 elements come here.
// One pass finds the largest value and the sum together wherever more than a warp has a row.
//
// Sums are added in an order that depends on shape, alignment and kind of device alone. Where a
// thread adds up more than it can hold in registers, it does so in float64, a few numbers at a
// time.
//
// softmax_nll: the gradient is the softmax kernel with another store, so that the forward saves
// nothing but what the mean divides by. Bytes of a row of 10 float32 scores: forward 48 (scores and
// class; blocks add up the losses), backward 88 (those and the gradient). Rows that are not short
// write their losses, which another kernel adds up. Rows of packs have targets of one class there:
// smoothing and probabilities take the ways of rows without packs.
//
// softmax_nll: a target outside of [0, classes) gives NaN, as loss and as gradient of its row. To
// refuse it, as the CPU does, the host would have to wait for the device.
#pragma once

#include "../softmax.h"

#include "fast_math.cuh"
#include "memory.cuh"
#include "reduce.cuh"

namespace mnist_ops::cuda {

using Kind = SoftmaxKind;
template <typename T>
using Forward = SoftmaxForward<T>;
template <typename T>
using Backward = SoftmaxBackward<T>;

// In the place of a kind that a kernel is compiled for: which one it is, is an argument. Kernels
// that hold packs of rows in registers have one kind each; elsewhere a branch that all threads take
// alike is cheaper than four kernels.
constexpr int kAnyKind = 4;

template <int compiled>
__device__ __forceinline__ Kind kind_of(Kind given) {
  return compiled == kAnyKind ? given : static_cast<Kind>(compiled);
}

// exp(x) for elements of type T: half types are rounded more coarsely than the fast instruction is,
// and with 2 bytes an element the exact one would be the bound, not memory.
template <typename T>
__device__ __forceinline__ opmath_t<T> exp_for(opmath_t<T> x) {
  if constexpr (!std::is_same_v<T, opmath_t<T>>) {
    return two_to_the(x * 1.442695041f);
  } else {
    return std::exp(x);
  }
}

// The larger one; the other one if one is NaN, in float32 by one instruction.
__device__ __forceinline__ float larger(float a, float b) {
  return std::fmax(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return b > a ? b : a;
}

// The logarithm of a sum. In float64 the library's own one is called, and registers are spilled
// around the call.
template <typename A>
__device__ __forceinline__ A log_of(A sum) {
  return std::is_same_v<A, double> ? elementary::log(sum) : std::log(sum);
}

// exp(factor (v - largest)) of scaled values, and what becomes of their sum. Fast instructions for
// half types, which are rounded more coarsely than those are, and for the loss and its gradient: it
// is the error of the sum, or relative to 1, that matters there, and with the change of base in the
// factor that is below a rounding's.
template <typename T, int compiled>
struct Powers {
  using A = opmath_t<T>;
  static constexpr bool kHalf = !std::is_same_v<T, A>;
  static constexpr bool kFast =
      kHalf || (sizeof(A) == 4 && (compiled == static_cast<int>(Kind::kNll) ||
                                   compiled == static_cast<int>(Kind::kNllGradient)));
  static constexpr bool kByProducts =
      kFast && compiled != kAnyKind && compiled != static_cast<int>(Kind::kLogSoftmax);
  A factor;

  // A factor of infinity would make NaN of equal values.
  __device__ __forceinline__ explicit Powers(const Differences<A>& difference)
      : factor(kFast ? std::fmin(difference.factor * A(1.442695041), std::numeric_limits<A>::max())
                     : difference.factor) {}

  // Of a difference of scaled values.
  __device__ __forceinline__ A operator()(A difference) const {
    if constexpr (kFast) {
      return two_to_the(factor * difference);
    } else {
      return std::exp(factor * difference);
    }
  }
  __device__ __forceinline__ A quotient(A share, A sum) const {
    if constexpr (kFast) {
      return share * reciprocal(sum);
    } else {
      return share / sum;
    }
  }
  __device__ __forceinline__ A log(A sum) const {
    if constexpr (kHalf) {
      return log2_of(sum) * 0.6931471806f;
    } else {
      return log_of(sum);
    }
  }
};

// The largest of some scaled values v, and the sum of exp(factor (v - largest)).
template <typename A, typename Sum = A>
struct Partial {
  A largest = -std::numeric_limits<A>::infinity();
  Sum sum = Sum(0);

  // Several at once: one rescaling for all of them.
  template <typename T, int count>
  __device__ void add_all(const A (&values)[count], const Differences<A>& difference) {
    A m = largest;
#pragma unroll
    for (int j = 0; j < count; ++j) m = values[j] > m ? values[j] : m;
    if (m > largest) {
      sum *= static_cast<Sum>(exp_for<T>(difference.of_scaled(largest, m)));
      largest = m;
    }
    A part = A(0);
#pragma unroll
    for (int j = 0; j < count; ++j) {
      // The share of -inf is 0, not exp(-inf + inf).
      if (values[j] != -std::numeric_limits<A>::infinity()) {
        part += exp_for<T>(difference.of_scaled(values[j], m));
      }
    }
    sum += static_cast<Sum>(part);
  }

  __device__ void merge(const Partial& other, const Differences<A>& difference) {
    const A m = other.largest > largest ? other.largest : largest;
    // Equal infinities must not become NaN here: a part that holds nothing else counts for 0.
    const auto share = [&](const Partial& p) {
      return p.largest == m
                 ? p.sum
                 : p.sum * static_cast<Sum>(std::exp(difference.of_scaled(p.largest, m)));
    };
    sum = share(*this) + share(other);
    largest = m;
  }

  // Where the largest value is infinite, of either sign, the row is NaN, as it is when the
  // exponentials are added up after the largest value has been found.
  __device__ void finish() { sum += static_cast<Sum>(largest - largest); }
};

// What a block added up; zeros for those that were planned, where fewer were launched.
template <typename T>
__device__ __forceinline__ void write_sum(const Forward<T>& f, const LossSum& sum) {
  f.sums[blockIdx.x] = sum;
  for (int64_t i = blockIdx.x + gridDim.x; i < f.blocks; i += gridDim.x) f.sums[i] = LossSum{0, 0};
}

// Whether a kind keeps the exponentials.
__device__ __forceinline__ bool keeps_powers(Kind kind) {
  return kind == Kind::kSoftmax || kind == Kind::kNllGradient;
}

// What adds up values over the classes of a line: a worker its share of them, combine() those of
// all workers.
template <typename A, typename Combine>
struct ClassSum {
  int64_t size, worker, workers;
  Combine combine;

  template <typename F>
  __device__ __forceinline__ A operator()(const F& value) const {
    A sum = A(0);
    for (int64_t c = worker; c < size; c += workers) sum += value(c);
    return combine(sum);
  }
};
template <typename A, typename Combine>
__device__ __forceinline__ ClassSum<A, Combine> over_classes(int64_t size, int64_t worker,
                                                             int64_t workers, Combine combine) {
  return {size, worker, workers, combine};
}

// What is added up along a line, and the gradient of one element.
template <typename A>
__device__ __forceinline__ A gradient_term(Kind kind, A grad, A y) {
  return kind == Kind::kSoftmax ? grad * y : grad;
}

template <typename T, typename A = opmath_t<T>>
__device__ __forceinline__ A gradient_value(Kind kind, A grad, A y, A sum, A beta) {
  return kind == Kind::kSoftmax ? beta * y * (grad - sum) : beta * (grad - exp_for<T>(y) * sum);
}

// Shared memory for `bytes` bytes of T, which may have constructors, aligned to packs.
template <int64_t bytes>
struct alignas(kVectorBytes) SharedBytes {
  unsigned char storage[bytes];
  template <typename T>
  __device__ T* as() {
    return reinterpret_cast<T*>(storage);
  }
};

template <typename Arguments>
constexpr bool kIsForward = false;
template <typename T>
constexpr bool kIsForward<Forward<T>> = true;

// Whether packs of 16 bytes begin where the tensors do. A loss is written by itself.
template <typename T>
bool has_aligned_packs(Kind kind, const Forward<T>& f) {
  return are_aligned(f.in, kind == Kind::kNll ? f.in : f.out);
}
template <typename T>
bool has_aligned_packs(Kind, const Backward<T>& b) {
  return are_aligned(b.grad, b.out, static_cast<const T*>(b.result));
}
// Whether lines have no targets but those that are one class. Kernels for others hold more.
template <typename T>
bool has_one_class(Kind kind, const Forward<T>& f) {
  return kind == Kind::kSoftmax || kind == Kind::kLogSoftmax || f.targets.one_class();
}
template <typename T>
bool has_one_class(Kind, const Backward<T>&) {
  return true;
}
// Whether rows are taken as such packs.
template <typename Arguments>
bool has_packs(Kind kind, const Arguments& a) {
  return a.g.size % kPackSize<typename Arguments::Element> == 0 && has_aligned_packs(kind, a) &&
         has_one_class(kind, a);
}

// Calls body with the kind as a number that is known at compile time, or with kAnyKind; the loss
// and its gradient have a forward only.
template <typename Arguments, bool any = false, typename F>
void dispatch_kind(Kind kind, const F& body) {
  if constexpr (any) {
    body(Number<kAnyKind>{});
  } else if (kind == Kind::kSoftmax) {
    body(Number<static_cast<int>(Kind::kSoftmax)>{});
  } else if (kind == Kind::kLogSoftmax) {
    body(Number<static_cast<int>(Kind::kLogSoftmax)>{});
  } else if constexpr (kIsForward<Arguments>) {
    if (kind == Kind::kNll) return body(Number<static_cast<int>(Kind::kNll)>{});
    body(Number<static_cast<int>(Kind::kNllGradient)>{});
  }
}

// In softmax_tiles.cu: rows that are no packs, of up to so many elements.
constexpr int kMostShortRow = 256;
template <typename Arguments>
void launch_tiles(const Launcher& launcher, Kind kind, const Arguments& a);
// Its blocks at most, each of which can leave a LossSum.
template <typename T>
int64_t blocks_of_tiles(const Forward<T>& f);

// In softmax_rows.cu: other rows.
template <typename Arguments>
void launch_rows(const Launcher& launcher, Kind kind, const Arguments& a);

// In softmax_lines.cu: lines of any kind, and those that nobody holds, in packs of n elements.
template <typename Arguments>
void launch_lines(const Launcher& launcher, Kind kind, const Arguments& a);
template <int n, typename Arguments>
void launch_long(const Launcher& launcher, Kind kind, const Arguments& a);

}  // namespace mnist_ops::cuda
