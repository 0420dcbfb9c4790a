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

// In turn kAsItIs; where that leaves the range, kMeasure looks for smaller deviations, kLifted is
// the result, or, with kPart, all but the pixels that are far larger than the smallest.
enum Turn { kAsItIs, kMeasure, kLifted, kPart };

// Of the image that a block works on: in shared memory, where it costs no register.
template <typename A>
struct Units {
  A lift = 1, part = 1, by_lift = 1, by_part = 1;  // and 1 / lift, 1 / part
  A lift_of_known = 1;                             // the lift for what is in range without one
  int turn = kAsItIs, image = 0;
  A unused = 0;  // eight elements
};
static_assert(sizeof(Units<float>) == 8 * sizeof(float));

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

// Kinds of sums over channels: of numbers z = x * scale; of squares of their deviations, for
// contrastive from their mean, else from 0; how many they are; for the gradient of grad times the
// deviation, and of grad.
enum SumKind { kTotal, kSquare, kNumber, kProduct, kGrad };

template <bool gradient, typename A>
struct ChannelSums {
  static constexpr int kKinds = gradient ? 5 : 3;
  A of[kKinds] = {};

  // Whether the operator needs this kind.
  static constexpr MNIST_OPS_HD bool has(LocalNorm kind, int k) {
    return kind == LocalNorm::kContrastive ||
           (kind == LocalNorm::kDivisive ? k == kSquare || k == kProduct : k == kTotal);
  }

  // grad and a deviation of which the sums are.
  template <LocalNorm kind>
  __device__ __forceinline__ void add_one(A grad, A z) {
    if (has(kind, kTotal)) of[kTotal] += z;
    if (has(kind, kSquare)) of[kSquare] += z * z;
    if constexpr (gradient) {
      of[kProduct] += grad * z;
      if (has(kind, kGrad)) of[kGrad] += grad;
    }
  }

  // Deviations of both are from the same number.
  __device__ __forceinline__ void add(const ChannelSums& other) {
#pragma unroll
    for (int k = 0; k < kKinds; ++k) of[k] += other.of[k];
  }

  // What was added up were deviations from one of the numbers, which is why the difference of
  // squares keeps its digits. Now they are the numbers, and deviations are from their mean.
  // by_number: 1 / of[kNumber], 0 for none.
  __device__ __forceinline__ void settle(A centre, A by_number) {
    const A offset = of[kTotal] * by_number;
    if (of[kSquare] <= std::numeric_limits<A>::max()) {
      const A left = of[kSquare] - offset * of[kTotal];
      of[kSquare] = left > A(0) ? left : A(0);
    }
    if constexpr (gradient) of[kProduct] -= offset * of[kGrad];
    of[kTotal] += of[kNumber] * centre;
  }

  // From deviations from their own mean to those from another one.
  __device__ __forceinline__ void move_to(A mean, A by_number) {
    const A offset = by_number > A(0) ? of[kTotal] * by_number - mean : A(0);
    of[kSquare] += of[kNumber] * offset * offset;
    if constexpr (gradient) of[kProduct] += offset * of[kGrad];
  }
};

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

// The result of an element, from its pixel's planes, which are in units of 1 / lift (see Range).
// Forward: (x - mean) / d, or for subtractive without d; the gradient: grad / d + offset - x * b,
// with offset = mean * b - t, and d in units of 1.
template <bool gradient, bool kExact, typename A>
struct Result {
  A lift;
  bool divides;

  __device__ __forceinline__ A operator()(A grad, A x, A mean_or_b, A d, A offset) const {
    if constexpr (gradient) {
      return divided<kExact>(grad, d) + (offset - x * lift * mean_or_b) * lift;
    } else {
      const A z = x * lift - mean_or_b;
      return !kExact || divides ? divided<kExact>(z, d) : z;  // a reciprocal of 1 costs less
    }
  }
};

// ------------------------------------------------------------------------------- one image
//
// The operators, for a block that has an image and its planes where it can sum (reduce), blur and
// apply: an ImageBlock in shared memory, a MemoryBlock in global memory. All blocks of a cluster
// decide alike: they have the same planes.

// Writes what stands in the plane d, from a pixel's blurred sum of squares and its deviation s in
// units of 1 / lift: so is d, or for the gradient in units of 1. Whether the result cannot stay.
template <typename T, bool kGradient, typename Block, typename A>
__device__ __forceinline__ bool finish_divisor(const Block& block, A blurred, A s, int64_t p,
                                               A& d) {
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
  if (!kLeavesRange<T> || units.turn >= kLifted) return false;
  if (units.turn == kAsItIs) {
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
__device__ __forceinline__ void next_turn(const Block& block, const A* d) {
  using R = Range<A>;
  Units<A>& units = block.units();
  Units<A> next = units;
  if (next.turn == kAsItIs) {
    next.lift_of_known = lift_for(block, d, R::kLeastLift);
    next.lift = R::kMeasure;
  } else if (next.turn == kMeasure) {
    next.lift = lift_for(block, d, next.lift_of_known);
  } else {
    next.part = R::kPart;
    next.by_part = 1 / R::kPart;
  }
  next.by_lift = 1 / next.lift;
  ++next.turn;
  __syncthreads();  // all have read the old ones
  if (block.thread == 0) units = next;
  __syncthreads();
}

// What is blurred: the sum of the input for the mean; of squares for the deviation; of the gradient
// h for b, its share of each channel; for contrastive also what the divisive gradient sums to.
enum Pass { kMean, kDeviation, kShare, kOffset };

// One image, of which g and x hold the data; there is a g for the gradient of divisive and
// contrastive alone. The units are those of a new image. One loop over the passes: as many kinds of
// sums and blurs in a row would be as much code more, and memory is what all of them wait for.
//
// Where s is that much larger than elsewhere that the gradient would need kPart, it is 0 next to
// the gradient there.
template <bool gradient, typename Block, typename T = typename Block::Element>
__device__ __forceinline__ void normalize_image(const Block& block, const T* g,
                                                typename Block::Data x) {
  using A = opmath_t<T>;
  using R = Range<A>;
  A *mean = block.mean(), *d = block.d(), *in = block.in();
  A *q = block.q(), *grads = block.grads(), *centred = block.centred();
  A *b = q, *offset = grads;  // what comes in their place
  const bool contrastive = block.a.kind == LocalNorm::kContrastive;
  const bool subtractive = block.a.kind == LocalNorm::kSubtractive;
  const bool adjoint = !gradient && block.a.adjoint;
  const int first = contrastive || subtractive ? kMean : kDeviation;
  const int last = gradient ? (contrastive ? kOffset : kShare) : subtractive ? kMean : kDeviation;
  const Units<A>& units = block.units();
  const A channels = static_cast<A>(block.a.C);
  A* const squares_about_mean = gradient ? centred : d;  // until those planes are written
  bool fresh = true;                                     // units in which the sums are not known
#pragma unroll 1
  for (int pass = first; pass <= last; ++pass) {
    if (fresh) {
      block.template reduce<gradient>(g, x, [&](auto p, auto where, const auto& sums) {
        const A total = sums.of[kTotal], squares = sums.of[kSquare];
        if (pass == kMean) {
          in[where] = adjoint ? block.over_coef(total, p) : total;
          if (contrastive) mean[p] = block.over_channels(total), squares_about_mean[p] = squares;
        } else {
          const A known = contrastive ? mean[p] * units.part : A(0);
          const A offset = contrastive ? block.over_channels(total) - known : A(0);
          in[where] = squares + channels * offset * offset;
        }
        if constexpr (gradient) {
          q[p] = sums.of[kProduct], grads[p] = contrastive ? sums.of[kGrad] : A(0);
        }
      });
      fresh = false;
    }
    const bool again = block.blur(adjoint || pass >= kShare, [&](A blurred, auto p, auto where) {
      const A share = block.over_channels(blurred);
      if (pass == kMean) {
        const A local = adjoint ? share : block.over_coef(share, p);
        if (contrastive) {  // from the mean of the pixel's channels to the local mean
          const A offset = mean[p] - local;
          in[where] = squares_about_mean[p] + channels * offset * offset;
          if constexpr (gradient) q[p] += offset * grads[p], centred[p] = channels * offset;
        }
        mean[p] = local;
      } else if (pass == kDeviation) {
        const A root = std::sqrt(share), s = block.over_coef(root, p) * units.by_part;
        if constexpr (gradient) {
          // divisor_gradient(), as s * coef is the root
          const bool above = s > block.a.threshold * units.lift && s > A(0);
          in[where] = above ? q[p] / root / root / s : (s != s ? s : A(0));
        } else if (kLeavesRange<T> && units.turn == kPart && !(blurred >= R::kIsPart)) {
          return false;
        }
        const bool wrong = finish_divisor<T, gradient>(block, blurred, s, p, d[p]);
        return !gradient && units.turn == kLifted ? !(blurred <= R::kNeedsPart) : wrong;
      } else if (gradient && pass == kShare) {
        b[p] = share;
        if (contrastive) {
          const A over_d = divided<Block::kExact>(grads[p], d[p]) * units.by_lift;
          in[where] = block.over_coef(over_d - centred[p] * share, p);
        }
      } else if (gradient) {
        offset[p] = mean[p] * b[p] - share;
      }
      return false;
    });
    if (kLeavesRange<T> && pass == kDeviation && (units.turn == kMeasure || again)) {
      next_turn(block, d);
      pass = units.turn == kPart ? kMean : first - 1;  // and ++pass
      fresh = true;
    }
  }
  block.apply(Result<gradient, Block::kExact, A>{units.lift, !subtractive}, g, x,
              gradient ? b : mean, d, offset);
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
