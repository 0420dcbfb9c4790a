// Local normalization on CUDA: what its two ways, images in shared memory and steps in global
// memory, share. The operators of one image, and units in which squares do not leave the range.
#pragma once

#include "blur.cuh"
#include "reduce.cuh"

namespace mnist_ops::cuda {

// ------------------------------------------------------------------------------------------ range

// Where the type that computes has no digits for what is computed from a deviation s: its square,
// and for the gradient 1 / s^2.
//
// An image with a sum of squares beyond kLeast or kMost is computed again in units of 1 / lift. Of
// all powers of two, lift is the one that brings the smallest deviation above the threshold to
// kTarget: then h, which is largest there, has a place, and y has one at every pixel of an image
// whose numbers lie less than 40 powers of ten apart (float64: 350). Magnitudes further apart than
// squares may be are added up once more, as parts: kPart makes squares of what is far larger than
// the smallest.
template <typename A>
struct Range {
  static constexpr bool kWide = sizeof(A) == 8;
  static constexpr A kLargest = std::numeric_limits<A>::max();
  static constexpr A kLeast = A(kWide ? 0x1p-700 : 0x1p-80), kMost = A(kWide ? 0x1p700 : 0x1p80);
  static constexpr A kTarget = A(kWide ? 0x1p-400 : 0x1p-40);
  // lift is kLeastLift times a power of kStep, up to kMostLift.
  static constexpr A kStep = A(kWide ? 0x1p200 : 0x1p20);
  static constexpr A kLeastLift = A(kWide ? 0x1p-800 : 0x1p-100);
  static constexpr A kMostLift = A(kWide ? 0x1p800 : 0x1p100);
  static constexpr A kMeasure = A(kWide ? 0x1p600 : 0x1p90);  // the lift that shows small numbers
  static constexpr A kPart = A(kWide ? 0x1p-600 : 0x1p-80);
  static constexpr A kNeedsPart = A(kWide ? 0x1p1000 : 0x1p120);  // sums of squares
  static constexpr A kIsPart = kNeedsPart * kPart * kPart;
};

// Of the image that a block works on: in shared memory, where it costs no register.
template <typename A>
struct Units {
  A lift = 1, part = 1, by_lift = 1, by_part = 1;  // and 1 / lift, 1 / part
  A lift_of_known = 1;                             // the lift for what is in range without one
  A unused[3] = {};                                // eight elements
};

// float16 squared is in float32's range.
template <typename T>
constexpr bool kLeavesRange = !std::is_same_v<T, Half>;

// Whether a sum of squares says nothing reliable. A small one may, where its deviation (of a sum of
// kLeast: least) is below the threshold anyway.
template <typename A>
__device__ __forceinline__ bool out_of_range(A squares, A least, A threshold) {
  return !(squares <= Range<A>::kMost) ||
         (squares < Range<A>::kLeast && !(std::abs(least) < threshold));
}

// The deviation of a sum of squares of Range::kLeast, times coef.
template <typename A>
A root_of_least(int64_t C) {
  return std::sqrt(Range<A>::kLeast / static_cast<A>(C));
}

// ----------------------------------------------------------------------------------------- reduce

// The sums over channels that a pass computes. Its terms are functions of the gradient, the input
// and the mean of a pixel, in units of 1 / scale; a pass without gradients reads the input alone.
struct SumOfInput {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A scale, A) const {
    sums[0] += x * scale;
  }
};

struct SumOfSquares {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A, A x, A scale, A mean) const {
    const A z = x * scale - mean;
    sums[0] += z * z;
  }
};

struct SumsOfGradient {
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = true;
  template <typename A>
  __device__ void operator()(A (&sums)[kSums], A grad, A x, A scale, A mean) const {
    const A z = x * scale - mean;
    sums[0] += grad * z;
    sums[1] += z * z;
    sums[2] += grad;
  }
};

// Neighbouring elements that a thread reads at a time and adds to as many sums: no more than 16
// bytes of a plane.
template <typename T>
constexpr int kImagePack = sizeof(T) == 8 ? 2 : 4;

// What stands in a plane that others are divided by: itself if exact, or else its reciprocal,
// finite so that 0 stays 0.
template <bool kExact, typename A>
__device__ __forceinline__ A as_divisor(A d) {
  if constexpr (kExact) return d;
  const A inverse = A(1) / d;
  return d != A(0) && inverse > Range<A>::kLargest ? Range<A>::kLargest : inverse;
}
template <bool kExact, typename A>
__device__ __forceinline__ A divided(A value, A prepared) {
  if constexpr (kExact) return value / prepared;
  return value * prepared;
}

// The values of the last pass, of an element and its pixel's planes, which are in units of 1 / lift
// (see Range).
struct MinusMean {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsBoth = false;
  template <typename A>
  __device__ A operator()(A x, A, A mean, A, A) const {
    return x - mean;
  }
};
template <bool kExact, typename A>
struct CentredByDivisor {
  A lift;
  static constexpr int kPlanes = 2;
  static constexpr bool kReadsBoth = false;
  __device__ A operator()(A x, A, A mean, A d, A) const {
    return divided<kExact>(x * lift - mean, d);
  }
};
// offset = mean * b - t; d is in units of 1
template <bool kExact, typename A>
struct GradientOfDivisor {
  A lift;
  static constexpr int kPlanes = 3;
  static constexpr bool kReadsBoth = true;
  __device__ A operator()(A grad, A x, A b, A d, A offset) const {
    return divided<kExact>(grad, d) + (offset - x * lift * b) * lift;
  }
};
// ------------------------------------------------------------------------------- one image
//
// The operators, for a block that has an image and its planes where it can sum (reduce), blur and
// apply: an ImageBlock in shared memory, a MemoryBlock in global memory. All blocks of a cluster
// decide alike: they have the same planes.

// In turn kAsItIs; where that leaves the range, kMeasure looks for smaller deviations, kLifted is
// the result, or, with kPart, all but the pixels that are far larger than the smallest.
enum Turn { kAsItIs, kMeasure, kLifted, kPart };

// Writes what stands in the plane d, from a pixel's blurred sum of squares and its deviation s in
// units of 1 / lift: so is d, or for the gradient in units of 1. Whether the result cannot stay.
template <typename T, bool kGradient, typename Block, typename A>
__device__ __forceinline__ bool finish_divisor(const Block& block, int turn, A blurred, A s,
                                               int64_t p, A& d) {
  using R = Range<A>;
  const Units<A>& units = block.units();
  const A threshold = block.a.threshold * units.lift;
  if constexpr (kGradient) {
    d = as_divisor<Block::kExact>(s > threshold || s != s ? s * units.by_lift : block.a.value);
  } else {
    constexpr A kTiny = std::numeric_limits<A>::denorm_min();  // what divides is not 0
    const A value = block.a.value * units.lift;
    d = as_divisor<Block::kExact>(divisor(s, threshold, value < kTiny ? kTiny : value));
  }
  if (!kLeavesRange<T> || turn >= kLifted) return false;
  if (turn == kAsItIs) {
    const A least = block.over_coef(block.a.root_of_least, p);
    if (!out_of_range(blurred, least, threshold)) return false;
    if (blurred >= R::kLeast) return true;
  } else if (s > threshold && blurred <= R::kLargest) {
    d = as_divisor<Block::kExact>(s / R::kMeasure);
    return false;
  }
  d = as_divisor<Block::kExact>(R::kLargest);  // unknown, or none: does not count for lift_for()
  return true;
}

// The lift for the divisors of the plane d, which all threads of the block have written, and no
// less than that of another plane.
template <typename Block, typename A>
__device__ __forceinline__ A lift_for(const Block& block, const A* d, A lift) {
  using R = Range<A>;
  for (; lift < R::kMostLift; lift *= R::kStep) {
    bool any = false;
    for (int64_t p = block.thread; p < block.a.HW; p += block.threads) {
      any |= divided<Block::kExact>(R::kTarget, d[p]) > lift;
    }
    if (!__syncthreads_or(any)) break;
  }
  return lift;
}

// After a turn that was not good enough: what is in shared memory for the next one.
template <typename Block, typename A>
__device__ __forceinline__ void next_turn(const Block& block, int turn, const A* d) {
  using R = Range<A>;
  Units<A>& units = block.units();
  Units<A> next = units;
  if (turn == kAsItIs) {
    next.lift_of_known = lift_for(block, d, R::kLeastLift);
    next.lift = R::kMeasure;
  } else if (turn == kMeasure) {
    next.lift = lift_for(block, d, next.lift_of_known);
  } else {
    next.part = R::kPart;
    next.by_part = 1 / R::kPart;
  }
  next.by_lift = 1 / next.lift;
  if (block.thread == 0) units = next;
  __syncthreads();
}

// units.lift and units.part are 1.
template <typename Block, typename T>
__device__ __forceinline__ void forward_image(const Block& block, const T* x, T* out) {
  using A = opmath_t<T>;
  using R = Range<A>;
  A *mean = block.mean(), *d = block.d(), *in = block.in();
  const Units<A>& units = block.units();
#pragma unroll 1
  for (int turn = kAsItIs;; ++turn) {
    if (block.a.kind != LocalNorm::kDivisive && turn != kPart) {
      block.template reduce<SumOfInput>(
          x, x, units.lift, A(1), [&](auto p, auto where, const A(&sums)[1]) {
            in[where] = block.a.adjoint ? block.over_coef(sums[0], p) : sums[0];
          });
      block.blur(block.a.adjoint, [&](A blurred, auto p, auto) {
        const A share = block.over_channels(blurred);
        mean[p] = block.a.adjoint ? share : block.over_coef(share, p);
        return false;
      });
    }
    if (block.a.kind == LocalNorm::kSubtractive) {
      return block.apply(MinusMean{}, out, x, x, mean, mean, mean);
    }
    block.template reduce<SumOfSquares>(
        x, x, units.lift * units.part, units.part,
        [&](auto, auto where, const A(&sums)[1]) { in[where] = sums[0]; });
    const bool again = block.blur(false, [&](A blurred, auto p, auto) {
      const A s = block.over_coef(std::sqrt(block.over_channels(blurred)), p);
      if (kLeavesRange<T> && turn == kPart && !(blurred >= R::kIsPart)) return false;
      const bool wrong = finish_divisor<T, false>(block, turn, blurred, s * units.by_part, p, d[p]);
      return kLeavesRange<T> && (turn == kLifted ? !(blurred <= R::kNeedsPart) : wrong);
    });
    if (!kLeavesRange<T> || turn == kPart || (turn != kMeasure && !again)) break;
    next_turn(block, turn, d);
  }
  block.apply(CentredByDivisor<Block::kExact, A>{units.lift}, out, x, x, mean, d, d);
}

// Divisive and contrastive. Where s is that much larger than elsewhere that it would need kPart,
// the gradient is 0 next to the one there. units.lift is 1.
template <typename Block, typename T>
__device__ __forceinline__ void backward_image(const Block& block, const T* g, const T* x, T* out) {
  using A = opmath_t<T>;
  A *mean = block.mean(), *d = block.d(), *in = block.in();
  A *q = block.q(), *grads = block.grads(), *centred = block.centred();
  A *b = q, *offset = grads;  // what comes in their place
  const bool contrastive = block.a.kind == LocalNorm::kContrastive;
  const A channels = static_cast<A>(block.a.C);
  const Units<A>& units = block.units();
#pragma unroll 1
  for (int turn = kAsItIs;; ++turn) {
    if (contrastive) {
      block.template reduce<SumOfInput>(
          x, x, units.lift, A(1),
          [&](auto p, auto where, const A(&sums)[1]) { in[where] = centred[p] = sums[0]; });
      block.blur(false, [&](A blurred, auto p, auto) {
        const A value = block.over_coef(block.over_channels(blurred), p);
        mean[p] = value;
        centred[p] -= channels * value;
        return false;
      });
    }
    block.template reduce<SumsOfGradient>(g, x, units.lift, A(1),
                                          [&](auto p, auto where, const A(&sums)[3]) {
                                            q[p] = sums[0];
                                            in[where] = sums[1];
                                            if (contrastive)
                                              grads[p] = sums[2];  // or the offset stays 0
                                          });
    const bool again = block.blur(false, [&](A blurred, auto p, auto where) {
      const A root = std::sqrt(block.over_channels(blurred)), s = block.over_coef(root, p);
      // divisor_gradient(), as s * coef is the root
      const bool above = s > block.a.threshold * units.lift && s > A(0);
      in[where] = above ? q[p] / root / root / s : (s != s ? s : A(0));
      return finish_divisor<T, true>(block, turn, blurred, s, p, d[p]);
    });
    if (!kLeavesRange<T> || (turn != kMeasure && !again)) break;
    next_turn(block, turn, d);
  }
  block.blur(true, [&](A blurred, auto p, auto where) {
    const A share = block.over_channels(blurred);
    b[p] = share;
    if (contrastive) {
      const A over_d = divided<Block::kExact>(grads[p], d[p]) * units.by_lift;
      in[where] = block.over_coef(over_d - centred[p] * share, p);
    }
    return false;
  });
  if (contrastive) {
    block.blur(true, [&](A blurred, auto p, auto) {
      offset[p] = mean[p] * b[p] - block.over_channels(blurred);
      return false;
    });
  }
  block.apply(GradientOfDivisor<Block::kExact, A>{units.lift}, out, g, x, b, d, offset);
}

// --------------------------------------------------------------------------------------- two ways

// One call of an operator: the forward; the gradient of divisive or contrastive, from grad and
// input; or the gradient of subtractive, which is `adjoint`: its forward, with the gradient as its
// input, but for the order of steps.
template <typename T>
struct NormCall {
  const Launcher& launcher;
  const Images& images;
  const Tensor& kernel;
  const LocalNormOptions& options;
  bool adjoint;
  const T* grad;  // null where there is none
  const T* input;
  T* out;

  BlurGeometry geometry() const {
    return {images.H, images.W, kernel.size(0), kernel.size(kernel.dim() - 1), kernel.dim() == 1};
  }
};

// In local_norm_image.cu: whether the images went into shared memory.
template <typename T>
bool run_images(const NormCall<T>& call);

// In local_norm_steps.cu: images of any size.
template <typename T>
void run_steps(const NormCall<T>& call);

}  // namespace mnist_ops::cuda
