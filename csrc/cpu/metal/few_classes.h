// Cross entropy over few classes: a lane for every row and a vector for every class, so that maxima, exponentials and
// logarithms of many rows are taken at once. A row at a time costs most where it leaves its vector: in sums across
// lanes, a logarithm, and a tail shorter than a vector.
#pragma once

#include "cross_entropy.h"
#include "log_sum_exp.h"

namespace pyfast {
namespace {

constexpr int64_t kFewClasses = 256;   // at most: 1.6 times as quick as a row at a time even there
constexpr int64_t kFewGradients = 64;   // those of more are made as quickly in their place

constexpr bool are_few(const CrossEntropyArgs& a) { return a.cols > 0 && a.cols <= kFewClasses; }
constexpr bool are_few(const CrossEntropyBackwardArgs& a) { return a.cols > 0 && a.cols <= kFewGradients; }

// kLanes<A> rows or less as columns: lane r of columns[c] is the logit of class c in row r. Lanes without a row repeat
// the last, columns past `classes` hold anything.
template <class A>
struct RowsInLanes {
  static constexpr int kRows = kLanes<A>;
  int64_t count, classes;
  Vec<A> columns[kFewClasses];   // clearing them would take as long as the rest

  RowsInLanes(int64_t rows, int64_t columns_of_each) : count(rows), classes(columns_of_each) {}

  // Rows `stride` elements apart; a vector may read past a row as far as `end`.
  template <class T>
  void read(const T* x, int64_t stride, const T* end) {
    const T* last = x + (count - 1) * stride;
    for (int64_t first = 0; first < classes; first += kRows) {
      Vec<A> tile[kRows];
      if (count == kRows && end - last >= first + kRows) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) tile[r] = load(x + r * stride + first);
      } else {
        for (int r = 0; r < kRows; ++r) {
          const T* row = x + min_of(r, count - 1) * stride + first;
          tile[r] = end - row >= kRows ? load(row) : load_part(row, min_of(classes - first, kRows));
        }
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int k = 0; k < kRows; ++k) columns[first + k] = tile[k];
    }
  }

  // Contiguous rows. What a vector writes past its row, as far as `end`, the next one writes again: the last columns go
  // first.
  template <class T>
  void write(T* x, const T* end) const {
    T* last = x + (count - 1) * classes;
    for (int64_t first = (classes - 1) / kRows * kRows; first >= 0; first -= kRows) {
      Vec<A> tile[kRows];
#pragma GCC unroll 16
      for (int k = 0; k < kRows; ++k) tile[k] = columns[first + k];
      transpose(tile);
      if (count == kRows && end - last >= first + kRows) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store(x + r * classes + first, tile[r]);
      } else {
        for (int r = 0; r < count; ++r) {
          T* row = x + r * classes + first;
          end - row >= kRows ? store(row, tile[r]) : store_part(row, tile[r], min_of(classes - first, kRows));
        }
      }
    }
  }
};

// The targets of the rows in lanes, and the class weights of them.
template <class A>
struct TargetsInLanes {
  using Index = Mask<A>;
  using Class = __typeof__(+Index{}[0]);
  Index target;   // -1: the row does not count
  Vec<A> weight;

  template <class Args>
  TargetsInLanes(const Args& a, int64_t row, int64_t count) {
    const A* weights = static_cast<const A*>(a.weight);
    A picked[kLanes<A>];
    Class classes[kLanes<A>];
    for (int64_t r = 0; r < kLanes<A>; ++r) {
      const int64_t t = r < count ? a.target[row + r] : a.ignore_index;
      classes[r] = t == a.ignore_index ? -1 : Class(t);
    }
    target = load_bits<Index>(classes);
    weight = splat(A(1));
    if (!weights) return;
    for (int64_t r = 0; r < kLanes<A>; ++r) picked[r] = classes[r] < 0 ? 0 : weights[classes[r]];
    weight = load(picked);
  }

  Vec<A> keep(Vec<A> v) const { return target >= 0 ? v : Vec<A>{}; }   // 0 for rows that do not count
  Vec<A> at(int64_t c, Vec<A> v, Vec<A> elsewhere = Vec<A>{}) const { return target == Class(c) ? v : elsewhere; }
};

// As loss_row, for rows [row, row + count).
template <class T, class A = acc_t<T>>
void few_losses(const CrossEntropyArgs& a, int64_t row, int64_t count, A weight_sum) {
  const T* x = static_cast<const T*>(a.logits);
  RowsInLanes<A> logits(count, a.cols);
  logits.read(x + row * a.row_stride, a.row_stride, x + (a.rows - 1) * a.row_stride + a.cols);
  const TargetsInLanes<A> targets(a, row, count);
  Vec<A> top = LogSumExp<A>().peak, sum{}, at_target{};
  for (int64_t c = 0; c < a.cols; ++c) {
    top = max_of(logits.columns[c], top);
    at_target += targets.at(c, logits.columns[c]);
  }
  for (int64_t c = 0; c < a.cols; ++c) sum += exp_to_one(logits.columns[c] - top);
  const Vec<A> log_sum = log_from_one(sum);
  Vec<A> loss = A(1 - a.label_smoothing) * targets.weight * ((top - at_target) + log_sum);
  if (a.label_smoothing > 0) {
    const Vec<A> size = at_target < 0 ? -at_target : at_target, origin = size < A(kHuge) ? at_target : top;
    const A* weight = static_cast<const A*>(a.weight);
    Vec<A> shifted{};
    for (int64_t c = 0; c < a.cols; ++c) shifted += (logits.columns[c] - origin) * (weight ? weight[c] : A(1));
    loss += A(a.label_smoothing / double(a.cols)) * (weight_sum * ((top - origin) + log_sum) - shifted);
  }
  A *losses = static_cast<A*>(a.loss) + row, *lse = static_cast<A*>(a.lse) + 2 * row;
  store_part(losses, targets.keep(loss), count);
  A tops[kLanes<A>], logs[kLanes<A>];
  store(tops, targets.keep(top)), store(logs, targets.keep(log_sum));
  for (int64_t r = 0; r < count; ++r) lse[2 * r] = tops[r], lse[2 * r + 1] = logs[r];
}

// As loss_backward_row, for rows [row, row + count) of those up to `end` that this thread writes.
template <class T, class A = acc_t<T>>
void few_gradients(const CrossEntropyBackwardArgs& a, int64_t row, int64_t count, int64_t end, A weight_sum) {
  const T* x = static_cast<const T*>(a.logits);
  RowsInLanes<A> block(count, a.cols);
  block.read(x + row * a.row_stride, a.row_stride, x + (a.rows - 1) * a.row_stride + a.cols);
  const TargetsInLanes<A> targets(a, row, count);
  A tops[kLanes<A>] = {}, logs[kLanes<A>] = {}, above[kLanes<A>] = {};
  const A *lse = static_cast<const A*>(a.lse) + 2 * row, *grad_loss = static_cast<const A*>(a.grad_loss);
  for (int64_t r = 0; r < count; ++r) {
    tops[r] = lse[2 * r], logs[r] = lse[2 * r + 1];
    above[r] = grad_loss[(row + r) * a.grad_loss_stride];
  }
  const Vec<A> top = load(tops), log_total = load(logs), g = load(above) * A(a.grad_scale);
  const Vec<A> uniform = g * A(a.label_smoothing / double(a.cols));
  const Vec<A> picked = g * (A(1 - a.label_smoothing) * targets.weight), scale = picked + uniform * weight_sum;
  const A* weight = static_cast<const A*>(a.weight);
  Vec<A> at_target{};
  for (int64_t c = 0; c < a.cols; ++c) at_target += targets.at(c, block.columns[c]);
  at_target = scale * exp((at_target - top) - log_total) - picked;   // what cancels must be exact
  for (int64_t c = 0; c < a.cols; ++c) {
    Vec<A> d = targets.at(c, at_target, scale * exp_to_one((block.columns[c] - top) - log_total));
    if (a.label_smoothing > 0) d -= uniform * (weight ? weight[c] : A(1));
    block.columns[c] = targets.keep(d);
  }
  T* dx = static_cast<T*>(a.grad_logits);
  block.write(dx + row * a.cols, dx + end * a.cols);
}

}  // namespace
}  // namespace pyfast
