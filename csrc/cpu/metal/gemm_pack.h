// Packing: operands with any strides into the panels a core wants, converting the type on the way. A panel
// holds up to `width` rows of A (or columns of B), called lanes here, over the whole depth; missing lanes and
// the padding of the depth are zero.
#pragma once

#include "gemm_core.h"

namespace pyfast {
namespace {

// A matrix seen as lanes x depth; element (lane, k) at data[lane * lane_stride + k * depth_stride].
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, depth_stride;
  int64_t lanes, depth;

  Operand from(int64_t lane, int64_t k) const {
    return {data + lane * lane_stride + k * depth_stride, lane_stride, depth_stride, lanes - lane, depth - k};
  }
};

template <class Core> constexpr int64_t padded_depth(int64_t depth) { return round_up(depth, Core::kDepth); }

// Elements of all panels of `lanes` lanes, and the start of the panel that begins at `lane`.
template <class Core>
constexpr int64_t panels_size(int64_t width, int64_t lanes, int64_t depth) {
  return round_up(lanes, width) * padded_depth<Core>(depth);
}

// v[i][j] becomes v[j][i], in log2(lanes) rounds of exchanging blocks between pairs of vectors.
template <class V>
inline void transpose(V* v) {
  constexpr int n = sizeof(V) / sizeof(v[0][0]);
  using Index = __typeof__(v[0] < v[0]);
#pragma GCC unroll 8
  for (int step = 1; step < n; step *= 2) {
    Index low, high;   // lanes of (a, b) that make the new a and the new b
    for (int j = 0; j < n; ++j) {
      low[j] = j & step ? n + j - step : j;
      high[j] = j & step ? n + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & step) continue;
      const V a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// ---- panels of FmaCore: to[k][width] -------------------------------------------------------------
template <int64_t kWidth, class A, class T>
void pack_across(A* to, const Operand<T>& from) {          // depth contiguous: blocks are transposed
  constexpr int64_t n = kLanes<A>, ahead = 128 / int64_t(sizeof(T));   // two lines: 2.7 -> 5.9 GB/s with whole depths
  const int64_t lanes = min_of(from.lanes, kWidth);
  for (int64_t group = 0; group < kWidth; group += n) {
    const int64_t stored = min_of(n, kWidth - group);
    for (int64_t k = 0; k < from.depth; k += n) {
      const int64_t deep = min_of(n, from.depth - k);
      Vec<A> block[n];
      for (int64_t i = 0; i < n; ++i) {
        const T* row = from.data + (group + i) * from.lane_stride + k;
        __builtin_prefetch(row + ahead);
        block[i] = group + i >= lanes ? Vec<A>{} : deep == n ? load(row) : load_part(row, deep);
      }
      transpose(block);
      A* out = to + k * kWidth + group;
      for (int64_t j = 0; j < deep; ++j)
        stored == n ? store(out + j * kWidth, block[j]) : store_part(out + j * kWidth, block[j], stored);
    }
  }
}

template <int64_t kWidth, class A, class T>
void pack_along(A* to, const Operand<T>& from) {           // lanes contiguous: rows are copied
  constexpr int64_t n = kLanes<A>;
  for (int64_t k = 0; k < from.depth; ++k, to += kWidth) {
    const T* row = from.data + k * from.depth_stride;
    for (int64_t group = 0; group < kWidth; group += n) {
      const int64_t there = from.lanes - group, stored = min_of(n, kWidth - group);
      const Vec<A> v = there >= n ? load(row + group) : there > 0 ? load_part(row + group, there) : Vec<A>{};
      stored == n ? store(to + group, v) : store_part(to + group, v, stored);
    }
  }
}

template <int64_t kWidth, class A, class T>
void pack_strided(A* to, const Operand<T>& from) {
  for (int64_t k = 0; k < from.depth; ++k)
    for (int64_t i = 0; i < kWidth; ++i)
      to[k * kWidth + i] =
          i < from.lanes ? A(load_one(from.data + i * from.lane_stride + k * from.depth_stride)) : A(0);
}

template <int64_t kWidth, class A, class T>
void pack_fma(A* to, const Operand<T>& from) {
  if (from.depth_stride == 1) return pack_across<kWidth>(to, from);
  if (from.lane_stride == 1) return pack_along<kWidth>(to, from);
  pack_strided<kWidth>(to, from);
}

#ifdef PYFAST_TILES
// ---- panels of AmxCore: 16 x 16 blocks of bfloat16 pairs, [lane][pair] for A, [pair][lane] for B ---
inline VecU narrow(VecF v) {   // bfloat16 bits in the low halves
  bf16 h[16];
  store(h, v);
  return __builtin_convertvector(load_bits<VecH>(h), VecU);
}
inline VecU half_bits(const bf16* p, int64_t n) {
  uint16_t h[16] = {};
  __builtin_memcpy(h, p, size_t(n) * sizeof(bf16));
  return __builtin_convertvector(load_bits<VecH>(h), VecU);
}
inline VecU half_bits(const float* p, int64_t n) { return narrow(load_part(p, n)); }

// 16 pairs of neighbours in depth of one lane.
inline VecU depth_pairs(const bf16* p, int64_t n) {
  VecU v{};
  __builtin_memcpy(&v, p, size_t(n) * sizeof(bf16));
  return v;
}
inline VecU depth_pairs(const float* p, int64_t n) {
  bf16 h[32] = {};
  store(h, load_part(p, min_of(n, 16)));
  if (n > 16) store(h + 16, load_part(p + 16, n - 16));
  return depth_pairs(h, 32);
}

// One block: 16 lanes from `lane`, 32 deep from `k`.
template <bool kPairsOutside, class T>
void pack_tile(bf16* to, const Operand<T>& from, int64_t lane, int64_t k) {
  const int64_t lanes = min_of(16, from.lanes - lane), deep = min_of(32, from.depth - k);
  const T* base = from.data + lane * from.lane_stride + k * from.depth_stride;
  VecU block[16] = {};
  bool pairs_outside = true;
  if (from.depth_stride == 1) {
    pairs_outside = false;
    for (int64_t i = 0; i < lanes; ++i) block[i] = depth_pairs(base + i * from.lane_stride, deep);
  } else if (from.lane_stride == 1) {
    for (int64_t p = 0; 2 * p < deep; ++p) {
      const T* row = base + 2 * p * from.depth_stride;
      block[p] = half_bits(row, lanes);
      if (2 * p + 1 < deep) block[p] |= half_bits(row + from.depth_stride, lanes) << 16;
    }
  } else {
    for (int64_t p = 0; 2 * p < deep; ++p)
      for (int64_t i = 0; i < lanes; ++i) {
        const T* at = base + i * from.lane_stride + 2 * p * from.depth_stride;
        block[p][i] = half_bits(at, 1)[0] | (2 * p + 1 < deep ? half_bits(at + from.depth_stride, 1)[0] << 16 : 0u);
      }
  }
  if (pairs_outside != kPairsOutside) transpose(block);
  for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + 32 * i, &block[i], 64);
}

template <bool kPairsOutside, class T>
void pack_tiles(bf16* to, const Operand<T>& from) {
  for (int64_t k = 0; k < from.depth; k += AmxCore::kDepth)
    for (int64_t lane = 0; lane < 32; lane += 16, to += AmxCore::kTile) {
      if (lane < from.lanes) pack_tile<kPairsOutside>(to, from, lane, k);
      else __builtin_memset(to, 0, AmxCore::kTile * sizeof(bf16));
    }
}
#endif

// One panel of rows of A, or of columns of B: the first kRows (kCols) lanes of `from`.
template <class Core, class T>
void pack_row_panel(typename Core::Elem* to, const Operand<T>& from) {
#ifdef PYFAST_TILES
  if constexpr (Core::kDepth > 1) return pack_tiles<false>(to, from);
  else
#endif
    pack_fma<Core::kRows>(to, from);
}
template <class Core, class T>
void pack_col_panel(typename Core::Elem* to, const Operand<T>& from) {
#ifdef PYFAST_TILES
  if constexpr (Core::kDepth > 1) return pack_tiles<true>(to, from);
  else
#endif
    pack_fma<Core::kCols>(to, from);
}

// All panels of an operand, on all threads, reading memory in long runs. Lanes contiguous in depth: panel by panel,
// each lane one stream. Else a row of depth is contiguous over the lanes: a few rows for many panels at a time (3.9 ->
// 6.3 GB/s against one panel of 64 rows after the other).
// The panels may belong to a deeper operand, `depth` in all, of which `from` is a slice that starts at `to`.
template <int64_t kWidth, class Core, class T, class Pack>
void pack_panels(typename Core::Elem* to, const Operand<T>& from, int64_t depth, const Pack& pack) {
  constexpr int64_t kFewDeep = max_of(16, Core::kDepth), kManyPanels = 32;
  const bool streams = from.depth_stride == 1;
  const int64_t size = kWidth * padded_depth<Core>(max_of(depth, from.depth)), panels = ceil_div(from.lanes, kWidth);
  const int64_t deep = streams ? max_of(1, from.depth) : kFewDeep, together = streams ? 1 : kManyPanels;
  const int64_t pieces = ceil_div(from.depth, deep), groups = ceil_div(panels, together);
  const int64_t grain = ceil_div(32768, kWidth * min_of(together, panels) * deep);
  parallel_for(groups * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / pieces * together, k = task % pieces * deep;
      for (int64_t p = first; p < min_of(first + together, panels); ++p) {
        Operand<T> part = from.from(p * kWidth, k);
        part.depth = min_of(part.depth, deep);
        pack(to + p * size + k * kWidth, part);
      }
    }
  });
}
template <class Core, class T>
void pack_rows(typename Core::Elem* to, const Operand<T>& from, int64_t depth = 0) {
  pack_panels<Core::kRows, Core>(to, from, depth,
                                 [](auto* at, const Operand<T>& part) { pack_row_panel<Core>(at, part); });
}
template <class Core, class T>
void pack_cols(typename Core::Elem* to, const Operand<T>& from, int64_t depth = 0) {
  pack_panels<Core::kCols, Core>(to, from, depth,
                                 [](auto* at, const Operand<T>& part) { pack_col_panel<Core>(at, part); });
}

}  // namespace
}  // namespace pyfast
