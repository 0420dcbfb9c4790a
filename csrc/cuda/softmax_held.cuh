// Softmax of lines that threads hold in registers, whichever threads share a line.
//
// They are a Group: worker() is this one of the workers() that share a line, or lines side by side;
//   kWhole           whether they have no pack beyond the end of a line
//   kOneClass        whether they take no targets but those that are one class
//   largest(values)  from what each of them found, for each line, what all of them have found, or
//                    (kParts) some: then merge(part, difference) makes of their numbers those of
//                    all
//   sum(values)      what they have found, added up
#pragma once

#include "softmax.cuh"

namespace mnist_ops::cuda {

// How many blocks should fit on a multiprocessor at least, of kThreads threads: registers are more
// than a thread needs otherwise, and it is the number of warps that hides the time of a row's
// steps. (7.5 holds 4 of them at most.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostResident = 4;
#else
constexpr int kMostResident = 5;
#endif

// Neighbouring threads of a warp, a power of two of them, share a line.
template <bool one_class, bool whole = false>
struct Lanes {
  static constexpr bool kParts = false, kWhole = whole, kOneClass = one_class;
  int lanes;

  __device__ __forceinline__ int worker() const {
    return static_cast<int>(threadIdx.x) & (lanes - 1);
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

// The largest of some scaled values v, and the sum of exp(factor (v - largest)).
template <typename A>
struct Part {
  A largest, sum;
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
// (m = n) with an element of each. Packs beyond the end are missing.
template <int kLoads, int n, int m, bool whole, typename T>
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

  __device__ __forceinline__ bool has(int pack) const { return whole || pack < packs; }

  // Packs are all on their way before the first one is waited for.
  struct Raw {
    RawPack<T, n> packs[kLoads];
  };
  __device__ __forceinline__ Raw read(const T* from, T missing) const {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if constexpr (!whole) raw.packs[k].fill(missing);
      if (has(i)) raw.packs[k].load(from + i * step);
    }
    return raw;
  }
  __device__ __forceinline__ void take(const Raw& raw) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int j = 0; j < n; ++j) values[k][j] = raw.packs[k][j];
    }
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if (has(i)) {
        Pack<T, n> pack;
#pragma unroll
        for (int j = 0; j < n; ++j) pack.values[j] = static_cast<T>(values[k][j]);
        store_pack(to + i * step, pack);
      }
    }
  }

  // Calls body(value, its line, its place in it, what others hold there). What is missing is left
  // out where a warp misses it together as a rule and a branch is less than the work.
  template <typename F, typename... Others>
  __device__ __forceinline__ void each(const F& body, const Others&... others) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = worker + k * workers;
      if (sizeof...(others) == 0 && m == n && !has(i)) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        body(values[k][j], m == 1 ? 0 : j, m == 1 ? i * n + j : i, others.values[k][j]...);
      }
    }
  }
};

// What is read of a line beside its elements, before them.
template <typename A>
struct Known {
  int64_t target = 0;
  A beta_g = A(0);
};
template <typename T, typename A = opmath_t<T>>
__device__ __forceinline__ A beta_g_of(Kind kind, const Forward<T>& f, int64_t line) {
  return kind == Kind::kNllGradient ? f.differences.beta * f.grad[line] : A(0);
}
// shared, if it is not null: beta_g where lines share one gradient.
template <typename T, typename A = opmath_t<T>>
__device__ __forceinline__ Known<A> known_of(Kind kind, const Forward<T>& f, int64_t line,
                                             const A* shared = nullptr) {
  Known<A> known;
  if (has_target(kind)) known.target = f.class_of(line);  // first: it takes longest
  known.beta_g = shared && f.grad.step == 0 ? *shared : beta_g_of(kind, f, line);
  return known;
}

// A target that is one class.
template <typename A>
struct Chosen {
  int at = -1;          // -1: no class
  bool counts = false;  // or the loss of the line is its weight: 0, or NaN where there is no class
  A weight = A(0), x = A(0);
};
template <int m, typename T>
__device__ __forceinline__ Chosen<opmath_t<T>> chosen_of(Kind kind, const Forward<T>& f,
                                                         int64_t target, const T* in) {
  using A = opmath_t<T>;
  Chosen<A> chosen;
  const bool is_class = static_cast<uint64_t>(target) < static_cast<uint64_t>(f.g.size);
  const bool is_ignored = target == f.targets.ignored;
  if (is_class) {  // a branch: these loads wait for the target, and others must not wait for them
    chosen.at = static_cast<int>(target);
    chosen.weight = f.targets.weight_of(chosen.at);
    if (kind == Kind::kNll) chosen.x = static_cast<A>(in[m == 1 ? target : target * f.g.inner]);
  }
  chosen.counts = is_class && !is_ignored;
  if (!chosen.counts) chosen.weight = is_ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
  return chosen;
}

// known(j) is what is known of line j; sink(j, loss, divisor) is where its loss goes.
template <Kind compiled, int kLoads, int n, int m, typename T, typename Group, typename KnownOf,
          typename Sink>
__device__ __forceinline__ void forward_held(Kind given, const Forward<T>& f, const T* in, T* out,
                                             const Place& place, const Group& group,
                                             const KnownOf& known, const Sink& sink) {
  using A = opmath_t<T>;
  constexpr A kMissing = -std::numeric_limits<A>::infinity();
  const Kind kind = kind_of<compiled>(given);
  const bool one_class = has_target(kind) && (Group::kOneClass || f.targets.one_class());
  const Differences<A>& difference = f.differences;
  const Powers<T, compiled> powers(difference);
  Held<kLoads, n, m, Group::kWhole, T> held(f.g, place, group);
  A scale = difference.scale;
  const auto raw = held.read(in, static_cast<T>(scale < A(0) ? -kMissing : kMissing));
  Known<A> known_of_line[m];
  Chosen<A> chosen[m];
  const auto read_targets = [&] {
#pragma unroll
    for (int j = 0; j < m; ++j) {
      if (has_target(kind)) known_of_line[j] = known(j);
      if (one_class) chosen[j] = chosen_of<m>(kind, f, known_of_line[j].target, in + j);
    }
  };
  if (m == 1) read_targets();  // meanwhile; several are too many registers
  held.take(raw);
  if (scale == A(0)) {
    held.each([&](A& v, int, int i) { v = i < place.size ? scale * v : kMissing; });
    scale = A(1);
  }
  A largest[m], base[m], sum[m];
#pragma unroll
  for (int j = 0; j < m; ++j) largest[j] = kMissing, sum[j] = A(0);
  if (scale > A(0)) {
    held.each([&](A v, int j, int) { largest[j] = larger(largest[j], v); });
  } else {
    held.each([&](A v, int j, int) { largest[j] = larger(largest[j], -v); });
  }
#pragma unroll
  for (int j = 0; j < m; ++j) largest[j] *= std::fabs(scale);
  group.largest(largest);
#pragma unroll
  for (int j = 0; j < m; ++j) {
    // Where there are more parts, one of -inf alone is none. Else it makes NaN, as inf does.
    base[j] = Group::kParts && largest[j] == kMissing ? A(0) : largest[j];
  }
  A share = A(1);  // of a power, where they have different bases
  if constexpr (m == 1 && Powers<T, compiled>::kByProducts) {
    // 2^(c v - offset): by a fused operation, so the product is not rounded, and what the offset's
    // rounding was is a factor of the sum, near 1. Where it would not be, the difference comes
    // first.
    constexpr A kMostOffset = A(1 << 20);
    A c = scale * powers.factor, offset = largest[0] * powers.factor;
    if (!(std::fabs(offset) <= kMostOffset)) {
      held.each([&](A& v, int, int) { v = elementary::fmadd(scale, v, -base[0]); });
      c = powers.factor;
      offset = A(0);
    } else {
      share = two_to_the(std::fma(-largest[0], powers.factor, offset));
    }
    held.each([&](A& v, int, int) {
      const A power = two_to_the(std::fma(v, c, -offset));
      sum[0] += power;
      if (keeps_powers(kind)) v = power;
    });
    sum[0] *= share;
  } else {
    held.each([&](A& v, int j, int) {
      const A power = powers(elementary::fmadd(scale, v, -base[j]));
      sum[j] += power;
      if (keeps_powers(kind)) v = power;
    });
  }
  if constexpr (Group::kParts) {
    const Part<A> whole = group.merge({largest[0], sum[0]}, difference);
    if (largest[0] != whole.largest) {
      share *= std::exp(difference.of_scaled(largest[0], whole.largest));
    }
    largest[0] = whole.largest;
    sum[0] = whole.sum;
  } else {
    group.sum(sum);
  }
  if (m > 1) read_targets();
  // Where targets are not one class, all threads of the group add up the classes.
  if (!place.inside && (!has_target(kind) || one_class)) return;
  const auto sum_classes =
      over_classes<A>(place.inside ? place.size : 0, held.worker, held.workers, [&](A v) {
        A values[1] = {v};
        group.sum(values);
        return values[0];
      });
  const auto target_of = [&](int j) {
    return LineTarget<T>(f.targets, f.g, known_of_line[j].target, place.offset + j);
  };
  A term[m];  // what every element of a line has to do with
#pragma unroll
  for (int j = 0; j < m; ++j) {
    if (Group::kParts) sum[j] += largest[j] - largest[j];  // NaN where the largest is infinite
    term[j] = keeps_powers(kind) ? powers.quotient(share, sum[j]) : powers.log(sum[j]);
    if (kind != Kind::kNll) continue;
    A loss, divisor;
    if (one_class) {
      const Chosen<A>& c = chosen[j];
      loss = c.counts ? c.weight * (term[j] - difference(c.x, largest[j])) : c.weight;
      divisor = c.weight;
    } else {
      const LineTarget<T> target = target_of(j);
      loss = target.loss(difference, in + j, largest[j], term[j], sum_classes);
      divisor = target.divisor();
    }
    if (place.inside && held.worker == 0) sink(j, loss, divisor);
  }
  if (kind == Kind::kNll) return;
  if (kind == Kind::kLogSoftmax) {
    held.each([&](A& v, int j, int) {
      v = difference.factor * elementary::fmadd(scale, v, -largest[j]) - term[j];
    });
  } else if (kind == Kind::kSoftmax) {
    held.each([&](A& v, int j, int) { v *= term[j]; });
  } else if (one_class) {
    A scale[m];
#pragma unroll
    for (int j = 0; j < m; ++j) {
      scale[j] = (chosen[j].counts ? known_of_line[j].beta_g : A(1)) * chosen[j].weight;
      term[j] *= scale[j];
    }
    held.each([&](A& v, int j, int i) {
      v *= term[j];
      if (i == chosen[j].at) v -= scale[j];
    });
  } else {
    LineGradient<T> gradients[m];
#pragma unroll
    for (int j = 0; j < m; ++j) {
      gradients[j] = {target_of(j), known_of_line[j].beta_g, sum_classes};
    }
    held.each([&](A& v, int j, int i) {
      if (i < place.size) v = gradients[j](v * term[j], i);
    });
  }
  if (place.inside) held.store(out);
}

template <int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void backward_held(Kind kind, const Backward<T>& b, const T* grad,
                                              const T* y, T* out, const Place& place,
                                              const Group& group) {
  using A = opmath_t<T>;
  Held<kLoads, n, m, Group::kWhole, T> grads(b.g, place, group), ys(b.g, place, group);
  const auto raw_grads = grads.read(grad, T(0)), raw_ys = ys.read(y, T(0));
  grads.take(raw_grads);
  ys.take(raw_ys);
  A sum[m] = {};
  grads.each([&](A g, int j, int, A y) { sum[j] += gradient_term(kind, g, y); }, ys);
  group.sum(sum);
  grads.each([&](A& g, int j, int, A y) { g = gradient_value<T>(kind, g, y, sum[j], b.beta); }, ys);
  if (place.inside) grads.store(out);
}

// Lines in global memory.
template <Kind compiled, int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void compute_held(Kind given, const Forward<T>& f, const Place& place,
                                             const Group& group) {
  using A = opmath_t<T>;
  const Kind kind = kind_of<compiled>(given);
  const auto known = [&](int j) { return known_of(kind, f, place.line + j); };
  const auto sink = [&](int j, A loss, A) { f.out[place.line + j] = static_cast<T>(loss); };
  forward_held<compiled, kLoads, n, m>(given, f, f.in + place.offset, f.out + place.offset, place,
                                       group, known, sink);
}
template <Kind compiled, int kLoads, int n, int m, typename T, typename Group>
__device__ __forceinline__ void compute_held(Kind given, const Backward<T>& b, const Place& place,
                                             const Group& group) {
  backward_held<kLoads, n, m>(kind_of<compiled>(given), b, b.grad + place.offset,
                              b.y + place.offset, b.out + place.offset, place, group);
}

}  // namespace mnist_ops::cuda
