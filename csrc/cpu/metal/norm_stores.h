// How the norms keep what they read and write: stores past the caches, and weights in the accumulator type.
#pragma once

#include "norm.h"
#include "vecmath.h"

namespace pyfast {
namespace {

// Stores past the caches, which then read no line before it is written and keep the operands instead: float and, with
// AVX-512, bfloat16.
template <class L, class T, class V>
inline void stream(L lanes, T* p, V v) {
#ifdef __AVX512F__
  if constexpr (__is_same(T, float)) return _mm512_stream_ps(p, (__m512)v);
  if constexpr (__is_same(T, bf16)) {
    __m256i narrow;
    store(reinterpret_cast<bf16*>(&narrow), v);
    return _mm256_stream_si256((__m256i*)p, narrow);
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(T, float)) return _mm256_stream_ps(p, (__m256)v);
#endif
  lanes.store(p, v);
}

// Whether the rows of T are streamed; for types without such stores the compiler need not see both ways.
template <class T, class Args>
inline bool streams(const Args& a) {
#ifdef __AVX512F__
  return (__is_same(T, float) || __is_same(T, bf16)) && a.streams;
#elif defined(__AVX2__)
  return __is_same(T, float) && a.streams;
#else
  return false;
#endif
}

// Between what a thread streamed and what it does next.
inline void finish_streams() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// Stores v; what it is when rounded to T.
template <class A, class L, class T>
inline Vec<A> stored(L lanes, T* p, Vec<A> v, bool streams) {
  if (!streams) {
    lanes.store(p, v);
    return lanes.load(p);
  }
  stream(lanes, p, v);
  if constexpr (sizeof(T) == sizeof(A)) return v;
  T narrow[kLanes<A>];
  store(narrow, v);
  return load(narrow);
}

// weight or bias [n] in the accumulator type: in place, or converted once for many rows into this thread's scratch;
// `absent` in every element where there is none.
template <class T, class A = acc_t<T>>
inline const A* widened(const void* affine, bool is_wide, int64_t n, int slot, A absent) {
  if (affine && is_wide) return static_cast<const A*>(affine);
  const T* narrow = static_cast<const T*>(affine);
  A* wide = scratch<A>(slot, n);
  if (!affine) {
    for (int64_t i = 0; i < n; ++i) wide[i] = absent;
    return wide;
  }
  sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(wide + i, lanes.load(narrow + i)); });
  return wide;
}

}  // namespace
}  // namespace pyfast
