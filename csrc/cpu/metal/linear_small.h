// The gradients of a small layer of few rows, such as an MLP's: its operands fit the caches, so that packing them and
// waking threads for each product would cost as much as the products. They are read where they lie, and both products
// are one parallel loop once dz is made. For float, whose vectors are what the cores multiply.
#pragma once

#include "linear_backward.h"
#include "share_out.h"

namespace pyfast {
namespace {

constexpr int64_t kSmallRows = 512, kSmallProducts = 1 << 24, kDzCols = 64;

template <class T>
bool is_small(const LinearGrads<T>& g) {
  return !g.transposed && g.m <= kSmallRows && g.m * g.n * g.k * g.segments <= kSmallProducts;
}

// An operand of FmaCore's product where it lies: element (depth k, lane i) is data[k * step + i].
struct Lines {
  const float* data;
  int64_t step;
};

// The first kCols lanes of `from` in place; in a packed copy where they are not side by side, or not as many.
template <class Core>
Lines lines_of(const Operand<float>& from, int slot) {
  if (from.lane_stride == 1 && from.lanes >= Core::kCols) return {from.data, from.depth_stride};
  float* packed = scratch<float>(slot, Core::kCols * from.depth);
  pack_col_panel<Core>(packed, from);
  return {packed, Core::kCols};
}

// FmaCore's product, the steps of a and of b `step` apart, with so many vectors of b.
template <class Core, int kVectors>
void multiply_lines(int64_t depth, Lines a, Lines b, float* c, int64_t c_stride, bool accumulate) {
  VecF sum[Core::kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a.data += a.step, b.data += b.step) {
    VecF bk[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(b.data + Core::kAhead * b.step + v * kLanes<float>);
      bk[v] = load(b.data + v * kLanes<float>);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < Core::kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] += splat(a.data[r]) * bk[v];
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < Core::kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes<float>;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// to[rows][cols], lines `stride` apart, (+)= the tile of a and b, or what there is of it.
template <class Core>
void write_tile(float* to, int64_t stride, int64_t rows, int64_t cols, int64_t depth, Lines a, Lines b, bool add) {
  if (rows >= Core::kRows && cols >= Core::kCols) return multiply_lines<Core, 2>(depth, a, b, to, stride, add);
  float tile[Core::kRows * Core::kCols];
  rows = min_of(rows, Core::kRows), cols = min_of(cols, Core::kCols);
  if (cols > kLanes<float>) multiply_lines<Core, 2>(depth, a, b, tile, Core::kCols, false);
  else multiply_lines<Core, 1>(depth, a, b, tile, Core::kCols, false);
  for (int64_t i = 0; i < rows; ++i, to += stride) {
    if (add) add_row(tile + i * Core::kCols, to, cols);
    store_row(to, tile + i * Core::kCols, cols);
  }
}

// As linear_backward(), where is_small().
template <class Fill>
void small_backward(const LinearGrads<float>& g, const Fill& fill) {
  using Core = FmaCore<float>;
  const int64_t line = round_up(g.n, kLanes<float>) + 2 * kLanes<float>;   // a panel may be read past n
  const int64_t panels = ceil_div(g.m, Core::kRows), panel = Core::kRows * g.n;
  float* dz = scratch<float>(kDzColsSlot, g.segments * g.m * line);             // [segment][m][line]
  float* rows = scratch<float>(kDzRowsSlot, g.segments * panels * panel);       // [segment][panel][n][kRows]
  const int64_t blocks = ceil_div(g.n, kDzCols);
  parallel_for(g.segments * blocks, ceil_div(16384, kDzCols * g.m), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int segment = int(task / blocks);
      const int64_t col = task % blocks * kDzCols, cols = min_of(kDzCols, g.n - col);
      float *own = dz + segment * g.m * line + col, sum[kDzCols] = {};
      for (int64_t row = 0; row < g.m; ++row) {
        fill(segment, row, col, cols, own + row * line);
        if (g.grad_bias[0]) add_row(sum, own + row * line, cols);
      }
      if (g.grad_bias[0]) store_row(g.grad_bias[segment] + col, sum, cols);
      for (int64_t p = 0; p < panels && g.grad_x; ++p)
        pack_row_panel<Core>(rows + (segment * panels + p) * panel + col * Core::kRows,
                             Operand<float>{own + p * Core::kRows * line, line, 1, g.m - p * Core::kRows, cols});
    }
  });

  const auto input_grad = [&](int64_t col) {
    for (int segment = 0; segment < g.segments; ++segment) {
      const Lines weight = lines_of<Core>(g.weight[segment].from(col, 0), kWeightSlot);
      for (int64_t p = 0; p < panels; ++p) {
        const Lines a{rows + (segment * panels + p) * panel, Core::kRows};
        float* to = g.grad_x + p * Core::kRows * g.k + col;
        write_tile<Core>(to, g.k, g.m - p * Core::kRows, g.k - col, g.n, a, weight, segment > 0);
      }
    }
  };
  const int64_t whole = g.k / Core::kCols * Core::kCols;
  const Lines last = lines_of<Core>(g.x.from(whole, 0), kInputSlot);
  const auto weight_grad = [&](int segment, int64_t row) {
    const Lines a{dz + segment * g.m * line + row, line};
    float* to = g.grad_weight[segment] + row * g.k;
    for (int64_t col = 0; col < g.k; col += Core::kCols) {
      const Lines x = col < whole ? Lines{g.x.data + col, g.x.depth_stride} : last;
      write_tile<Core>(to + col, g.k, g.n - row, g.k - col, g.m, a, x, false);
    }
  };
  const int64_t inputs = g.grad_x ? ceil_div(g.k, Core::kCols) : 0;
  const int64_t weights = g.grad_weight[0] ? ceil_div(g.n, Core::kRows) : 0, tasks = inputs + g.segments * weights;
  const int64_t flops = 2 * g.m * g.n * g.k * g.segments * ((inputs > 0) + (weights > 0));
  share_out(tasks, min_of(thread_count(), max_of(1, flops / kBlockFlops)), [&](const auto& take) {
    for (int64_t task = take(); task >= 0; task = take())
      task < inputs ? input_grad(task * Core::kCols)
                    : weight_grad(int((task - inputs) / weights), (task - inputs) % weights * Core::kRows);
  });
}

}  // namespace
}  // namespace pyfast
