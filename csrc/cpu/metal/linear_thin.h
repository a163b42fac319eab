// The product for a thin operand, one that stays in the level-2 cache: x of few rows, or a weight of few. It alone is
// packed, and its lanes lie side by side in vectors; the rows of the broad operand are broadcast element by element.
// Of these some at a time are copied as they are, so that they do not compete for the same cache lines, and those that
// follow are fetched meanwhile (bfloat16 of 7 x 4096 -> 4096 took 2.9 ms without, 1.8 with).
#pragma once

#include "linear_forward.h"
#include "share_out.h"

namespace pyfast {
namespace {

constexpr int64_t kThinBytes = 512 << 10;   // of the packed operand
constexpr int64_t kThinPanels = 4;          // of the broad operand to a task, at most
constexpr int64_t kLanesToPack = 64;        // of the broad operand, to be worth a packed copy of the thin one
constexpr int kTurnedSlot = 3;
// Of the copied rows, which are 33 cache lines apart.
template <class Core> constexpr int64_t kThinDepth = 2048 / int64_t(sizeof(typename Core::Elem));
template <class Core> constexpr int64_t kThinStride = kThinDepth<Core> + 64 / int64_t(sizeof(typename Core::Elem));

template <class Core>
constexpr bool is_thin(int64_t lanes, int64_t depth) {
  return panels_size<Core>(Core::kCols, lanes, depth) * int64_t(sizeof(typename Core::Elem)) <= kThinBytes;
}

// c[kRows][c_stride] (+)= rows[kRows][kThinStride] times the first kVectors vectors of a panel[depth][kCols]; fetches
// `next` meanwhile, a line with every step.
template <class Core, int kVectors, class A = typename Core::Acc>
void multiply_thin(int64_t depth, const typename Core::Elem* rows, const typename Core::Elem* panel, A* c,
                   int64_t c_stride, bool accumulate, const void* next) {
  Vec<A> sum[Core::kRows][kVectors] = {};
  const char* line = static_cast<const char*>(next);
  for (int64_t k = 0; k < depth; k += Core::kDepth, panel += Core::kDepth * Core::kCols, line += 64) {
    __builtin_prefetch(line, 0, 2);
    typename Core::Step lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = Core::side_by_side(panel + v * Core::kDepth * kLanes<A>);
#pragma GCC unroll 16
    for (int64_t r = 0; r < Core::kRows; ++r) {
      const auto spread = Core::spread(rows + r * kThinStride<Core> + k);
      for (int v = 0; v < kVectors; ++v) Core::add_product(sum[r][v], spread, lanes[v]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < Core::kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* to = c + r * c_stride + v * kLanes<A>;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// A row of the broad operand for Core; the copy is padded with one more 0.
template <class Core, class T>
void copy_row(typename Core::Elem* to, const T* from, int64_t n) {
  if constexpr (Core::kDepth == 1) load_row(to, from, n);
  else {
    __builtin_memcpy(to, from, size_t(n) * sizeof(T));
    to[n] = {};
  }
}

// c[kRows][c_stride] = the first kRows lanes of `broad`, or what there is, times all lanes of the packed operand.
template <class Core, class T, class A = typename Core::Acc>
void thin_panel(const Operand<T>& broad, const typename Core::Elem* packed, int64_t lanes, typename Core::Elem* copy,
                A* c, int64_t c_stride) {
  const int64_t depth = padded_depth<Core>(broad.depth);
  for (int64_t k = 0; k == 0 || k < broad.depth; k += kThinDepth<Core>) {
    const int64_t deep = min_of(kThinDepth<Core>, broad.depth - k);
    for (int64_t r = 0; r < min_of(broad.lanes, Core::kRows); ++r)
      copy_row<Core>(copy + r * kThinStride<Core>, broad.data + r * broad.lane_stride + k, deep);
    for (int64_t lane = 0; lane < lanes; lane += Core::kCols) {
      const auto* panel = packed + lane * depth + k * Core::kCols;
      const void* next = panel;
      if (lane == 0) next = broad.data + Core::kRows * (broad.lane_stride + k);   // there if the rows have no gaps
      if (lanes - lane > kLanes<A>) multiply_thin<Core, 2>(deep, copy, panel, c + lane, c_stride, k > 0, next);
      else multiply_thin<Core, 1>(deep, copy, panel, c + lane, c_stride, k > 0, next);
    }
  }
}

template <class Core> constexpr int64_t thin_size(int64_t c_stride) { return kThinPanels * Core::kRows * c_stride; }

// finish(first, count, c): lanes [first, first + count) of each `broad`, whose rows are contiguous, against all of
// `thin`; product (i, j) is c[i * c_stride + j], where c_stride is round_up(thin.lanes, Core::kCols); that of the next
// broad operand, of the same shape, lies thin_size() further.
// Every thread packs a copy of its own, unless they are many: to fetch it from another's cache would take longer.
template <class Core, int kBroad, class T, class Finish, class A = typename Core::Acc>
void multiply_broad(const Operand<T>& thin, const Operand<T> (&broad)[kBroad], const Finish& finish) {
  using Elem = typename Core::Elem;
  const int64_t size = panels_size<Core>(Core::kCols, thin.lanes, thin.depth), lanes = broad[0].lanes;
  const int64_t c_stride = round_up(thin.lanes, Core::kCols), panels = ceil_div(lanes, Core::kRows);
  const int64_t flops = 2 * kBroad * thin.lanes * max_of(1, thin.depth);   // of one lane of each broad operand
  const int64_t threads = min_of(thread_count(), max_of(1, lanes * flops / kBlockFlops));
  const int64_t together = max_of(1, min_of(kThinPanels, panels / (4 * threads))), block = together * Core::kRows;
  Elem* shared = lanes < kLanesToPack * threads ? scratch<Elem>(kColsSlot, size) : nullptr;
  if (shared) pack_cols<Core>(shared, thin);
  share_out(ceil_div(panels, together), threads, [&](const auto& take) {
    Elem* packed = shared ? shared : scratch<Elem>(kColsSlot, size);
    if (!shared)
      for (int64_t lane = 0; lane < thin.lanes; lane += Core::kCols)
        pack_col_panel<Core>(packed + lane * padded_depth<Core>(thin.depth), thin.from(lane, 0));
    Elem* copy = scratch<Elem>(kRowsSlot, Core::kRows * kThinStride<Core>);
    A* c = scratch<A>(kBlockSlot, kBroad * thin_size<Core>(c_stride));
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t lane = task * block, count = min_of(block, lanes - lane);
      for (int k = 0; k < kBroad; ++k)
        for (int64_t i = 0; i < count; i += Core::kRows)
          thin_panel<Core>(broad[k].from(lane + i, 0), packed, thin.lanes, copy,
                           c + k * thin_size<Core>(c_stride) + i * c_stride, c_stride);
      finish(lane, count, c);
    }
  });
}

// finish(col, cols, z, stride): columns [col, col + cols) of all rows of a thin x times each weight, whose rows are
// contiguous; z[k] is the product with the k-th, its rows `stride` apart.
template <class T, int kWeights, class Finish, class A = acc_t<T>>
void thin_rows_forward(const Operand<T>& x, const Operand<T> (&weights)[kWeights], const Finish& finish) {
  using Core = CoreFor<T>;
  constexpr int64_t kPadded = round_up(kThinPanels * Core::kRows, kLanes<A>);
  const int64_t c_stride = round_up(x.lanes, Core::kCols);
  multiply_broad<Core>(x, weights, [&](int64_t col, int64_t cols, const A* c) {
    A* turned = scratch<A>(kTurnedSlot, kWeights * c_stride * kPadded);
    A* z[kWeights];
    for (int k = 0; k < kWeights; ++k, c += thin_size<Core>(c_stride)) {
      z[k] = turned + k * c_stride * kPadded;
      for (int64_t i = 0; i < cols; i += kLanes<A>)
        for (int64_t row = 0; row < x.lanes; row += kLanes<A>) {
          Vec<A> tile[kLanes<A>];
          for (int64_t j = 0; j < kLanes<A>; ++j)
            tile[j] = i + j < cols ? load(c + (i + j) * c_stride + row) : Vec<A>{};
          transpose(tile);
          for (int64_t j = 0; j < kLanes<A>; ++j) store(z[k] + (row + j) * kPadded + i, tile[j]);
        }
    }
    finish(col, cols, z, kPadded);
  });
}

// finish(row, rows, col, cols, z, stride) as in linear_forward(), for a thin weight.
template <class T, class Finish, class A = acc_t<T>>
void thin_cols_forward(const Operand<T>& x, const Operand<T>& weight, const Finish& finish) {
  using Core = CoreFor<T>;
  const int64_t c_stride = round_up(weight.lanes, Core::kCols);
  const Operand<T> rows_of_x[] = {x};
  multiply_broad<Core>(weight, rows_of_x, [&](int64_t row, int64_t rows, A* c) {
    finish(row, rows, 0, weight.lanes, c, c_stride);
  });
}

}  // namespace
}  // namespace pyfast
