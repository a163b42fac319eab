#include "cross_entropy.h"

#include "log_sum_exp.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 16384;   // logits a thread takes at least: below that, waking it costs more

// Sum of weight * (x - origin) over a block; without weights, of x - origin.
template <class T, class A = acc_t<T>>
Vec<A> weighted_sum(const T* x, const A* weight, A origin, int64_t n) {
  Vec<A> sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> d = lanes.load(x + i) - origin;
    if (weight) d *= lanes.load(weight + i);
    sum += lanes.keep(d, 0);
  });
  return sum;
}

// The sum of the class weights; without weights, the number of classes.
template <class A>
A total_weight(const A* weight, int64_t n) {
  if (!weight) return A(n);
  Vec<A> sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) { sum += lanes.load(weight + i); });
  return sum_lanes(sum);
}

// With e the smoothing, w the class weights and t the target:
// loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c), all logits taken relative to x_t, so that a
// large number common to all of them costs no digits.
template <class T, class A = acc_t<T>>
void loss_row(const CrossEntropyArgs& a, int64_t row, A class_total) {
  A *loss = static_cast<A*>(a.loss) + row, *lse = static_cast<A*>(a.lse) + 2 * row;
  const int64_t n = a.cols, t = a.target[row];
  *loss = 0;
  lse[0] = lse[1] = 0;
  if (t == a.ignore_index) return;
  if (t < 0 || t >= n) return note_first(a.first_bad_row, row);
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const A* weight = static_cast<const A*>(a.weight);
  const A at_target = load_one(x + t), origin = __builtin_isfinite(at_target) ? at_target : 0;
  const bool smooth = a.label_smoothing > 0;
  LogSumExp<A> sums;
  Vec<A> shifted{};
  for (int64_t i = 0; i < n; i += kLogitBlock<A>) {
    const int64_t count = min_of(kLogitBlock<A>, n - i);
    sums.add_block(x + i, count);
    if (smooth) shifted += weighted_sum(x + i, weight ? weight + i : nullptr, origin, count);
  }
  sums.result(lse);
  const A picked = A(1 - a.label_smoothing) * (weight ? weight[t] : A(1));
  *loss = picked * ((lse[0] - at_target) + lse[1]);
  if (smooth)
    *loss += A(a.label_smoothing / double(n)) * (class_total * ((lse[0] - origin) + lse[1]) - sum_lanes(shifted));
}

// grad x_c = g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t.
template <class T, class A = acc_t<T>>
void loss_backward_row(const CrossEntropyBackwardArgs& a, int64_t row, A class_total) {
  const int64_t n = a.cols, t = a.target[row];
  T* dx = static_cast<T*>(a.grad_logits) + row * n;
  if (t == a.ignore_index) {
    __builtin_memset(dx, 0, size_t(n) * sizeof(T));
    return;
  }
  if (t < 0 || t >= n) return note_first(a.first_bad_row, row);
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const A* weight = static_cast<const A*>(a.weight);
  const A g = static_cast<const A*>(a.grad_loss)[row * a.grad_loss_stride];
  const A picked = g * (A(1 - a.label_smoothing) * (weight ? weight[t] : A(1)));
  const A uniform = g * A(a.label_smoothing / double(n)), scale = picked + uniform * class_total;
  const A *lse = static_cast<const A*>(a.lse) + 2 * row, top = lse[0], log_total = lse[1];
  const auto softmax = [&](Vec<A> v) { return scale * exp((v - top) - log_total); };
  const A at_target = (softmax(splat(A(load_one(x + t))))[0] - picked) - uniform * (weight ? weight[t] : A(1));
  if (uniform == 0)
    sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(dx + i, softmax(lanes.load(x + i))); });
  else if (!weight)
    sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(dx + i, softmax(lanes.load(x + i)) - uniform); });
  else
    sweep<A>(n, [&](auto lanes, int64_t i) {
      lanes.store(dx + i, softmax(lanes.load(x + i)) - uniform * lanes.load(weight + i));
    });
  store_one(dx + t, at_target);
}

// f(TypeTag<T>, row, sum of the class weights) for every row, on all threads.
template <class Args, class F>
void for_rows(const Args& a, const F& f) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using A = acc_t<typename decltype(tag)::type>;
    const A class_total = total_weight(static_cast<const A*>(a.weight), a.cols);
    parallel_for(a.rows, max_of(1, kGrainElements / max_of(a.cols, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) f(tag, row, class_total);
    });
  });
}

}  // namespace

template <>
void cross_entropy<kIsa>(const CrossEntropyArgs& a) {
  for_rows(a, [&](auto tag, int64_t row, auto class_total) {
    loss_row<typename decltype(tag)::type>(a, row, class_total);
  });
}

template <>
void cross_entropy_backward<kIsa>(const CrossEntropyBackwardArgs& a) {
  for_rows(a, [&](auto tag, int64_t row, auto class_total) {
    loss_backward_row<typename decltype(tag)::type>(a, row, class_total);
  });
}

}  // namespace pyfast
