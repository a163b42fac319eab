// The gradients of a narrow layer of many rows: a block of rows goes through everything while it is in cache, on one
// thread, so that dz and x come from memory once. linear_backward() reads its packed copies back, and wakes the threads
// several times for each chunk of rows.
#pragma once

#include "linear_backward.h"

namespace pyfast {
namespace {

constexpr int64_t kNarrowWeight = 1 << 13, kManyRows = 1024;   // elements: its product is made 96 rows at a time
constexpr int64_t kNarrowGroups = 64;   // of blocks that share a sum of dW, 32 KB at most

template <class T>
bool is_narrow(const LinearGrads<T>& g) {
  return g.m >= kManyRows && max_of(g.n, g.k) <= kBlockCols && g.segments * g.n * g.k <= kNarrowWeight;
}

// left times right on this thread; finish(i, c) for every row i of it.
template <class Core, class Finish>
void multiply_narrow(const Panels<Core>& left, const Panels<Core>& right, const Finish& finish) {
  constexpr int64_t kMost = kPanelsPerBlock<Core> * Core::kRows;
  auto* c = scratch<typename Core::Acc>(kBlockSlot, kMost * kBlockCols);
  for (int64_t row = 0; row < left.lanes; row += kMost) {
    const int64_t rows = min_of(kMost, left.lanes - row);
    multiply_block(left, right, row, rows, 0, right.lanes, c);
    for (int64_t i = 0; i < rows; ++i) finish(row + i, c + i * kBlockCols);
  }
}

// One block of `rows` rows: writes dx, adds to weight_sum [segment][n k] and bias_sum [segment][bias_stride].
template <class Core, class T, class Fill, class Acc = typename Core::Acc>
void narrow_block(const LinearGrads<T>& g, const LinearWorkspace<Core>& w, const typename Core::Elem* weight,
                  const Fill& fill, int64_t row, int64_t rows, Acc* weight_sum, Acc* bias_sum) {
  for (int segment = 0; segment < g.segments; ++segment) {
    Acc* bias = g.grad_bias[0] ? bias_sum + segment * w.bias_stride : nullptr;
    pack_dz<Core>(g, w, fill, segment, row, 0, rows, rows, bias);
  }
  if (g.grad_x)
    multiply_narrow<Core>({w.dz_rows, rows, w.depth_n}, {weight, g.k, w.depth_n}, [&](int64_t i, const Acc* c) {
      store_row(g.grad_x + (row + i) * g.k, c, g.k);
    });
  if (!g.grad_weight[0]) return;
  const int64_t width = g.transposed ? Core::kRows : Core::kCols, depth = padded_depth<Core>(rows);
  for (int64_t lane = 0; lane < g.k; lane += width) {
    Operand<T> part = g.x.from(lane, row);
    part.depth = rows;
    g.transposed ? pack_row_panel<Core>(w.x + lane * depth, part) : pack_col_panel<Core>(w.x + lane * depth, part);
  }
  const Panels<Core> x{w.x, g.k, rows};
  const int64_t line = g.transposed ? g.n : g.k;
  for (int segment = 0; segment < g.segments; ++segment) {
    const Panels<Core> dz{w.dz_cols + segment * w.lanes_n * depth, g.n, rows};
    const auto add = [&](int64_t i, const Acc* c) {
      accumulate_row(weight_sum + segment * g.n * g.k + i * line, c, line);
    };
    g.transposed ? multiply_narrow<Core>(x, dz, add) : multiply_narrow<Core>(dz, x, add);
  }
}

// to[0 .. n) = the sums of the groups, which are `stride` apart, in order.
template <class T, class Acc>
void add_groups(T* to, const Acc* sums, int64_t groups, int64_t stride, int64_t n) {
  sweep<Acc>(n, [&](auto lanes, int64_t i) {
    Vec<Acc> total{};
    for (int64_t group = 0; group < groups; ++group) total += lanes.load(sums + group * stride + i);
    lanes.store(to + i, total);
  });
}

// As linear_backward(), where is_narrow(). The groups depend on the sizes alone.
template <class T, class Fill>
void narrow_backward(const LinearGrads<T>& g, const Fill& fill) {
  using Core = CoreFor<T>;
  using Acc = typename Core::Acc;
  constexpr int64_t kRows = LinearWorkspace<Core>::kMostRows;
  const LinearWorkspace<Core> shared(g, kRows);
  if (g.grad_x)
    for (int segment = 0; segment < g.segments; ++segment)
      pack_cols<Core>(shared.weight + segment * padded_depth<Core>(g.n) * Core::kCols, g.weight[segment],
                      shared.depth_n);
  const int64_t blocks = ceil_div(g.m, kRows), groups = min_of(blocks, kNarrowGroups);
  const int64_t weights = g.grad_weight[0] ? g.segments * g.n * g.k : 0;
  const int64_t size = round_up(weights, kLanes<Acc>) + g.segments * shared.bias_stride;
  Acc* sums = scratch<Acc>(kSumSlot, groups * size);
  const auto biases = [&](int64_t group) { return sums + (group + 1) * size - g.segments * shared.bias_stride; };
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Core::Session session;
    const LinearWorkspace<Core> own(g, kRows);
    for (int64_t group = begin; group < end; ++group) {
      __builtin_memset(sums + group * size, 0, size_t(size) * sizeof(Acc));
      const int64_t last = min_of(g.m, (group + 1) * blocks / groups * kRows);
      for (int64_t row = group * blocks / groups * kRows; row < last; row += kRows)
        narrow_block<Core>(g, own, shared.weight, fill, row, min_of(kRows, last - row), sums + group * size,
                           biases(group));
    }
  });
  for (int segment = 0; segment < g.segments; ++segment) {
    if (weights) add_groups(g.grad_weight[segment], sums + segment * g.n * g.k, groups, size, g.n * g.k);
    if (g.grad_bias[0])
      add_groups(g.grad_bias[segment], biases(0) + segment * shared.bias_stride, groups, size, g.n);
  }
}

}  // namespace
}  // namespace pyfast
