#include "linear_act.h"

#include "linear_backward.h"

namespace pyfast {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;   // of one packed operand: larger ones go in chunks
constexpr int64_t kFewRows = 3;              // up to here reading the weight once, unpacked, is all the work
constexpr int kRowsSlot = 1, kColsSlot = 2;

template <class T>
Operand<T> weight_operand(const WeightView& w, int64_t n, int64_t k) {   // lanes n, depth k
  return {static_cast<const T*>(w.data), w.out_stride, w.in_stride, n, k};
}

// out[row, col .. col + cols) = act(z + bias), z in cache and overwritten.
template <class T, class A = acc_t<T>>
struct Finish {
  const LinearActArgs& a;
  ActivateRow<A> activation = activation_of<A>(a.act);

  void operator()(int64_t row, int64_t col, int64_t cols, A* z) const {
    if (a.bias) add_row(z, static_cast<const T*>(a.bias) + col, cols);
    if (a.preact) store_row(static_cast<T*>(a.preact) + row * a.n + col, z, cols);
    if (activation) activation(z, cols);
    store_row(static_cast<T*>(a.out) + row * a.n + col, z, cols);
  }
};

template <class T>
void forward(const LinearActArgs& a) {
  using Core = CoreFor<T>;
  using Elem = typename Core::Elem;
  const int64_t bytes = padded_depth<Core>(a.k) * int64_t(sizeof(Elem));
  const int64_t most = max_of(kBlockCols, kPackedBytes / max_of(1, bytes) / kBlockCols * kBlockCols);
  const int64_t row_chunk = min_of(most / Core::kRows * Core::kRows, round_up(a.m, Core::kRows));
  const int64_t col_chunk = min_of(most, round_up(a.n, kBlockCols));
  Elem* x = scratch<Elem>(kRowsSlot, panels_size<Core>(Core::kRows, row_chunk, a.k));
  Elem* weight = scratch<Elem>(kColsSlot, panels_size<Core>(Core::kCols, col_chunk, a.k));
  const Operand<T> rows_of_x{static_cast<const T*>(a.x), a.x_stride, 1, a.m, a.k};
  const Operand<T> cols_of_w = weight_operand<T>(a.weight, a.n, a.k);
  const Finish<T> finish{a};
  for (int64_t row = 0; row < a.m; row += row_chunk) {
    Operand<T> x_part = rows_of_x.from(row, 0);
    x_part.lanes = min_of(row_chunk, a.m - row);
    pack_rows<Core>(x, x_part);
    for (int64_t col = 0; col < a.n; col += col_chunk) {
      Operand<T> w_part = cols_of_w.from(col, 0);
      w_part.lanes = min_of(col_chunk, a.n - col);
      if (row == 0 || a.n > col_chunk) pack_cols<Core>(weight, w_part);
      multiply_panels<Core>(Panels<Core>{x, x_part.lanes, a.k}, Panels<Core>{weight, w_part.lanes, a.k},
                            [&](int64_t r, int64_t rows, int64_t c, int64_t cols, auto* z) {
                              for (int64_t i = 0; i < rows; ++i)
                                finish(row + r + i, col + c, cols, z + i * kBlockCols);
                            });
    }
  }
}

// z[row] for one block of columns, straight from the weight: dot products where its rows are contiguous, sums of
// scaled rows where its columns are.
template <class T, class A = acc_t<T>>
void multiply_row(const LinearActArgs& a, int64_t row, int64_t col, int64_t cols, A* z) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const Operand<T> w = weight_operand<T>(a.weight, a.n, a.k).from(col, 0);
  if (w.depth_stride == 1) {
    for (int64_t j = 0; j < cols; ++j) {
      const T* line = w.data + j * w.lane_stride;
      Vec<A> sum[2] = {};
      int64_t k = 0;
      for (; k + 2 * kLanes<A> <= a.k; k += 2 * kLanes<A>) {
        sum[0] += load(x + k) * load(line + k);
        sum[1] += load(x + k + kLanes<A>) * load(line + k + kLanes<A>);
      }
      sweep<A>(a.k - k, [&](auto lanes, int64_t i) { sum[0] += lanes.load(x + k + i) * lanes.load(line + k + i); });
      z[j] = sum_lanes(sum[0] + sum[1]);
    }
    return;
  }
  __builtin_memset(z, 0, size_t(cols) * sizeof(A));
  for (int64_t k = 0; k < a.k; ++k) {
    const Vec<A> xk = splat(A(load_one(x + k)));
    const T* line = w.data + k * w.depth_stride;
    sweep<A>(cols, [&](auto lanes, int64_t j) { store(z + j, load(z + j) + xk * lanes.load(line + j)); });
  }
}

template <class T>
void forward_few_rows(const LinearActArgs& a) {
  using A = acc_t<T>;
  const Finish<T> finish{a};
  const int64_t blocks = ceil_div(a.n, kBlockCols);
  parallel_for(blocks, ceil_div(16384, kBlockCols * max_of(1, a.k)), [&](int64_t begin, int64_t end) {
    A* z = scratch<A>(kBlockSlot, kBlockCols);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t row = 0; row < a.m; ++row) {
        const int64_t col = b * kBlockCols, cols = min_of(kBlockCols, a.n - col);
        multiply_row<T>(a, row, col, cols, z);
        finish(row, col, cols, z);
      }
  });
}

template <class T>
void backward(const LinearActBackwardArgs& a) {
  using A = acc_t<T>;
  LinearGrads<T> g{a.m, a.n, a.k, 1, a.transposed};
  g.x = {static_cast<const T*>(a.x), 1, a.x_stride, a.k, a.m};
  g.weight[0] = {static_cast<const T*>(a.weight.data), a.weight.in_stride, a.weight.out_stride, a.k, a.n};
  g.grad_x = static_cast<T*>(a.grad_x);
  g.grad_weight[0] = static_cast<T*>(a.grad_weight);
  g.grad_bias[0] = static_cast<T*>(a.grad_bias);
  const GradRow<A> gradient = a.saved ? activation_grad_of<A>(a.act) : nullptr;
  linear_backward(g, [&](int, int64_t row, int64_t col, int64_t cols, A* dz) {
    load_row(dz, static_cast<const T*>(a.grad_out) + row * a.n + col, cols);
    if (!gradient) return;
    A saved[kBlockCols];
    load_row(saved, static_cast<const T*>(a.saved) + row * a.n + col, cols);
    gradient(dz, saved, cols);
  });
}

}  // namespace

template <>
void linear_act<kIsa>(const LinearActArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool direct = a.weight.in_stride == 1 || a.weight.out_stride == 1;
    a.m <= kFewRows && direct ? forward_few_rows<T>(a) : forward<T>(a);
  });
}

template <>
void linear_act_backward<kIsa>(const LinearActBackwardArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
