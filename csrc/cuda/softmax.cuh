// Softmax, log-softmax and softmax + NLL on CUDA: what the kernels share.
//
// Bound by memory; every operator is one launch. Each element is read once and written once
// (softmax_nll: read once) where threads can hold a line in registers (softmax_held.cuh), in packs
// of 16 bytes where rows, lines whose elements are neighbours, are aligned to that:
//   tile     rows of up to 256 elements that are no packs: a block copies as many as its threads
//            hold to shared memory, as one piece, and up to 32 lanes share a row (of the reports'
//            10 classes a thread has one alone); the next rows are on their way meanwhile; blocks
//            add up their losses themselves
//   warp     rows of packs, of up to 1024 elements (512 in float64): up to 32 lanes share a row
//   block    rows of up to 32768 elements (half of it for each of these: backward, which holds two
//            numbers an element; float64; rows without packs): a block of as many threads as it
//            takes
//   cluster  from compute capability 9.0 on up to 8 blocks share a row of up to 8 times as many
//   columns  lines of up to 256 elements that are not rows, packs of them side by side: a block
//            takes 4 to 32 packs of lines, threadIdx.x across them, so that reads are coalesced,
//            threadIdx.y shares out each line
// and read twice elsewhere:
//   long     longer rows, a block each, and other lines, 32 to 256 neighbouring ones a block; the
//            second time from the end, whose elements are still in L2. A loss needs no second time,
//            and its rows of more than 131072 elements come here.
// One pass finds the largest value and the sum together wherever more than a warp has a row.
//
// Sums are added in an order that depends on shape, alignment and kind of device alone; more
// numbers than a thread can hold in registers in float64, a few at a time.
//
// softmax_nll: the gradient is the softmax kernel with another store, so that the forward saves
// nothing but what the mean divides by. Bytes of a row of 10 float32 scores: forward 48 (scores and
// class), backward 88 (those and the gradient). Rows that are not short write their losses, which
// another kernel adds up. Targets that are not one class take the ways of rows without packs. A
// class outside of [0, classes) gives NaN, as loss and as gradient of its row: to refuse it, as the
// CPU does, the host would have to wait for the device.
#pragma once

#include "../softmax.h"

#include "fast_math.cuh"
#include "memory.cuh"
#include "reduce.cuh"

namespace mnist_ops::cuda {

using Kind = SoftmaxKind;
template <Kind kind>
using KindTag = std::integral_constant<Kind, kind>;
template <typename T>
using Forward = SoftmaxForward<T>;
template <typename T>
using Backward = SoftmaxBackward<T>;

// The kind of a kernel's launch. Kernels that hold packs of rows in registers are compiled for one
// kind each; elsewhere, where they are for kAny, a branch that all threads take alike is cheaper
// than four kernels.
template <Kind compiled>
__device__ __forceinline__ Kind kind_of(Kind given) {
  return compiled == Kind::kAny ? given : compiled;
}

// exp(x) for elements of type T: half types are rounded more coarsely than the fast instruction is,
// and with 2 bytes an element the exact one would be the bound, not memory.
template <typename T>
__device__ __forceinline__ opmath_t<T> exp_for(opmath_t<T> x) {
  if constexpr (!std::is_same_v<T, opmath_t<T>>) return two_to_the(x * 1.442695041f);
  return std::exp(x);
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
template <typename T, Kind compiled>
struct Powers {
  using A = opmath_t<T>;
  static constexpr bool kHalf = !std::is_same_v<T, A>;
  static constexpr bool kFast = kHalf || (sizeof(A) == 4 && has_target(compiled));
  static constexpr bool kByProducts =
      kFast && compiled != Kind::kAny && compiled != Kind::kLogSoftmax;
  A factor;

  // A factor of infinity would make NaN of equal values.
  __device__ __forceinline__ explicit Powers(const Differences<A>& difference)
      : factor(kFast ? std::fmin(difference.factor * A(1.442695041), std::numeric_limits<A>::max())
                     : difference.factor) {}

  // Of a difference of scaled values.
  __device__ __forceinline__ A operator()(A difference) const {
    if constexpr (kFast) return two_to_the(factor * difference);
    return std::exp(factor * difference);
  }
  __device__ __forceinline__ A quotient(A share, A sum) const {
    if constexpr (kFast) return share * reciprocal(sum);
    return share / sum;
  }
  __device__ __forceinline__ A log(A sum) const {
    if constexpr (kHalf) return log2_of(sum) * 0.6931471806f;
    return log_of(sum);
  }
};

// What a block added up; zeros for those that were planned, where fewer were launched.
template <typename T>
__device__ __forceinline__ void write_sum(const Forward<T>& f, const LossSum& sum) {
  f.sums[blockIdx.x] = sum;
  for (int64_t i = blockIdx.x + gridDim.x; i < f.blocks; i += gridDim.x) f.sums[i] = LossSum{0, 0};
}

// What adds up values over the classes of a line: a worker its share of them, combine() those of
// all workers.
template <typename A, typename Combine>
__device__ __forceinline__ auto over_classes(int64_t size, int64_t worker, int64_t workers,
                                             Combine combine) {
  return [=](const auto& value) __attribute__((always_inline)) -> A {
    A sum = A(0);
    for (int64_t c = worker; c < size; c += workers) sum += value(c);
    return combine(sum);
  };
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

// Whether packs of 16 bytes begin where the tensors do. A loss is written by itself.
template <typename Arguments>
bool has_aligned_packs(Kind kind, const Arguments& a) {
  if constexpr (Arguments::kIsForward) {
    return are_aligned(a.in, kind == Kind::kNll ? a.in : a.out);
  } else {
    return are_aligned(a.grad, a.y, a.out);
  }
}
// Whether lines have no targets but those that are one class. Kernels for others hold more.
template <typename Arguments>
bool has_one_class(Kind kind, const Arguments& a) {
  if constexpr (Arguments::kIsForward) return !has_target(kind) || a.targets.one_class();
  return true;
}
// Whether rows are taken as such packs.
template <typename Arguments>
bool has_packs(Kind kind, const Arguments& a) {
  return a.g.size % kPackSize<typename Arguments::Element> == 0 && has_aligned_packs(kind, a) &&
         has_one_class(kind, a);
}

// Calls body with the kind, or where `any` with kAny, as a type; the loss and its gradient have a
// forward only.
template <typename Arguments, bool any = false, typename F>
void dispatch_kind(Kind kind, const F& body) {
  if constexpr (any) {
    body(KindTag<Kind::kAny>{});
  } else if (kind == Kind::kSoftmax) {
    body(KindTag<Kind::kSoftmax>{});
  } else if (kind == Kind::kLogSoftmax) {
    body(KindTag<Kind::kLogSoftmax>{});
  } else if constexpr (Arguments::kIsForward) {
    if (kind == Kind::kNll) return body(KindTag<Kind::kNll>{});
    body(KindTag<Kind::kNllGradient>{});
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
