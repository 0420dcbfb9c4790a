// Vectors and blocks of channels.
//
// Maps are stored in blocks of channels: [block of channels][pixel][lane]. A block's lanes at one
// pixel fill one cache line, so every load and store is a whole, aligned line, loops over lanes
// need no remainder, and work on one block touches no other. Vectors of features are maps of one
// pixel. Lanes beyond the last channel hold numbers that nothing reads.
#pragma once

#include "../cpu/common.h"

#include <memory>
#include <new>

namespace mnist_ops::online {

constexpr int64_t kLineBytes = 64;

// Channels in a block.
template <typename T>
constexpr int64_t kLanes = kLineBytes / sizeof(T);

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// -------------------------------------------------------------------------------------- registers

using cpu::kVectorBytes;
using cpu::Vector;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int kVectorsPerLine = kLineBytes / kVectorBytes;
template <typename T>
constexpr int kWidth = kVectorBytes / sizeof(T);  // numbers in a vector

// Rows of a register tile: accumulators [rows][vectors of a line], leaving room for a line of the
// other operand and one broadcast number.
constexpr int kTileRows = (kRegisters - kVectorsPerLine - 2) / kVectorsPerLine > 14
                              ? 14
                              : (kRegisters - kVectorsPerLine - 2) / kVectorsPerLine;

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
inline void store(T* to, const Vector<T>& v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// a * b + c for each element, rounded once where the processor can.
#if defined(__AVX512F__)
inline Vector<float> fmadd(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vector<double> fmadd(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__AVX2__) && defined(__FMA__)
inline Vector<float> fmadd(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vector<double> fmadd(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <typename V>
inline V fmadd(V a, V b, V c) {
  return a * b + c;
}
#endif

// Whether test(vector), a mask, holds for all n numbers; n is a multiple of a line.
template <typename T, typename F>
inline bool all_of(const T* x, int64_t n, const F& test) {
  auto all = test(load(x));
  for (int64_t i = kWidth<T>; i < n; i += kWidth<T>) all &= test(load(x + i));
  bool result = true;
  for (int l = 0; l < kWidth<T>; ++l) result = result && all[l] != 0;
  return result;
}

// A square of kLanes x kLanes numbers, lines to columns.
template <typename T>
inline void transpose_square(const T* from, T* to) {
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    for (int64_t j = 0; j < kLanes<T>; ++j) to[i * kLanes<T> + j] = from[j * kLanes<T> + i];
  }
}

#if defined(__AVX2__)
template <>
inline void transpose_square<float>(const float* from, float* to) {
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 16; j += 8) {
      const float* in = from + 16 * j + i;
      __m256 a[8], b[8];
      for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(in + 16 * r);
      for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
      }
      for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
        a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
      }
      float* out = to + 16 * i + j;
      for (int r = 0; r < 4; ++r) {
        _mm256_storeu_ps(out + 16 * r, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
        _mm256_storeu_ps(out + 16 * (r + 4), _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
      }
    }
  }
}

template <>
inline void transpose_square<double>(const double* from, double* to) {
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      const double* in = from + 8 * j + i;
      __m256d a[4], b[4];
      for (int r = 0; r < 4; ++r) a[r] = _mm256_loadu_pd(in + 8 * r);
      for (int r = 0; r < 4; r += 2) {
        b[r] = _mm256_unpacklo_pd(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_pd(a[r], a[r + 1]);
      }
      double* out = to + 8 * i + j;
      for (int r = 0; r < 2; ++r) {
        _mm256_storeu_pd(out + 8 * r, _mm256_permute2f128_pd(b[r], b[r + 2], 0x20));
        _mm256_storeu_pd(out + 8 * (r + 2), _mm256_permute2f128_pd(b[r], b[r + 2], 0x31));
      }
    }
  }
}
#endif

// ------------------------------------------------------------------------------------------ memory

// Zeros, aligned to cache lines.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    const std::size_t bytes = divide_up(std::max<int64_t>(size, 1) * sizeof(T), 64) * 64;
    data_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{kLineBytes})));
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kLineBytes}); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace mnist_ops::online
