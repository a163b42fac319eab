// Vectors of float or double as wide as the instruction set this file is compiled for, by GCC's vector
// extensions: + - * / < on whole vectors, `mask ? a : b` to select. Storage types convert at load and store.
//
// Everything is in an anonymous namespace and no STL is used, so that no AVX-512 copy of a shared inline
// function can replace the baseline one at link time.
#pragma once

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../../dispatch.h"
#include "../isa.h"
#include "../parallel.h"

namespace pyfast {
namespace {

constexpr Isa kIsa = Isa::PYFAST_ISA;   // given by the build, one object per instruction set

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));

template <class A> struct VecOf { using type = VecF; };
template <> struct VecOf<double> { using type = VecD; };
template <class A> using Vec = typename VecOf<A>::type;             // A: float or double
template <> struct ScalarOf<VecF> { using type = float; };
template <> struct ScalarOf<VecD> { using type = double; };
template <class A> constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A));

inline VecF splat(float x) { return x - VecF{}; }   // x - 0 is x, and a plain broadcast; 0 + x is not (-0)
inline VecD splat(double x) { return x - VecD{}; }

// ---- whole vectors, any alignment ---------------------------------------------------------------
template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

inline VecF load(const float* p) { return load_bits<VecF>(p); }
inline VecD load(const double* p) { return load_bits<VecD>(p); }
inline VecF load(const bf16* p) {   // g++ 12 widens by halves what one instruction can: six for these two
#if defined(__AVX512F__)
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (VecF)(__builtin_convertvector(load_bits<VecH>(p), VecU) << 16);
#endif
}

inline void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN stays a NaN.
inline void store(bf16* p, VecF v) {
#ifdef __AVX512BF16__
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecH h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, VecH);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
inline VecF load(const f16* p) { return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(f16* p, VecF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline VecF load(const f16* p) { return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(f16* p, VecF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Half precision by integer and float arithmetic on whole vectors (F. Giesen's construction): a multiply by
// 2^112 rebiases the exponent, and makes subnormals normal on the way.
inline VecF load(const f16* p) {
  const VecU h = __builtin_convertvector(load_bits<VecH>(p), VecU);
  const VecF magnitude = (VecF)((h & 0x7fffu) << 13) * 0x1p112f;
  const VecU special = (VecU)magnitude | 0x7f800000u;              // infinity and NaN keep their mantissa
  const VecU finite = (VecU)magnitude;
  return (VecF)(((h & 0x7c00u) == 0x7c00u ? special : finite) | ((h & 0x8000u) << 16));
}
inline void store(f16* p, VecF v) {
  const VecU bits = (VecU)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;   // 0.5f's ulp is 2^-24: rounds to nearest even
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecU infinite = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU half = magnitude >= 0x477ff000u ? infinite : magnitude < 0x38800000u ? subnormal : normal;
  const VecH h = __builtin_convertvector(half | sign, VecH);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

// ---- the first n lanes only; the others load as zero and are not stored --------------------------
template <class A> using Mask = decltype(Vec<A>{} < Vec<A>{});

template <class A>
struct Run {   // as many lanes of ones as of zeros
  __typeof__(+Mask<A>{}[0]) lanes[2 * kLanes<A>] = {};
  constexpr Run() {
    for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = -1;
  }
};

template <class A>
inline auto first_lanes(int64_t n) {
  static constexpr Run<A> run;
  return load_bits<Mask<A>>(run.lanes + kLanes<A> - n);
}

template <class T>
inline Vec<acc_t<T>> load_part(const T* p, int64_t n) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return (VecF)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#ifdef __AVX512BW__
  if constexpr (__is_same(T, bf16)) {   // without the call of memcpy that a length not known costs
    const __m512i bits = _mm512_maskz_loadu_epi16((1u << n) - 1, p);
    return (VecF)((VecU)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)) << 16);
  }
#endif
#elif defined(__AVX2__)
  if constexpr (__is_same(T, float)) return (VecF)_mm256_maskload_ps(p, (__m256i)first_lanes<float>(n));
#endif
  T lanes[kLanes<acc_t<T>>] = {};
  __builtin_memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_part(T* p, Vec<acc_t<T>> v, int64_t n) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  if constexpr (__is_same(T, float)) return _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(n), (__m256)v);
#endif
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
#ifdef __AVX512BW__
  if constexpr (__is_same(T, bf16))
    return _mm512_mask_storeu_epi16(p, (1u << n) - 1, _mm512_castsi256_si512(load_bits<__m256i>(lanes)));
#endif
  __builtin_memcpy(p, lanes, size_t(n) * sizeof(T));
}

// One visit of sweep(): a whole vector, or the tail of a row.
template <class A>
struct Whole {
  template <class T> Vec<A> load(const T* p) const { return pyfast::load(p); }
  template <class T> void store(T* p, Vec<A> v) const { pyfast::store(p, v); }
  Vec<A> keep(Vec<A> v, A) const { return v; }
};
template <class A>
struct Part {
  int64_t count;
  template <class T> Vec<A> load(const T* p) const { return load_part(p, count); }
  template <class T> void store(T* p, Vec<A> v) const { store_part(p, v, count); }
  Vec<A> keep(Vec<A> v, A fallback) const {   // lanes beyond the row become `fallback`
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4)
      return (VecF)_mm512_mask_mov_ps((__m512)splat(fallback), __mmask16((1u << count) - 1), (__m512)v);
#endif
    return first_lanes<A>(count) ? v : splat(fallback);
  }
};

// f(lanes, i) for every vector of [0, n), arithmetic in A: `lanes` loads and stores at offset i.
template <class A, class F>
inline __attribute__((always_inline)) void sweep(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(Whole<A>{}, i);
  if (i < n) f(Part<A>{n - i}, i);
}

// f(TypeTag<T>) for the storage types an object has kernels for: bfloat16 alone where one instruction rounds to it.
template <class F>
inline void dispatch_stored(DType dtype, const F& f) {
#ifdef __AVX512BF16__
  f(TypeTag<bf16>{});
#else
  dispatch_dtype(dtype, f);
#endif
}

// ---- across lanes: pairwise, so that the order is the same everywhere -----------------------------
template <class V> inline V max_of(V a, V b) { return a > b ? a : b; }
template <class V> inline V min_of(V a, V b) { return a < b ? a : b; }
// The same to the bit, NaN included; g++ 12 makes a comparison and a choice of the form above, three times the latency.
#if defined(__AVX512F__)
inline VecF max_of(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VecF min_of(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline VecF max_of(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VecF min_of(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

// Lane i + half in the place of lane i; what is in the others does not matter.
template <class V>
inline V upper_half(V v, int half) {
  using Index = __typeof__(v < v);
  Index from;
#pragma GCC unroll 16
  for (int i = 0; i < int(sizeof(v) / sizeof(v[0])); ++i) from[i] = i ^ half;
  return __builtin_shuffle(v, from);
}
template <class V>
inline auto sum_lanes(V v) {
#pragma GCC unroll 4
  for (int half = sizeof(v) / sizeof(v[0]) / 2; half; half /= 2) v += upper_half(v, half);
  return v[0];
}
template <class V>
inline auto max_lanes(V v) {
#pragma GCC unroll 4
  for (int half = sizeof(v) / sizeof(v[0]) / 2; half; half /= 2) v = max_of(v, upper_half(v, half));
  return v[0];
}

// One element, for tails that touch single values.
inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
inline float load_one(const bf16* p) { return load_part(p, 1)[0]; }
inline float load_one(const f16* p) { return load_part(p, 1)[0]; }
template <class T> inline void store_one(T* p, acc_t<T> x) { store_part(p, splat(x), 1); }

// The numbers below n, as std::make_integer_sequence gives them.
template <int... k> struct Numbers {};
template <int n, int... k> struct NumbersBelow : NumbersBelow<n - 1, n - 1, k...> {};
template <int... k> struct NumbersBelow<0, k...> { using type = Numbers<k...>; };

// Lane j of vector i and lane i of vector j change places: the off-diagonal quarters first, then those of each quarter.
template <int kHalf, class V, int kSize, int... kLane>
inline __attribute__((always_inline)) void exchange(V (&v)[kSize], Numbers<kLane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) {
    if (i & kHalf) continue;
    const V a = v[i], b = v[i + kHalf];
    v[i] = __builtin_shufflevector(a, b, (kLane & kHalf ? kSize + kLane - kHalf : kLane)...);
    v[i + kHalf] = __builtin_shufflevector(a, b, (kLane & kHalf ? kSize + kLane : kLane + kHalf)...);
  }
  if constexpr (kHalf > 1) exchange<kHalf / 2>(v, lanes);
}
template <class V, int kSize>
inline __attribute__((always_inline)) void transpose(V (&v)[kSize]) {
  exchange<kSize / 2>(v, typename NumbersBelow<kSize>::type());
}

// Lane i: sum_lanes(v[i]), to the bit, by a third of the shuffles of one after the other. Spends v.
template <int kHalf, class V, int kSize, int... kLane>
inline __attribute__((always_inline)) V sum_halves(V (&v)[kSize], Numbers<kLane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    const V a = v[i], b = v[i + kHalf];
    v[i] = __builtin_shufflevector(a, b, (kLane & kHalf ? kSize + kLane - kHalf : kLane)...) +
           __builtin_shufflevector(a, b, (kLane & kHalf ? kSize + kLane : kLane + kHalf)...);
  }
  if constexpr (kHalf > 1) return sum_halves<kHalf / 2>(v, lanes);
  return v[0];
}
template <class V, int kSize>
inline __attribute__((always_inline)) V sum_each(V (&v)[kSize]) {
  return sum_halves<kSize / 2>(v, typename NumbersBelow<kSize>::type());
}

}  // namespace
}  // namespace pyfast
