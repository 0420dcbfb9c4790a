// Sums and largest numbers of rows, loops that fill them.
#pragma once

#include "common.h"

namespace mnist_ops::cpu {

constexpr int64_t kShortSum = 32;  // rows up to here are added up side by side
constexpr int64_t kSpread = 8;     // elements written at once

template <typename A>
A larger(A v, A m) {
  return v > m ? v : m;
}

// A cache line of numbers, in as many registers as it takes: whatever the width of a register, a
// row's sum has the same bits.
template <typename A>
constexpr int64_t kLanes = 64 / sizeof(A);
template <typename A>
struct Lanes {
  Vector<A> parts[64 / kVectorBytes];

  explicit Lanes(A number) {
    for (auto& part : parts) part = number - Vector<A>{};
  }
};

// lanes[j] = combine(value(first + j), lanes[j]), for vectors of them.
template <typename A, typename F, typename G>
void combine_lanes(Lanes<A>& lanes, int64_t first, const F& value, const G& combine) {
  A values[kLanes<A>];
#pragma omp simd
  for (int64_t j = 0; j < kLanes<A>; ++j) values[j] = value(first + j);
  Lanes<A> v(A(0));
  std::memcpy(v.parts, values, sizeof values);
  for (int p = 0; p < 64 / kVectorBytes; ++p) {
    lanes.parts[p] = combine(v.parts[p], lanes.parts[p]);
  }
}

// One number of all lanes: halves are combined with each other.
template <typename A, typename F>
A folded(const Lanes<A>& lanes, const F& combine) {
  A values[kLanes<A>];
  std::memcpy(values, lanes.parts, sizeof values);
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) values[j] = combine(values[j + half], values[j]);
  }
  return values[0];
}

// The largest of scale * x, NaN passed over.
template <typename A>
A largest_of(const A* x, int64_t size, A scale) {
  Lanes<A> most(-std::numeric_limits<A>::infinity());
  int64_t i = 0;
  const auto add = [&](int64_t first) {
    combine_lanes(
        most, first, [=](int64_t k) { return scale * x[k]; },
        [](Vector<A> v, Vector<A> m) { return v > m ? v : m; });
  };
  for (; i + kLanes<A> <= size; i += kLanes<A>) add(i);
  if (i > 0 && i < size) add(size - kLanes<A>), i = size;  // some of them for a second time
  A m = folded<A>(most, larger<A>);
  for (; i < size; ++i) m = larger(scale * x[i], m);
  return m;
}

// The sum of value(i), which may be asked for twice. One float32 number that adds up millions would
// not notice the last of them: eight values a lane are added up at a time, and such sums in
// float64.
template <typename A, typename F>
A sum_of(int64_t size, F value) {
  constexpr int64_t kStep = 8 * kLanes<A>;
  double sum = 0;
  for (int64_t first = 0; first < size; first += kStep) {
    const int64_t end = std::min(first + kStep, size), last = size - kLanes<A>;
    const auto add = [](auto a, auto b) { return a + b; };
    Lanes<A> part(A(0));
    int64_t i = first;
    for (; i + kLanes<A> <= end; i += kLanes<A>) combine_lanes(part, i, value, add);
    if (i < end && last >= 0) {  // the last lanes, without those that are in the sum
      const auto rest = [=](int64_t k) {
        const A again = value(k);
        return k < i ? A(0) : again;
      };
      combine_lanes(part, last, rest, add);
      i = end;
    }
    A whole = folded<A>(part, add);
    for (; i < end; ++i) whole += value(i);
    sum += whole;
  }
  return static_cast<A>(sum);
}

// A term that is a number of a row itself. Without the sum the lanes would be a copy of memory,
// which GCC makes in pieces that a load of a whole register then has to wait for: 0.6 of the speed.
template <typename A>
MNIST_OPS_HD A term_of(A x) {
  return x + A(0);
}

template <typename A, typename F>
void fill_with(A* y, int64_t size, const F& value) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = value(i);
}

// fill_with for a row of costly numbers, which do not depend on y. What is left beyond whole
// vectors is computed with elements before it, for a second time: four exponentials of a hundred,
// one by one, took a fifth of the time. In this order: what reads the end of a row first is no
// stream for the processor to run ahead of, and took a third longer where the row was not in a
// cache.
template <typename A, typename F>
void fill_row(A* y, int64_t size, const F& value) {
  constexpr int64_t kWidth = kVectorBytes / sizeof(A);
  const int64_t last = size - kWidth, whole = last < 0 ? size : size / kWidth * kWidth;
  fill_with(y, whole, value);
  if (whole < size) fill_with(y + last, kWidth, [=](int64_t j) { return value(last + j); });
}

// results[j] = combine(...) over row j, from `start` on: eight rows at once, as above.
template <typename A, typename F>
void combine_rows(const A* x, int64_t rows, int64_t size, A start, A* results, const F& combine) {
  int64_t j = 0;
  for (; j + 8 <= rows; j += 8) {
    const A* row = x + j * size;
    A a = start, b = start, c = start, d = start, e = start, f = start, g = start, h = start;
    for (int64_t i = 0; i < size; ++i, ++row) {
      a = combine(row[0], a), b = combine(row[size], b);
      c = combine(row[2 * size], c), d = combine(row[3 * size], d);
      e = combine(row[4 * size], e), f = combine(row[5 * size], f);
      g = combine(row[6 * size], g), h = combine(row[7 * size], h);
    }
    results[j] = a, results[j + 1] = b, results[j + 2] = c, results[j + 3] = d;
    results[j + 4] = e, results[j + 5] = f, results[j + 6] = g, results[j + 7] = h;
  }
  for (; j < rows; ++j) {
    A a = start;
    for (int64_t i = 0; i < size; ++i) a = combine(x[j * size + i], a);
    results[j] = a;
  }
}

template <typename A>
void sum_rows(const A* x, int64_t rows, int64_t size, A* sums) {
  if (size <= kShortSum) {
    combine_rows(x, rows, size, A(0), sums, [](A v, A sum) { return sum + v; });
    return;
  }
  for (int64_t j = 0; j < rows; ++j) {
    const A* const row = x + j * size;
    sums[j] = sum_of<A>(size, [=](int64_t i) { return term_of(row[i]); });
  }
}

// The largest of scale * x in each row.
template <typename A>
void largest_of_rows(const A* x, int64_t rows, int64_t size, A scale, A* largest) {
  if (size <= kShortSum) {
    // Of x itself, which is the same times scale, or the smallest, where that is negative.
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    if (scale < 0) {
      combine_rows(x, rows, size, kInfinity, largest, [](A v, A m) { return v < m ? v : m; });
    } else {
      combine_rows(x, rows, size, -kInfinity, largest, larger<A>);
    }
    for (int64_t j = 0; j < rows; ++j) largest[j] *= scale;
    return;
  }
  for (int64_t j = 0; j < rows; ++j) largest[j] = largest_of(x + j * size, size, scale);
}

// Every row's number for each of its elements. Up to kSpread numbers are written behind the last.
template <typename A>
void spread(const A* numbers, int64_t rows, int64_t size, A* to) {
  for (int64_t j = 0; j < rows; ++j) {
    const A number = numbers[j];
    for (int64_t i = 0; i < size; i += kSpread) {
      A* const some = to + j * size + i;
      for (int64_t k = 0; k < kSpread; ++k) some[k] = number;
    }
  }
}

}  // namespace mnist_ops::cpu
