// The reports' windows, 2 x 2 with stride 2 and p = 2 in float32, without gathering them: the four
// pixels of some windows are loaded into registers. And rows of pairs taken apart and joined.
#pragma once

#include "../lp_pool.h"

#include "common.h"

namespace mnist_ops::cpu {

// Up to 32 bytes of numbers: of 64, the short rows of small maps would leave most unused.
template <typename A>
struct PackOf {
  static constexpr int bytes = kVectorBytes < 32 ? kVectorBytes : 32;
  typedef A type __attribute__((vector_size(bytes)));
};
template <typename A>
using Pack = typename PackOf<A>::type;
template <typename A>
constexpr int64_t kPack = sizeof(Pack<A>) / sizeof(A);

template <typename A>
inline Pack<A> load_pack(const A* from) {
  Pack<A> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}
template <typename A>
inline void store_pack(A* to, Pack<A> pack) {
  std::memcpy(to, &pack, sizeof pack);
}

// Every other number of a row of two packs, from the first or second on. Eight of them stand in the
// order 0 1 4 5 2 3 6 7, which takes AVX2 one instruction; in_order() puts them right, and back.
template <int first, typename P>
MNIST_OPS_HD P every_other(P a, P b) {
  constexpr int n = sizeof(P) / sizeof(a[0]), f = first;
  if constexpr (n == 2) return __builtin_shufflevector(a, b, f, f + 2);
  if constexpr (n == 4) return __builtin_shufflevector(a, b, f, f + 2, f + 4, f + 6);
  if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, f, f + 2, f + 8, f + 10, f + 4, f + 6, f + 12, f + 14);
  }
}

template <typename P>
MNIST_OPS_HD P in_order(P a) {
  if constexpr (sizeof(P) / sizeof(a[0]) != 8)
    return a;
  else
    return __builtin_shufflevector(a, a, 0, 1, 4, 5, 2, 3, 6, 7);
}

// The first or second pack of the row that the packs of every_other() come from.
template <bool second, typename P>
MNIST_OPS_HD P in_turn(P a, P b) {
  constexpr int n = sizeof(P) / sizeof(a[0]), f = second ? (n == 2 ? 1 : 2) : 0;
  if constexpr (n == 2) return __builtin_shufflevector(a, b, f, f + 2);
  if constexpr (n == 4) return __builtin_shufflevector(a, b, f, f + 4, f + 1, f + 5);
  if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, f, f + 8, f + 1, f + 9, f + 4, f + 12, f + 5, f + 13);
  }
}

// Calls body(j) for packs of the numbers from j on, at least one; the last may overlap.
template <typename A, typename F>
inline void by_packs(int64_t count, const F& body) {
  for (int64_t j = 0; j + kPack<A> <= count; j += kPack<A>) body(j);
  if (count % kPack<A> != 0) body(count - kPack<A>);
}

// Neighbours: numbers of one row in turn, or `count` numbers (channels) after `count` others.
template <typename A>
struct Neighbours {
  Pack<A> left, right;
};

template <bool in_turns, typename A>
inline Neighbours<A> load_neighbours(const A* row, int64_t j, int64_t count) {
  if constexpr (!in_turns) return {load_pack(row + j), load_pack(row + count + j)};
  const Pack<A> a = load_pack(row + 2 * j), b = load_pack(row + 2 * j + kPack<A>);
  return {every_other<0>(a, b), every_other<1>(a, b)};
}

template <bool in_turns, typename A>
inline void store_neighbours(A* row, int64_t j, int64_t count, const Neighbours<A>& n) {
  if constexpr (in_turns) {
    store_pack(row + 2 * j, in_turn<false>(n.left, n.right));
    store_pack(row + 2 * j + kPack<A>, in_turn<true>(n.left, n.right));
  } else {
    store_pack(row + j, n.left);
    store_pack(row + count + j, n.right);
  }
}

// even[j] = x[2 j], odd[j] = x[2 j + 1].
template <typename A>
inline void split_pairs(const A* x, A* even, A* odd, int64_t count) {
  if (count < kPack<A>) {
    for (int64_t j = 0; j < count; ++j) even[j] = x[2 * j], odd[j] = x[2 * j + 1];
    return;
  }
  by_packs<A>(count, [&](int64_t j) {
    const Neighbours<A> pairs = load_neighbours<true>(x, j, count);
    store_pack(even + j, in_order(pairs.left));
    store_pack(odd + j, in_order(pairs.right));
  });
}

// The reverse.
template <typename A>
inline void join_pairs(const A* even, const A* odd, A* x, int64_t count) {
  if (count < kPack<A>) {
    for (int64_t j = 0; j < count; ++j) x[2 * j] = even[j], x[2 * j + 1] = odd[j];
    return;
  }
  by_packs<A>(count, [&](int64_t j) {
    store_neighbours<true, A>(x, j, count,
                              {in_order(load_pack(even + j)), in_order(load_pack(odd + j))});
  });
}

// 1 where a number is not between the bounds, 0 where it is.
template <typename P, typename A>
MNIST_OPS_HD P outside(P v, A lower, A upper) {
  return (v >= lower) & (v <= upper) ? P{} : P{} + A(1);
}

template <typename P>
inline bool is_zero(P v) {
  decltype(v[0] + v[0]) sum = 0;
  for (size_t j = 0; j < sizeof(P) / sizeof(v[0]); ++j) sum += v[j];
  return sum == 0;
}

// The norms of `count` windows, at least a pack, of two rows of pixels. Where numbers would have to
// be scaled, this and the next function return false, and nothing that they wrote counts.
template <bool in_turns>
inline bool norms_of_fours(const float* upper, const float* lower, float* y, int64_t count) {
  Pack<float> unsafe{};
  by_packs<float>(count, [&](int64_t j) {
    const auto [a, b] = load_neighbours<in_turns>(upper, j, count);
    const auto [c, d] = load_neighbours<in_turns>(lower, j, count);
    const Pack<float> sum = a * a + b * b + c * c + d * d;
    unsafe += outside(sum, SafeSquares<float>::lower, SafeSquares<float>::upper);
    store_pack(y + j, in_turns ? in_order(sum) : sum);
  });
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] = std::sqrt(y[j]);
  return is_zero(unsafe);
}

// Their gradients. One division a window.
template <bool in_turns>
inline bool gradients_of_fours(const float* upper, const float* lower, const float* y,
                               const float* grad, float* to_upper, float* to_lower, int64_t count) {
  // The quotient of such numbers, times an element of the window, is sure to be a number.
  constexpr float kSmall = 1e-18f, kLarge = 1e18f;
  Pack<float> unsafe{};
  by_packs<float>(count, [&](int64_t j) {
    const Pack<float> norm = load_pack(y + j), g = load_pack(grad + j);
    unsafe += outside(norm, kSmall, kLarge) + outside(g, -kLarge, kLarge);
    const Pack<float> ratio = in_turns ? in_order(g / norm) : g / norm;
    const auto [a, b] = load_neighbours<in_turns>(upper, j, count);
    store_neighbours<in_turns, float>(to_upper, j, count, {a * ratio, b * ratio});
    const auto [c, d] = load_neighbours<in_turns>(lower, j, count);
    store_neighbours<in_turns, float>(to_lower, j, count, {c * ratio, d * ratio});
  });
  return is_zero(unsafe);
}

}  // namespace mnist_ops::cpu
