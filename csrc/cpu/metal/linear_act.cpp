#include "linear_act.h"

#include "linear_few.h"
#include "linear_narrow.h"
#include "linear_pairs.h"
#include "linear_small.h"
#include "linear_thin.h"

namespace pyfast {
namespace {

constexpr int64_t kSideBySide = 64;   // columns up to which whole rows are joined

// out[row + i, col .. col + cols) = act(z[i] + bias) for `rows` rows of z, `stride` apart.
template <class T, class A = acc_t<T>>
struct Finish {
  const LinearActArgs& a;
  ActivateRow<A> activation = activation_of<A>(a.act);

  void operator()(int64_t row, int64_t rows, int64_t col, int64_t cols, A* z, int64_t stride) const {
    if (rows > 1 && cols == a.n && cols <= kSideBySide) return finish_joined(row, rows, z, stride);
    for (int64_t i = 0; i < rows; ++i) finish_row(row + i, col, cols, z + i * stride);
  }

  void finish_row(int64_t row, int64_t col, int64_t cols, A* z) const {
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + col : nullptr;
    T* preact = a.preact ? static_cast<T*>(a.preact) + row * a.n + col : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.n + col;
    prefetch_row(out + kWriteAhead * a.n, cols);
    if (preact) prefetch_row(preact + kWriteAhead * a.n, cols);
    if (!activation && bias && !preact)   // in one pass
      return sweep<A>(cols, [&](auto lanes, int64_t i) { lanes.store(out + i, load(z + i) + lanes.load(bias + i)); });
    add_bias(z, bias, preact, cols);
    if (activation) activation(z, cols);
    store_row(out, z, cols);
  }

  // Whole short rows, which lie side by side in the result: joined in z too, where no row overtakes the one that it
  // comes from, so that no vector is half empty and the activation has more than one or two to work on.
  void finish_joined(int64_t row, int64_t rows, A* z, int64_t stride) const {
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t i = 0; i < rows; ++i)
      sweep<A>(a.n, [&](auto lanes, int64_t j) {
        const Vec<A> v = load(z + i * stride + j);
        store(z + i * a.n + j, bias ? v + lanes.load(bias + j) : v);
      });
    const int64_t count = rows * a.n;
    if (a.preact) store_row(static_cast<T*>(a.preact) + row * a.n, z, count);
    if (activation) activation(z, count);
    store_row(static_cast<T*>(a.out) + row * a.n, z, count);
  }
};

template <class T>
void forward(const LinearActArgs& a) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  const Operand<T> weight{static_cast<const T*>(a.weight.data), a.weight.out_stride, a.weight.in_stride, a.n, a.k};
  const Finish<T> finish{a};
#ifdef PYFAST_PAIR_ROWS
  if (a.m <= kPairRows && weight.depth_stride == 1)
    return pair_rows_forward({x, a.x_stride, 1, a.m, a.k}, weight, finish);
#endif
  if (a.m <= kFewRows)
    return few_rows(a.m, a.n, a.k, kBlockCols, [&](int64_t row, int64_t col, int64_t cols) {
      A* z = scratch<A>(kBlockSlot, kBlockCols);
      multiply_row(x + row * a.x_stride, weight.from(col, 0), cols, z);
      finish(row, 1, col, cols, z, 0);
    });
  const Operand<T> rows{x, a.x_stride, 1, a.m, a.k};
  if constexpr (requires { typename CoreFor<T>::Step; }) {   // AMX packs quicker than plain vectors would multiply
    if (a.m <= a.n && weight.depth_stride == 1 && is_thin<CoreFor<T>>(a.m, a.k)) {
      const Operand<T> weights[] = {weight};
      return thin_rows_forward(rows, weights, [&](int64_t col, int64_t cols, A** z, int64_t stride) {
        finish(0, a.m, col, cols, z[0], stride);
      });
    }
    if (a.n <= a.m && is_thin<CoreFor<T>>(a.n, a.k)) return thin_cols_forward(rows, weight, finish);
  }
  const auto pack = [&](auto* to, int64_t col, int64_t cols) {
    Operand<T> part = weight.from(col, 0);
    part.lanes = cols;
    pack_cols<CoreFor<T>>(to, part);
  };
  linear_forward(rows, a.n, pack, finish);
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
  const auto fill = [&](int, int64_t row, int64_t col, int64_t cols, A* dz) {
    const T* grad_out = static_cast<const T*>(a.grad_out) + row * a.n + col;
    prefetch_read(grad_out + kReadAhead * a.n, cols);
    load_row(dz, grad_out, cols);
    if (!gradient) return;
    A saved[kBlockCols];
    const T* kept = static_cast<const T*>(a.saved) + row * a.n + col;
    prefetch_read(kept + kReadAhead * a.n, cols);
    load_row(saved, kept, cols);
    gradient(dz, saved, cols);
  };
  if (are_few(g)) return few_rows_backward(g, fill);
  if constexpr (sizeof(T) == 4)
    if (is_small(g)) return small_backward(g, fill);
  if (is_narrow(g)) return narrow_backward(g, fill);
  linear_backward(g, fill);
}

}  // namespace

template <>
void linear_act<kIsa>(const LinearActArgs& a) {
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

template <>
void linear_act_backward<kIsa>(const LinearActBackwardArgs& a) {
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
