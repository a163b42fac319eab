// Packing: operands with any strides into the panels a core wants, converting the type on the way. A panel
// holds up to `width` rows of A (or columns of B), called lanes here, over the whole depth; missing lanes and
// the padding of the depth are zero.
#pragma once

#include "gemm_pack_bf16.h"

namespace pyfast {
namespace {

template <class Core> constexpr int64_t padded_depth(int64_t depth) { return round_up(depth, Core::kDepth); }

// Elements of all panels of `lanes` lanes, and the start of the panel that begins at `lane`.
template <class Core>
constexpr int64_t panels_size(int64_t width, int64_t lanes, int64_t depth) {
  return round_up(lanes, width) * padded_depth<Core>(depth);
}

// ---- panels of FmaCore: to[k][width] -------------------------------------------------------------
// Where a row of a panel is no whole number of vectors, its last store runs into the next row, which is written after
// it; only the last row is stored in part. Partial stores that miss the cache cost three times as much.
template <int64_t kWidth, class A, class T>
void pack_across(A* to, const Operand<T>& from) {          // depth contiguous: blocks are transposed
  // Fetched ahead: two lines (2.7 -> 5.9 GB/s with whole depths); of a narrow panel, whose lanes fit no set of L1
  // where they are whole pages apart, eight lines into L2 (10 -> 18 GB/s).
  constexpr int64_t n = kLanes<A>, ahead = (kWidth < n ? 512 : 128) / int64_t(sizeof(T));
  const int64_t lanes = min_of(from.lanes, kWidth);
  for (int64_t group = 0; group < kWidth; group += n) {
    const int64_t stored = min_of(n, kWidth - group);
    for (int64_t k = 0; k < from.depth; k += n) {
      const int64_t deep = min_of(n, from.depth - k);
      Vec<A> block[n];
      for (int64_t i = 0; i < n; ++i) {
        const T* row = from.data + (group + i) * from.lane_stride + k;
        __builtin_prefetch(row + ahead, 0, kWidth < n ? 2 : 3);
        block[i] = group + i >= lanes ? Vec<A>{} : deep == n ? load(row) : load_part(row, deep);
      }
      transpose(block);
      A* out = to + k * kWidth + group;
      const bool spill = kWidth < n && k + deep < from.depth;
      for (int64_t j = 0; j < deep; ++j)
        stored == n || spill || (kWidth < n && j + 1 < deep) ? store(out + j * kWidth, block[j])
                                                             : store_part(out + j * kWidth, block[j], stored);
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
      stored == n || k + 1 < from.depth ? store(to + group, v) : store_part(to + group, v, stored);
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

// One panel of rows of A, or of columns of B: the first kRows (kCols) lanes of `from`.
template <class Core, class T>
void pack_row_panel(typename Core::Elem* to, const Operand<T>& from) {
  if constexpr (Core::kDepth > 1) pack_bf16_rows<Core>(to, from);
  else pack_fma<Core::kRows>(to, from);
}
template <class Core, class T>
void pack_col_panel(typename Core::Elem* to, const Operand<T>& from) {
  if constexpr (Core::kDepth > 1) pack_bf16_cols<Core>(to, from);
  else pack_fma<Core::kCols>(to, from);
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
