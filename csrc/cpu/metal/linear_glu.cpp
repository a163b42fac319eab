#include "linear_glu.h"

#include "linear_few.h"
#include "linear_narrow.h"
#include "linear_thin.h"

namespace pyfast {
namespace {

template <class T>
Operand<T> weight_operand(const WeightView& w, int64_t n, int64_t k) {   // lanes n, depth k
  return {static_cast<const T*>(w.data), w.out_stride, w.in_stride, n, k};
}

// out[row, col .. col + cols) = act(gate + bias) * (up + bias), both in cache and overwritten.
template <class T, class A = acc_t<T>>
struct Finish {
  const LinearGluArgs& a;
  ActivateRow<A> activation = activation_of<A>(a.act);

  void operator()(int64_t row, int64_t col, int64_t cols, A* gate, A* up) const {
    A* parts[2] = {gate, up};
    for (int i = 0; i < 2; ++i) {
      T* preact = a.preact[i] ? static_cast<T*>(a.preact[i]) + row * a.n + col : nullptr;
      if (preact) prefetch_row(preact + kWriteAhead * a.n, cols);
      add_bias(parts[i], a.bias[i] ? static_cast<const T*>(a.bias[i]) + col : nullptr, preact, cols);
    }
    if (activation) activation(gate, cols);
    T* out = static_cast<T*>(a.out) + row * a.n + col;
    prefetch_row(out + kWriteAhead * a.n, cols);
    sweep<A>(cols, [&](auto lanes, int64_t i) { lanes.store(out + i, load(gate + i) * load(up + i)); });
  }
};

// Panels of gate and up alternate, so that a block of columns has both halves of its outputs.
template <class T>
void forward(const LinearGluArgs& a) {
  using Core = CoreFor<T>;
  using A = acc_t<T>;
  constexpr int64_t kPair = 2 * Core::kCols;
  const T* x = static_cast<const T*>(a.x);
  const Operand<T> weight[2] = {weight_operand<T>(a.weight[0], a.n, a.k), weight_operand<T>(a.weight[1], a.n, a.k)};
  const Finish<T> finish{a};
  if (a.m <= kFewRows)
    return few_rows(a.m, a.n, a.k, kBlockCols, [&](int64_t row, int64_t col, int64_t cols) {
      A* z = scratch<A>(kBlockSlot, 2 * kBlockCols);
      for (int i = 0; i < 2; ++i)
        multiply_row(x + row * a.x_stride, weight[i].from(col, 0), cols, z + i * kBlockCols);
      finish(row, col, cols, z, z + kBlockCols);
    });
  const Operand<T> rows{x, a.x_stride, 1, a.m, a.k};
  if constexpr (requires { typename Core::Step; })
    if (a.m <= a.n && weight[0].depth_stride == 1 && weight[1].depth_stride == 1 && is_thin<Core>(a.m, a.k))
      return thin_rows_forward(rows, weight, [&](int64_t col, int64_t cols, A** z, int64_t stride) {
        for (int64_t i = 0; i < a.m; ++i) finish(i, col, cols, z[0] + i * stride, z[1] + i * stride);
      });
  const auto pack = [&](auto* to, int64_t col, int64_t cols) {
    const int64_t size = Core::kCols * padded_depth<Core>(a.k);
    parallel_for(cols / kPair, ceil_div(16384, size), [&](int64_t begin, int64_t end) {
      for (int64_t p = 2 * begin; p < 2 * end; ++p)
        pack_col_panel<Core>(to + p * size, weight[p % 2].from((col + p / 2 * kPair) / 2, 0));
    });
  };
  const auto finish_block = [&](int64_t row, int64_t rows, int64_t col, int64_t cols, A* z, int64_t stride) {
    A gate[kBlockCols / 2], up[kBlockCols / 2];   // joined: the activation wants more than two vectors to work on
    for (int64_t i = 0; i < rows; ++i, z += stride) {
      for (int64_t j = 0; j < cols; j += kPair) {
        __builtin_memcpy(gate + j / 2, z + j, Core::kCols * sizeof(A));
        __builtin_memcpy(up + j / 2, z + j + Core::kCols, Core::kCols * sizeof(A));
      }
      finish(row + i, col / 2, min_of(cols / 2, a.n - col / 2), gate, up);
    }
  };
  linear_forward(rows, 2 * round_up(a.n, Core::kCols), pack, finish_block);
}

// d gate = grad_out * up * act'(gate), d up = grad_out * act(gate).
template <class T>
void backward(const LinearGluBackwardArgs& a) {
  using A = acc_t<T>;
  LinearGrads<T> g{a.m, a.n, a.k, 2, a.transposed};
  g.x = {static_cast<const T*>(a.x), 1, a.x_stride, a.k, a.m};
  g.grad_x = static_cast<T*>(a.grad_x);
  for (int i = 0; i < 2; ++i) {
    g.weight[i] = {static_cast<const T*>(a.weight[i].data), a.weight[i].in_stride, a.weight[i].out_stride, a.k, a.n};
    g.grad_weight[i] = static_cast<T*>(a.grad_weight[i]);
    g.grad_bias[i] = static_cast<T*>(a.grad_bias[i]);
  }
  const ActivateRow<A> activation = activation_of<A>(a.act);
  const GradRow<A> gradient = activation_grad_of<A>(a.act);
  const bool from_output = grad_from_output(a.act);
  const auto fill = [&](int segment, int64_t row, int64_t col, int64_t cols, A* dz) {
    const int64_t at = row * a.n + col;
    A factor[kBlockCols];
    const T* other = static_cast<const T*>(a.preact[segment == 0]) + at;   // half
    prefetch_read(other + kReadAhead * a.n, cols);
    prefetch_read(static_cast<const T*>(a.grad_out) + at + kReadAhead * a.n, cols);
    load_row(factor, other, cols);
    if (segment == 1 && activation) activation(factor, cols);
    load_row(dz, static_cast<const T*>(a.grad_out) + at, cols);
    for (int64_t i = 0; i < cols; i += kLanes<A>) store(dz + i, load(dz + i) * load(factor + i));
    if (segment == 1 || !gradient) return;
    load_row(factor, static_cast<const T*>(a.preact[0]) + at, cols);
    if (from_output) activation(factor, cols);
    gradient(dz, factor, cols);
  };
  if (are_few(g)) return few_rows_backward(g, fill);
  is_narrow(g) ? narrow_backward(g, fill) : linear_backward(g, fill);
}

}  // namespace

template <>
void linear_glu<kIsa>(const LinearGluArgs& a) {
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

template <>
void linear_glu_backward<kIsa>(const LinearGluBackwardArgs& a) {
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
