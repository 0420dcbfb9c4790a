// Neighbouring elements in packs of up to 16 bytes: loads, stores, copies to shared memory.
#pragma once

#include "../elementary.h"

#include "launch.cuh"

#include <cstddef>
#include <cstring>
#include <type_traits>

namespace mnist_ops::cuda {

constexpr size_t kVectorBytes = 16;

// Neighbouring elements that are read or written by one instruction, or by one for each 16 bytes.
template <typename T, int n>
struct alignas(sizeof(T) * n < kVectorBytes ? sizeof(T) * n : kVectorBytes) Pack {
  T values[n];
};

template <typename T>
constexpr int kPackSize = static_cast<int>(kVectorBytes / sizeof(T));

// The same where four of them are enough: more would seldom divide the width of a map, and as many
// numbers of a plane, in the type to compute in, have 16 bytes.
template <typename T>
constexpr int kShortPack = kPackSize<T> < 4 ? kPackSize<T> : 4;

// Whether packs can be used: a tensor may begin anywhere in its storage.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0));
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// The address is a multiple of the pack's size, or of 16 bytes.
template <int n, typename T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

#if defined(MNIST_OPS_CUDA_EMULATOR)
template <typename T, int n>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}
#else
// By instructions of PTX: a store of a struct, uint4 among them, nvcc takes apart, one instruction
// for each member, and puts together again in some kernels only. Which memory it is, is known when
// this is compiled, as a rule, and the other branches go.
__device__ __forceinline__ void store_words(uint4* to, uint4 words) {
  if (__isGlobal(to)) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else if (__isShared(to)) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_shared(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else {
    *to = words;
  }
}
__device__ __forceinline__ void store_words(uint2* to, uint2 words) {
  if (__isGlobal(to)) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y)
                 : "memory");
  } else if (__isShared(to)) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_shared(to)),
                 "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    *to = words;
  }
}

template <typename T, int n>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, n>& pack) {
  constexpr size_t kBytes = sizeof(Pack<T, n>);
  if constexpr (n == 1) {
    *to = pack.values[0];
  } else if constexpr (kBytes == 4) {  // two halves: one register, but two stores of a struct
    unsigned word;
    std::memcpy(&word, &pack, kBytes);
    *reinterpret_cast<unsigned*>(to) = word;
  } else {
    using Words = std::conditional_t<kBytes == 8, uint2, uint4>;
    Words words[kBytes / sizeof(Words)];
    std::memcpy(words, &pack, kBytes);
#pragma unroll
    for (size_t i = 0; i < kBytes / sizeof(Words); ++i) {
      store_words(reinterpret_cast<Words*>(to) + i, words[i]);
    }
  }
}
#endif

// A pack as it is in memory, in words: elements of 16 bits nvcc would take apart at once, and wait
// for them, where they are read ahead or a pack may be missing.
template <typename T, int n>
struct RawPack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * n;
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Pack<Word, kWords> words;

  __device__ __forceinline__ void fill(T value) {
    Pack<T, n> pack;
#pragma unroll
    for (int j = 0; j < n; ++j) pack.values[j] = value;
    std::memcpy(&words, &pack, sizeof(pack));
  }
  __device__ __forceinline__ void load(const T* from) {
    words = load_pack<kWords>(reinterpret_cast<const Word*>(from));
  }

  // Element i in the type to compute in.
  __device__ __forceinline__ opmath_t<T> operator[](int i) const {
    if constexpr (std::is_same_v<T, BFloat16> && n % 2 == 0) {
      const uint32_t word = words.values[i / 2];  // the upper halves of floats: one instruction
      return elementary::bits_as<float>(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
    Pack<T, n> pack;
    std::memcpy(&pack, &words, sizeof(pack));
    return static_cast<opmath_t<T>>(pack.values[i]);
  }
};

// From memory to shared memory, without waiting for it where the device can: it is there after
// wait_for_copies(), for this thread's own copies, and a barrier, for the others'.
// Both addresses are so many elements further, by numbers in the instruction.
template <int n, int further = 0, typename T>
__device__ __forceinline__ void copy_pack(T* to, const T* from) {
  [[maybe_unused]] constexpr int kBytes = static_cast<int>(sizeof(T)) * n;
#if defined(MNIST_OPS_CUDA_EMULATOR)
  if constexpr (kBytes >= 4) {
    return cuda_emulator::copy_later(to + further, from + further, kBytes);
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr int kFurther = static_cast<int>(sizeof(T)) * further;
  if constexpr (kBytes >= 4) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(shared), "l"(from),
                   "n"(kFurther)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0 + %3], [%1 + %3], %2;" ::"r"(shared), "l"(from),
                   "n"(kBytes), "n"(kFurther)
                   : "memory");
    }
    return;
  }
#endif
  store_pack(to + further, load_pack<n>(from + further));
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(MNIST_OPS_CUDA_EMULATOR)
  cuda_emulator::wait_for_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copies of a piece of memory by one thread, from compute capability 9.0 on: multiples of 16 bytes
// at multiples of 16. Loads say that they have come at a barrier in shared memory, which waits for
// so many bytes; parity changes from one wait to the next. A store is done with shared memory after
// wait_for_bulk_stores(); what threads wrote there is what it reads if they call order_bulk_store()
// and then a barrier.
#if defined(MNIST_OPS_CUDA_EMULATOR)
using cuda_emulator::begin_arrivals;
using cuda_emulator::bulk_load;
using cuda_emulator::bulk_store;
using cuda_emulator::expect_bytes;
using cuda_emulator::has_bulk_copies;
using cuda_emulator::order_bulk_store;
using cuda_emulator::wait_for_bulk_stores;
using cuda_emulator::wait_for_bytes;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ constexpr bool has_bulk_copies() {
  return true;
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void order_bulk_store() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void begin_arrivals(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  order_bulk_store();
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier, bool parity) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(static_cast<unsigned>(parity))
        : "memory");
  }
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2; cp.async.bulk.commit_group;" ::
          "l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void wait_for_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
#else
__device__ constexpr bool has_bulk_copies() {
  return false;
}
__device__ __forceinline__ void order_bulk_store() {}
__device__ __forceinline__ void begin_arrivals(uint64_t*) {}
__device__ __forceinline__ void expect_bytes(uint64_t*, int) {}
__device__ __forceinline__ void bulk_load(void*, const void*, int, uint64_t*) {}
__device__ __forceinline__ void wait_for_bytes(uint64_t*, bool) {}
__device__ __forceinline__ void bulk_store(void*, const void*, int) {}
__device__ __forceinline__ void wait_for_bulk_stores() {}
#endif

}  // namespace mnist_ops::cuda
