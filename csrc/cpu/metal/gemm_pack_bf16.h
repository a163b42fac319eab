// Panels of the bfloat16 cores: pairs of neighbours in depth, 32 bits each, converted from float on the way.
#pragma once

#include "gemm_operand.h"

#ifdef PYFAST_BF16_CORE

namespace pyfast {
namespace {

// ---- 16 pairs in a vector ------------------------------------------------------------------------
#ifdef __AVX512BF16__
inline VecU narrow_two(VecF low, VecF high) { return (VecU)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#else
inline VecU narrow_two(VecF low, VecF high) {
  bf16 h[32];
  store(h, low);
  store(h + 16, high);
  return load_bits<VecU>(h);
}
#endif

// Of one lane, n elements along the depth; those that are missing are 0.
inline VecU depth_pairs(const bf16* p, int64_t n) {
  return n >= 32 ? load_bits<VecU>(p) : (VecU)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
inline VecU depth_pairs(const float* p, int64_t n) {
  if (n >= 32) return narrow_two(load(p), load(p + 16));
  return narrow_two(load_part(p, min_of(n, 16)), n > 16 ? load_part(p + 16, n - 16) : VecF{});
}

// Of n lanes side by side; the second of each pair `next` elements on, or 0 where there is none (next 0).
inline VecU lane_pairs(const bf16* p, int64_t next, int64_t n) {
  const __mmask32 lanes = n >= 16 ? 0xffffu : (1u << n) - 1;
  const auto wide = [&](const bf16* q) {
    return (VecU)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(lanes, q)));
  };
  return next ? wide(p) | wide(p + next) << 16 : wide(p);
}
inline VecU lane_pairs(const float* p, int64_t next, int64_t n) {
  const auto part = [&](const float* q) { return n >= 16 ? load(q) : load_part(q, n); };
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr Words kInterleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const VecU halves = narrow_two(part(p), next ? part(p + next) : VecF{});
  return (VecU)_mm512_permutexvar_epi16((__m512i)kInterleaved, (__m512i)halves);
}

// Any strides.
template <class T>
VecU strided_pairs(const Operand<T>& from, int64_t lane, int64_t k) {
  VecU v{};
  for (int64_t i = 0; i < min_of(16, from.lanes - lane); ++i) {
    const Operand<T> at = from.from(lane + i, k);
    const int64_t next = at.depth > 1 ? at.depth_stride : 0;
    v[i] = lane_pairs(at.data, next, 1)[0];
  }
  return v;
}

#ifdef PYFAST_TILES
// ---- AmxCore: 16 x 16 blocks of pairs, [lane][pair] for A, [pair][lane] for B --------------------
constexpr int64_t kTileAhead = 64;   // elements, two lines of bfloat16 (6.6 -> 9 GB/s of what is in no cache)

// Of one pair of the depth, 32 lanes side by side; see lane_pairs.
inline void lane_pairs_of_32(VecU& low, VecU& high, const bf16* p, int64_t next, int64_t n) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words first, second;
  for (int i = 0; i < 32; ++i) first[i] = uint16_t(i / 2 + i % 2 * 32), second[i] = uint16_t(first[i] + 16);
  const __mmask32 lanes = n >= 32 ? ~0u : (1u << n) - 1;
  const __m512i row = _mm512_maskz_loadu_epi16(lanes, p), other = _mm512_maskz_loadu_epi16(next ? lanes : 0, p + next);
  low = (VecU)_mm512_permutex2var_epi16(row, (__m512i)first, other);
  high = (VecU)_mm512_permutex2var_epi16(row, (__m512i)second, other);
}
inline void lane_pairs_of_32(VecU& low, VecU& high, const float* p, int64_t next, int64_t n) {
  low = lane_pairs(p, next, n);
  high = n > 16 ? lane_pairs(p + 16, next, n - 16) : VecU{};
}

inline void store_block(bf16* to, VecU (&block)[16], bool turned) {
  if (turned) transpose(block);
  for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + 32 * i, &block[i], 64);
}

// The two blocks of 32 lanes and 32 of the depth: lane by lane, or pair of rows by pair of rows. Lanes side by side are
// read by whole lines: where rows are pages apart, a line is gone when it is wanted again (7 -> 17 GB/s).
template <bool kPairsOutside, class T>
void pack_depth_first(bf16* to, const Operand<T>& from) {
  const int64_t deep = min_of(32, from.depth);
  for (int64_t half = 0; half < 32; half += 16, to += AmxCore::kTile) {
    VecU block[16] = {};
    for (int64_t i = 0; i < min_of(16, from.lanes - half); ++i) {
      const T* lane = from.data + (half + i) * from.lane_stride;
      __builtin_prefetch(lane + kTileAhead);
      block[i] = depth_pairs(lane, deep);
    }
    store_block(to, block, kPairsOutside);
  }
}
template <bool kPairsOutside, class T>
void pack_lanes_first(bf16* to, const Operand<T>& from) {
  VecU low[16] = {}, high[16] = {};
  for (int64_t p = 0; 2 * p < min_of(32, from.depth); ++p) {
    const Operand<T> at = from.from(0, 2 * p);
    if (from.lane_stride == 1) {
      __builtin_prefetch(at.data + kTileAhead);
      __builtin_prefetch(at.data + at.depth_stride + kTileAhead);
      lane_pairs_of_32(low[p], high[p], at.data, at.depth > 1 ? at.depth_stride : 0, at.lanes);
    } else {
      low[p] = strided_pairs(at, 0, 0), high[p] = strided_pairs(at, 16, 0);
    }
  }
  store_block(to, low, !kPairsOutside);
  store_block(to + AmxCore::kTile, high, !kPairsOutside);
}

template <bool kPairsOutside, class T>
void pack_tiles(bf16* to, const Operand<T>& from) {
  for (int64_t k = 0; k < from.depth; k += AmxCore::kDepth, to += 2 * AmxCore::kTile)
    from.depth_stride == 1 ? pack_depth_first<kPairsOutside>(to, from.from(0, k))
                           : pack_lanes_first<kPairsOutside>(to, from.from(0, k));
}

template <class Core, class T>
void pack_bf16_rows(bf16* to, const Operand<T>& from) {
  pack_tiles<false>(to, from);
}
template <class Core, class T>
void pack_bf16_cols(bf16* to, const Operand<T>& from) {
  pack_tiles<true>(to, from);
}

#else
// ---- PairTile: to[pair][width] -------------------------------------------------------------------
// As in the panels of FmaCore, a row that is not the last may run into the next.
template <int64_t kWidth>
inline void store_pairs(bf16* to, VecU v, int64_t group, bool last) {
  if (group + 16 <= kWidth || !last) __builtin_memcpy(to + 2 * group, &v, sizeof v);
  else _mm512_mask_storeu_epi32(to + 2 * group, (1u << (kWidth - group)) - 1, (__m512i)v);
}

template <int64_t kWidth, class T>
void pack_pairs(bf16* to, const Operand<T>& from) {
  static_assert(kWidth <= 16 || kWidth % 16 == 0);
  if (from.depth_stride != 1) {   // lanes side by side: pairs of rows are interleaved
    for (int64_t k = 0; k < from.depth; k += 2, to += 2 * kWidth)
      for (int64_t group = 0; group < kWidth; group += 16) {
        const int64_t lanes = min_of(16, from.lanes - group), next = k + 1 < from.depth ? from.depth_stride : 0;
        const VecU pairs = lanes <= 0              ? VecU{}
                           : from.lane_stride == 1 ? lane_pairs(from.data + k * from.depth_stride + group, next, lanes)
                                                   : strided_pairs(from, group, k);
        store_pairs<kWidth>(to, pairs, group, !next || k + 2 >= from.depth);
      }
    return;
  }
  constexpr int64_t kAhead = 128 / int64_t(sizeof(T));   // as in pack_across
  for (int64_t group = 0; group < kWidth; group += 16)
    for (int64_t k = 0; k < from.depth; k += 32) {
      const int64_t deep = min_of(32, from.depth - k);
      VecU block[16] = {};
      for (int64_t i = 0; i < min_of(16, min_of(kWidth, from.lanes) - group); ++i) {
        const T* row = from.data + (group + i) * from.lane_stride + k;
        __builtin_prefetch(row + kAhead);
        block[i] = depth_pairs(row, deep);
      }
      transpose(block);
      for (int64_t j = 0; 2 * j < deep; ++j)
        store_pairs<kWidth>(to + (k + 2 * j) * kWidth, block[j], group, k + 2 * j + 2 >= from.depth);
    }
}

template <class Core, class T>
void pack_bf16_rows(bf16* to, const Operand<T>& from) {
  pack_pairs<Core::kRows>(to, from);
}
template <class Core, class T>
void pack_bf16_cols(bf16* to, const Operand<T>& from) {
  pack_pairs<Core::kCols>(to, from);
}
#endif

}  // namespace
}  // namespace pyfast
#endif
