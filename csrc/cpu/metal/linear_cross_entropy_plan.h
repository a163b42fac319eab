// How linear_cross_entropy divides its rows and classes, and where everything lies in its workspace.
#pragma once

#include "gemm.h"
#include "linear_cross_entropy.h"

namespace pyfast {
namespace {

constexpr int64_t kSlab = kBlockCols;                    // classes
constexpr int64_t kNarrowSlab = 64;                      // where whole ones would leave threads idle
constexpr int64_t kMostGroup = 4096;                     // classes of a group
constexpr int64_t kLeastBudget = int64_t(16) << 20;      // bytes of workspace that are never too many
constexpr int64_t kWholeBudget = int64_t(40) << 20;      // of those where the whole logits are kept
constexpr int64_t kMostRanges = 32;

// Hands out pieces of the workspace; without memory, only counts.
struct Pieces {
  char* base;
  int64_t used = 0;

  template <class P>
  void take(P*& p, int64_t count) {
    p = base ? reinterpret_cast<P*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(P)), 64);
  }
};

template <class T>
struct LinearCrossEntropyPlan {
  using Core = CoreFor<T>;
  using Elem = typename Core::Elem;
  using A = typename Core::Acc;
  static constexpr int64_t kBlockRows = kPanelsPerBlock<Core> * Core::kRows;

  struct Partial {
    A top, sum, weighted, weights;   // of one row over one slab; weighted: sum of w (x - top)
  };

  const LinearCrossEntropyArgs& a;
  const A* class_weight = static_cast<const A*>(a.class_weight);
  const T* weight = static_cast<const T*>(a.weight);
  const bool gradients_wanted = a.dx || a.dweight || a.dbias;
  const bool keep = gradients_wanted && !a.lse_known;
  const int64_t slabs = ceil_div(a.classes, kSlab);
  int64_t chunk, group, range, ranges, bytes;

  T* gathered;         // [chunk, K]: the rows of x that count, if others lie between them
  A* bias;             // [slabs * kSlab]
  A* bias_gradient;    // [slabs * kSlab]
  A* logits;           // [slabs][chunk][kSlab], if kept
  A* dx;               // [ranges][chunk, K]
  Elem *x_rows, *x_cols;                    // panels of X for the logits (lanes: rows) and for dW (lanes: columns)
  Elem *group_gradients, *group_weights;    // unless kept: panels of dL [chunk, group] and of W [group, K], for dX
  Partial* partial;    // [slabs][chunk]
  A* at_target;        // [chunk]

  explicit LinearCrossEntropyPlan(const LinearCrossEntropyArgs& args) : a(args) {
    plan();
    bytes = lay_out(static_cast<char*>(a.workspace));
  }

  // Workspace of about an eighth of the whole logits: a chunk of rows that keeps its logits, or else all rows and
  // groups of classes as large as that allows. Few logits are kept whole: W is read and dW written once.
  void plan() {
    const bool whole = keeps_whole_logits(a.rows, a.classes);
    const int64_t budget = max_of(whole ? kWholeBudget : kLeastBudget, a.rows * a.classes * int64_t(sizeof(T)) / 8);
    chunk = keep ? Core::kRows : a.rows;
    group = min_of(kMostGroup, slabs * kSlab);
    ranges = 1, range = slabs * kSlab;
    if (!keep) {
      while (group > 2 * kSlab && lay_out(nullptr) > budget) group = round_up(group / 2, kSlab);
      return;
    }
    const int64_t first = lay_out(nullptr);
    chunk = 2 * Core::kRows;
    const int64_t each = (lay_out(nullptr) - first) / Core::kRows;   // bytes per row of the chunk
    chunk = max_of(Core::kRows, (budget - budget / 8 - first) / max_of(1, each) + Core::kRows);
    const int64_t chunks = ceil_div(a.rows, min_of(chunk, a.rows));
    chunk = whole ? a.rows : min_of(a.rows, round_up(ceil_div(a.rows, chunks), Core::kRows));
    if (!a.dx) ranges = kMostRanges;
    else ranges = max_of(2, min_of(kMostRanges, budget / 8 / max_of(1, chunk * a.depth * int64_t(sizeof(A)))));
    range = round_up(ceil_div(a.classes, ranges), a.classes < kSlab * ranges ? kNarrowSlab : kSlab);
    ranges = ceil_div(a.classes, range);
  }

  int64_t lay_out(char* base) {
    Pieces pieces{base};
    const int64_t k = a.depth;
    pieces.take(gathered, side_by_side(0, a.rows) ? 0 : chunk * k);
    pieces.take(bias, a.bias ? slabs * kSlab : 0);
    pieces.take(bias_gradient, a.dbias ? slabs * kSlab : 0);
    pieces.take(logits, keep ? slabs * chunk * kSlab : 0);
    pieces.take(dx, a.dx ? ranges * chunk * k : 0);
    pieces.take(x_rows, panels_size<Core>(Core::kRows, chunk, k));
    pieces.take(x_cols, a.dweight ? panels_size<Core>(Core::kCols, k, chunk) : 0);
    const bool groups = a.dx && !keep;
    pieces.take(group_gradients, groups ? panels_size<Core>(Core::kRows, chunk, group) : 0);
    pieces.take(group_weights, groups ? panels_size<Core>(Core::kCols, k, group) : 0);
    pieces.take(partial, a.lse_known ? 0 : slabs * chunk);
    pieces.take(at_target, chunk);
    return pieces.used;
  }

  // Whether these rows that count have no others between them.
  bool side_by_side(int64_t first, int64_t rows) const {
    return a.row_index[first + rows - 1] - a.row_index[first] == rows - 1;
  }
};

}  // namespace
}  // namespace pyfast
