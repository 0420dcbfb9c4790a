// Softmax of lines that threads hold in registers, whichever threads share a line.
//
// They are a Group: worker() is this one of the workers() that share a line, or lines side by side;
//   largest(values)  from what each of them found, for each line, what all of them have found, or
//                    (kParts) some: then merge(part, difference) makes of their numbers those of
//                    all
//   sum(values)      what they have found, added up
#pragma once

#include "softmax.cuh"

namespace mnist_ops::cuda {

// Neighbouring threads of a warp share a line.
struct Lanes {
  static constexpr bool kParts = false;
  int lanes;

  __device__ __forceinline__ int worker() const {
    return static_cast<int>(threadIdx.x % static_cast<unsigned>(lanes));
  }
  __device__ __forceinline__ int workers() const { return lanes; }

  template <typename A>
  __device__ __forceinline__ void largest(A (&values)[1]) const {
    values[0] = lane_max(values[0], lanes);
  }
  template <typename A>
  __device__ __forceinline__ void sum(A (&values)[1]) const {
    values[0] = lane_sum(values[0], lanes);
  }
};

// The first of a group's lines, and the first element of it. Threads without a line, which are not
// inside, take part in what the others do together.
struct Place {
  int size;
  int64_t line, offset;
  bool inside;
};
__device__ __forceinline__ Place place_of_row(int size, int64_t row, int64_t rows) {
  return row < rows ? Place{size, row, row * size, true} : Place{size, 0, 0, false};
}

// What a worker holds: kLoads packs of n elements, of one line (m = 1), or of n lines side by side
// (m = n) with an element of each. Packs beyond the end are `missing`.
template <int kLoads, int n, int m, typename T>
struct Held {
  using A = opmath_t<T>;
  using Index = std::conditional_t<m == 1, int, int64_t>;
  A values[kLoads][n];
  int packs, worker, workers;
  Index step;  // between two packs

  template <typename Group>
  __device__ __forceinline__ Held(const SoftmaxGeometry& g, const Place& place, const Group& group)
      : packs(place.inside ? place.size / (n / m) : 0),
        worker(group.worker()),
        workers(group.workers()),
        step(m == 1 ? n : static_cast<Index>(g.inner)) {}

  __device__ __forceinline__ void load(const T* from, A scale, A missing) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if (i < packs) {
        const Pack<T, n> pack = load_pack<n>(from + i * step);
#pragma unroll
        for (int j = 0; j < n; ++j) values[k][j] = scale * static_cast<A>(pack.values[j]);
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) values[k][j] = missing;
      }
    }
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if (i < packs) {
        Pack<T, n> pack;
#pragma unroll
        for (int j = 0; j < n; ++j) pack.values[j] = static_cast<T>(values[k][j]);
        store_pack(to + i * step, pack);
      }
    }
  }

  // Calls body(value, its line, its place in it). What is missing may be left out, where a warp
  // misses it together as a rule.
  template <typename F>
  __device__ __forceinline__ void each(const F& body) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if (m == n && i >= packs) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) body(values[k][j], m == 1 ? 0 : j, m == 1 ? i * n + j : i);
    }
  }
};

template <typename Group, typename A>
__device__ __forceinline__ A sum_of(const Group& group, A value) {
  A values[1] = {value};
  group.sum(values);
  return values[0];
}

// What is read of a line beside its elements.
template <typename A>
struct Known {
  int64_t target = 0;
  A beta_g = A(0);
};
template <typename T>
__device__ __forceinline__ Known<opmath_t<T>> known_of(Kind kind, const Forward<T>& f,
                                                       int64_t line) {
  Known<opmath_t<T>> known;
  if (kind == Kind::kNll || kind == Kind::kNllGradient) known.target = f.class_of(line);
  if (kind == Kind::kNllGradient) known.beta_g = f.differences.beta * f.grad[line];
  return known;
}

// known(j) is what is known of line j. Losses are written, or added to `losses` where blocks add
// up theirs.
template <int kLoads, int n, int m, typename T, typename Group, typename KnownOf>
__device__ __forceinline__ void forward_held(Kind kind, const Forward<T>& f, const T* in, T* out,
                                             const Place& place, const Group& group,
                                             const KnownOf& known, LossSum& losses) {
  using A = opmath_t<T>;
  constexpr A kMissing = -std::numeric_limits<A>::infinity();
  const Differences<A>& difference = f.differences;
  Held<kLoads, n, m, T> held(f.g, place, group);
  held.load(in, difference.scale, kMissing);
  A largest[m], base[m], sum[m];
#pragma unroll
  for (int j = 0; j < m; ++j) largest[j] = kMissing, sum[j] = A(0);
  held.each([&](A v, int j, int) { largest[j] = v > largest[j] ? v : largest[j]; });
  group.largest(largest);
#pragma unroll
  for (int j = 0; j < m; ++j) {
    base[j] = largest[j] == kMissing ? A(0) : largest[j];  // exp(-inf) is 0, exp(-inf + inf) is not
  }
  held.each([&](A& v, int j, int) {
    const A power = exp_for<T>(difference.of_scaled(v, base[j]));
    sum[j] += power;
    if (keeps_powers(kind)) v = power;
  });
  A share = A(1);  // of a power, where they have different bases
  if constexpr (Group::kParts) {
    const Partial<A> whole = group.merge({largest[0], sum[0]}, difference);
    if (largest[0] != whole.largest) {
      share = std::exp(difference.of_scaled(largest[0], whole.largest));
    }
    largest[0] = whole.largest;
    sum[0] = whole.sum;
  } else {
    group.sum(sum);
  }
  const bool has_target = kind == Kind::kNll || kind == Kind::kNllGradient;
  if (!place.inside && !has_target) return;  // the others meet where classes are added up
  const auto sum_classes = over_classes<A>(place.inside ? place.size : 0, held.worker, held.workers,
                                           [&](A v) { return sum_of(group, v); });
  A term[m];  // what every element of a line has to do with
#pragma unroll
  for (int j = 0; j < m; ++j) {
    sum[j] += largest[j] - largest[j];  // as Partial::finish() does
    term[j] = keeps_powers(kind) ? share / sum[j] : log_of(sum[j]);
    if (kind != Kind::kNll) continue;
    const LineTarget<T> target(f.targets, f.g, known(j).target, place.offset + j);
    const A loss = target.loss(difference, in + j, largest[j], term[j], sum_classes);
    if (!place.inside || held.worker != 0) continue;
    if (f.sums == nullptr) {
      f.out[place.line + j] = static_cast<T>(loss);
    } else {
      losses.losses += static_cast<double>(loss);
      losses.divisor += static_cast<double>(target.divisor());
    }
  }
  if (kind == Kind::kNll) return;
  if (kind == Kind::kLogSoftmax) {
    held.each([&](A& v, int j, int) { v = difference.of_scaled(v, largest[j]) - term[j]; });
  } else if (kind == Kind::kSoftmax) {
    held.each([&](A& v, int j, int) { v *= term[j]; });
  } else {
    LineGradient<T> gradients[m];
#pragma unroll
    for (int j = 0; j < m; ++j) {
      const Known<A> of_line = known(j);
      gradients[j] = {LineTarget<T>(f.targets, f.g, of_line.target, place.offset + j),
                      of_line.beta_g, sum_classes};
    }
    held.each([&](A& v, int j, int i) {
      if (i < place.size) v = gradients[j](v * term[j], i);
    });
  }
  if (place.inside) held.store(out);
}

template <int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void backward_held(Kind kind, const Backward<T>& b, const T* grad,
                                              const T* out, T* result, const Place& place,
                                              const Group& group) {
  using A = opmath_t<T>;
  Held<kLoads, n, m, T> grads(b.g, place, group), ys(b.g, place, group);
  grads.load(grad, A(1), A(0));
  ys.load(out, A(1), A(0));
  A sum[m] = {};
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sum[j % m] += gradient_term(kind, grads.values[k][j], ys.values[k][j]);
    }
  }
  group.sum(sum);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      A& g = grads.values[k][j];
      g = gradient_value<T>(kind, g, ys.values[k][j], sum[j % m], b.beta);
    }
  }
  if (place.inside) grads.store(result);
}

// Lines in global memory.
template <int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void compute_held(Kind kind, const Forward<T>& f, const Place& place,
                                             const Group& group) {
  LossSum unused;
  const auto known = [&](int j) { return known_of(kind, f, place.line + j); };
  forward_held<kLoads, n, m>(kind, f, f.in + place.offset, f.out + place.offset, place, group,
                             known, unused);
}
template <int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void compute_held(Kind kind, const Backward<T>& b, const Place& place,
                                             const Group& group) {
  backward_held<kLoads, n, m>(kind, b, b.grad + place.offset, b.out + place.offset,
                              b.result + place.offset, place, group);
}

}  // namespace mnist_ops::cuda
