// Norms of windows and their gradients on the CPU: loops over a batch of windows that were
// gathered.
#pragma once

#include "../lp_pool.h"

#include "common.h"

namespace mnist_ops::cpu {

// The windows [first, last) of a row whose tap at column offset kw lies inside the image.
struct Range {
  int64_t first, last;
};

inline Range windows_with_tap(const PoolGeometry& g, int64_t kw) {
  const int64_t lead = g.padding_w - kw;  // ow * stride >= lead
  const int64_t first = lead > 0 ? (lead + g.stride_w - 1) / g.stride_w : 0;
  const int64_t limit = g.W - 1 + lead;  // ow * stride <= limit
  return {first, limit < 0 ? 0 : std::min(g.OW, limit / g.stride_w + 1)};
}

// ------------------------------------------------------------------------------ powers and roots

// Norms that have loops of their own.
enum class Power { kOne, kTwo, kThree, kFour, kInf, kGeneral };

template <Power power>
constexpr bool kSumsPlainly = power != Power::kInf && power != Power::kGeneral;

// |x|^p, of a norm that sums plainly.
template <Power power, typename A>
MNIST_OPS_HD A term(A x) {
  if constexpr (power == Power::kOne) return magnitude(x);
  if constexpr (power == Power::kTwo) return x * x;
  if constexpr (power == Power::kThree) return magnitude(x) * (x * x);
  if constexpr (power == Power::kFour) return (x * x) * (x * x);
  return A(0);
}

// (|x| / largest)^p.
template <Power power, typename A>
MNIST_OPS_HD A scaled_term(A x, A largest, A p) {
  if constexpr (power == Power::kGeneral) return cpu::power(Quotient<A>(magnitude(x), largest), p);
  return term<power>(x / largest);
}

template <Power power, typename A>
MNIST_OPS_HD A root(A sum, A p) {
  if constexpr (power == Power::kTwo) return std::sqrt(sum);
  if constexpr (power == Power::kThree) {
    // 1 / 3 is rounded, which a step of Newton's mends.
    const A y = cpu::power(sum, A(1) / A(3));
    return y - (y * y * y - sum) / (A(3) * y * y);
  }
  if constexpr (power == Power::kFour) return std::sqrt(std::sqrt(sum));
  if constexpr (power == Power::kGeneral) return cpu::power(sum, A(1) / p);
  return sum;
}

// dy/dx; for p = inf without the division by the ties.
template <Power power, typename A>
MNIST_OPS_HD A slope(A x, A y, A p) {
  if constexpr (power == Power::kOne) return sign_of(x);
  if constexpr (power == Power::kInf) {
    const A s = magnitude(x) == y ? sign_of(x) : A(0);
    return y != y ? y : s;
  }
  if constexpr (power == Power::kGeneral) {
    const Quotient<A> ratio(magnitude(x), y);
    A s = cpu::power(ratio, p - A(1));
    // Where y overflowed.
    s = ratio.value == A(0) && p < A(1) ? std::numeric_limits<A>::infinity() : s;
    s = ratio.value != ratio.value ? ratio.value : x < A(0) ? -s : s;
    return x == A(0) || y == A(0) ? A(0) : s;
  } else {
    const A ratio = x / y;
    A s = ratio;
    if constexpr (power == Power::kThree) s = ratio * magnitude(ratio);
    if constexpr (power == Power::kFour) s = ratio * (ratio * ratio);
    return y == A(0) ? A(0) : s;
  }
}

// ----------------------------------------------------------------------------- loops over a batch
//
// taps[k][j] is the k-th element of window j, taps `pitch` apart; count and pitch are multiples of
// kStep. A kernel size known to the compiler, kTaps, keeps a window in registers; it is 0
// elsewhere.

constexpr int64_t kStep = 16;

template <typename A>
struct Batch {
  A* taps;
  int64_t pitch, count, runtime_taps;

  // out[j] = combine over the window of add(so far, x, j), beginning with start.
  template <int kTaps, typename F>
  void fold(A* out, A start, const F& add) const {
    const int64_t stride = pitch;
    if constexpr (kTaps > 0) {
      const A* const x = taps;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        A result = start;
#pragma GCC unroll 16
        for (int k = 0; k < kTaps; ++k) result = add(result, x[k * stride + j], j);
        out[j] = result;
      }
    } else {
      std::fill(out, out + count, start);
      for (int64_t k = 0; k < runtime_taps; ++k) {
        const A* const x = taps + k * stride;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) out[j] = add(out[j], x[j], j);
      }
    }
  }

  // out[j] = the sum over the window of term(x, j), as BlockSum adds it.
  template <int kTaps, typename F>
  void sum(A* out, const F& term) const {
    if (kTaps > 0 || runtime_taps <= kBlockTerms) {
      return fold<kTaps>(out, A(0), [&](A sum, A x, int64_t j) { return sum + term(x, j); });
    }
    std::vector<double> totals(count);
    for (int64_t first = 0; first < runtime_taps; first += kBlockTerms) {
      const Batch block{taps + first * pitch, pitch, count,
                        std::min(kBlockTerms, runtime_taps - first)};
      block.template sum<0>(out, term);
      for (int64_t j = 0; j < count; ++j) totals[j] += static_cast<double>(out[j]);
    }
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<A>(totals[j]);
  }

  // Every element in place.
  template <int kTaps, typename F>
  void map(const F& value) const {
    const int64_t n = kTaps > 0 ? kTaps : runtime_taps;
    for (int64_t k = 0; k < n; ++k) {
      A* const x = taps + k * pitch;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) x[j] = value(x[j], j);
    }
  }
};

// Beyond this the rounding of y, in half types, would count too much in r^(p-1).
constexpr int kSharpBatchPower = 32;

// The largest magnitude of each window; NaN if there is one in it.
template <int kTaps, typename A>
void batch_largest(const Batch<A>& batch, A* largest) {
  batch.template fold<kTaps>(largest, A(0), [](A m, A x, int64_t) {
    const A size = magnitude(x);
    return size > m || size != size ? size : m;
  });
}

// The p-norms of a batch of windows. scratch has room for a number each.
template <Power power, int kTaps, typename A>
void batch_norms(const Batch<A>& batch, int64_t exact_count, A p, A* y, A* scratch) {
  const int64_t n = batch.count;
  if constexpr (kSumsPlainly<power>) {
    batch.template sum<kTaps>(y, [](A x, int64_t) { return term<power>(x); });
    if constexpr (power == Power::kOne) return;
    A unsafe = A(0);
#pragma omp simd reduction(+ : unsafe)
    for (int64_t j = 0; j < exact_count; ++j) unsafe += unsafety_of_square_sum(y[j]);
    if (unsafe == A(0)) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) y[j] = root<power>(y[j], p);
      return;
    }
  }
  // By way of the largest element, which stands as it is where it is 0, infinite or NaN.
  A* const largest = scratch;
  batch_largest<kTaps>(batch, largest);
  if constexpr (power == Power::kInf) {
    std::copy(largest, largest + n, y);
  } else {
    batch.template sum<kTaps>(y,
                              [=](A x, int64_t j) { return scaled_term<power>(x, largest[j], p); });
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A m = largest[j];
      const A norm = m * root<power>(y[j], p);
      y[j] = m > A(0) && m <= std::numeric_limits<A>::max() ? norm : m;
    }
  }
}

// The gradients of a batch of windows, in place of their elements; grad and y are overwritten.
template <Power power, int kTaps, typename A>
void batch_gradients(const Batch<A>& batch, A p, A* grad, A* y, A* scratch) {
  if constexpr (power == Power::kGeneral) {
    if (p > kSharpBatchPower) {  // sharp_gradient of lp_pool.h
      A* const largest = scratch;
      batch_largest<kTaps>(batch, largest);
      batch.template sum<kTaps>(
          y, [=](A x, int64_t j) { return scaled_term<power>(x, largest[j], p); });
      const int64_t n = batch.count;
      for (int64_t j = 0; j < n; ++j) {
        const A m = largest[j];
        const bool is_number = m > A(0) && m <= std::numeric_limits<A>::max();
        grad[j] *= is_number ? cpu::power(y[j], A(1) / p - A(1)) : A(1);
        y[j] = m;
      }
    }
  }
  if constexpr (power == Power::kInf) {
    A* const ties = scratch;
    batch.template fold<kTaps>(ties, A(0), [=](A sum, A x, int64_t j) {
      return sum + (magnitude(x) == y[j] ? A(1) : A(0));
    });
    const int64_t n = batch.count;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) grad[j] = ties[j] > A(0) ? grad[j] / ties[j] : grad[j];
  }
  batch.template map<kTaps>([=](A x, int64_t j) { return grad[j] * slope<power>(x, y[j], p); });
}

// The loops for one norm and window size. The dtypes that are computed in A share them.
template <typename A>
struct BatchLoops {
  void (*norms)(const Batch<A>& batch, int64_t exact_count, A p, A* y, A* scratch);
  void (*gradients)(const Batch<A>& batch, A p, A* grad, A* y, A* scratch);
};

template <Power power, typename A>
BatchLoops<A> loops_of_size(int64_t taps) {
  if constexpr (power == Power::kOne || power == Power::kTwo || power == Power::kInf) {
    if (taps == 4) return {batch_norms<power, 4, A>, batch_gradients<power, 4, A>};
    if (taps == 9) return {batch_norms<power, 9, A>, batch_gradients<power, 9, A>};
  }
  return {batch_norms<power, 0, A>, batch_gradients<power, 0, A>};
}

template <typename A>
BatchLoops<A> loops_of(double p, int64_t taps) {
  switch (norm_of(p)) {
    case Norm::kOne:
      return loops_of_size<Power::kOne, A>(taps);
    case Norm::kTwo:
      return loops_of_size<Power::kTwo, A>(taps);
    case Norm::kInf:
      return loops_of_size<Power::kInf, A>(taps);
    case Norm::kGeneral:
      break;
  }
  return p == 3   ? loops_of_size<Power::kThree, A>(taps)
         : p == 4 ? loops_of_size<Power::kFour, A>(taps)
                  : loops_of_size<Power::kGeneral, A>(taps);
}

}  // namespace mnist_ops::cpu
