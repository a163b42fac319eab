#include "cross_entropy.h"

#include "few_classes.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 16384;   // logits a thread takes at least: below that, waking it costs more

template <class T, class A = acc_t<T>>
A maximum(const T* x, int64_t n) {
  Vec<A> top = LogSumExp<A>().peak;
  sweep<A>(n, [&](auto lanes, int64_t i) { top = max_of(lanes.keep(lanes.load(x + i), A(-kInfinity)), top); });
  return max_lanes(top);
}

// With e the smoothing, w the class weights and t the target:
// loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c), all logits taken relative to x_t, so that a
// large number common to all of them costs no digits.
template <class T, class A = acc_t<T>>
void loss_row(const CrossEntropyArgs& a, int64_t row, A weight_sum) {
  A *loss = static_cast<A*>(a.loss) + row, *lse = static_cast<A*>(a.lse) + 2 * row;
  const int64_t n = a.cols, t = a.target[row];
  *loss = 0;
  lse[0] = lse[1] = 0;
  if (t == a.ignore_index) return;
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const A* weight = static_cast<const A*>(a.weight);
  const bool smooth = a.label_smoothing > 0;
  const A at_target = load_one(x + t);
  const A origin = !smooth || __builtin_fabs(at_target) < kHuge ? at_target : maximum(x, n);
  LogSumExp<A> sums;
  Vec<A> shifted{};
  for (int64_t i = 0; i < n; i += kLogitBlock<A>) {
    const int64_t count = min_of(kLogitBlock<A>, n - i);
    sums.add_block(x + i, count);
    if (smooth) shifted += weighted_sum(x + i, weight ? weight + i : nullptr, origin, count);
  }
  A sum;
  sums.result(lse[0], sum);
  lse[1] = A(__builtin_log(double(sum)));
  const A picked = A(1 - a.label_smoothing) * (weight ? weight[t] : A(1));
  *loss = picked * ((lse[0] - at_target) + lse[1]);
  if (smooth)
    *loss += A(a.label_smoothing / double(n)) * (weight_sum * ((lse[0] - origin) + lse[1]) - sum_lanes(shifted));
}

template <class T, class A = acc_t<T>>
void loss_backward_row(const CrossEntropyBackwardArgs& a, int64_t row, A weight_sum) {
  const int64_t n = a.cols, t = a.target[row];
  T* dx = static_cast<T*>(a.grad_logits) + row * n;
  if (t == a.ignore_index) {
    __builtin_memset(dx, 0, size_t(n) * sizeof(T));
    return;
  }
  const A g = static_cast<const A*>(a.grad_loss)[row * a.grad_loss_stride] * A(a.grad_scale);
  const LogitGradient<A> gradient(g, static_cast<const A*>(a.lse) + 2 * row, static_cast<const A*>(a.weight),
                                  weight_sum, a.label_smoothing, n, t);
  gradient.write(dx, static_cast<const T*>(a.logits) + row * a.row_stride, 0, n);
}

// f(TypeTag<T>, first, last, sum of the class weights) for pieces of the rows; where there are few classes, of whole
// vectors of rows.
template <class Args, class F>
void for_rows(const Args& a, const F& f) {
  dispatch_stored(a.dtype, [&](auto tag) {
    using A = acc_t<typename decltype(tag)::type>;
    const A weight_sum = class_total(static_cast<const A*>(a.weight), a.cols);
    const int64_t unit = are_few(a) ? kLanes<A> : 1, grain = max_of(1, kGrainElements / max_of(unit * a.cols, 1));
    parallel_for(ceil_div(a.rows, unit), grain, [&](int64_t begin, int64_t end) {
      f(tag, begin * unit, min_of(end * unit, a.rows), weight_sum);
    });
  });
}

}  // namespace

template <>
void cross_entropy<kIsa>(const CrossEntropyArgs& a) {
  for_rows(a, [&](auto tag, int64_t first, int64_t last, auto weight_sum) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kRows = kLanes<acc_t<T>>;
    if (are_few(a))
      for (int64_t row = first; row < last; row += kRows)
        few_losses<T>(a, row, min_of(kRows, last - row), weight_sum);
    else
      for (int64_t row = first; row < last; ++row) loss_row<T>(a, row, weight_sum);
  });
}

template <>
void cross_entropy_backward<kIsa>(const CrossEntropyBackwardArgs& a) {
  for_rows(a, [&](auto tag, int64_t first, int64_t last, auto weight_sum) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kRows = kLanes<acc_t<T>>;
    if (are_few(a))
      for (int64_t row = first; row < last; row += kRows)
        few_gradients<T>(a, row, min_of(kRows, last - row), last, weight_sum);
    else
      for (int64_t row = first; row < last; ++row) loss_backward_row<T>(a, row, weight_sum);
  });
}

}  // namespace pyfast
