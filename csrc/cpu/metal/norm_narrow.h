// layer_norm and rms_norm of narrow rows: as many rows as a vector has lanes go together, so that the sums across
// lanes, the divisions and the roots of all are taken at once. A row at a time, these take longer than its columns.
#pragma once

#include "norm_stores.h"

namespace pyfast {
namespace {

constexpr int64_t kNarrow = 512;   // columns at most: with those of 768 the rows of a group leave the first-level cache
constexpr int kPair = 2;           // rows that share the loads of weight and bias

// The rows of one group in the accumulator type, `stride` apart: where they are, or in a buffer.
template <class A>
struct Group {
  const A* rows;
  int64_t stride;
};

// Rows [first, first + count) of x + residual (if any), and the sum (kCentre) or the sum of squares of each. What is
// normalised is the sum as stored, rounded to T.
template <bool kCentre, class T, class A>
inline Group<A> read_group(const NormArgs& a, int64_t first, int64_t count, A* buffer, Vec<A>& totals) {
  const int64_t n = a.cols, at = first * n, stride = round_up(n, kLanes<A>);
  const T *x = static_cast<const T*>(a.x) + at, *residual = static_cast<const T*>(a.residual) + (a.residual ? at : 0);
  T* sum = static_cast<T*>(a.sum) + (a.residual ? at : 0);
  const bool in_place = sizeof(T) == sizeof(A) && stride == n && !streams<T>(a);
  Vec<A> sums[kLanes<A>] = {};
  for (int64_t r = 0; r < count; ++r) {
    Vec<A> total{};
    sweep<A>(n, [&](auto lanes, int64_t i) {
      const int64_t j = r * n + i;
      Vec<A> v = lanes.load(x + j);
      if (a.residual) v = stored<A>(lanes, sum + j, v + lanes.load(residual + j), streams<T>(a));
      if (!in_place) store(buffer + r * stride + i, v);
      total += kCentre ? v : v * v;
    });
    sums[r] = total;
  }
  totals = sum_each(sums);
  if constexpr (sizeof(T) == sizeof(A)) {
    if (in_place) return {a.residual ? sum : x, n};
  }
  return {buffer, stride};
}

// out = (x - mean) rstd weight + bias for kRows rows of a group.
template <bool kCentre, int kRows, class T, class A>
inline void scale_rows(const NormArgs& a, const Group<A>& group, int64_t first, int64_t r, const A* mean, const A* rstd,
                       const A* weight, const A* bias) {
  const A* x = group.rows + r * group.stride;
  T* out = static_cast<T*>(a.out) + (first + r) * a.cols;
  // The next group: reading it ends where a page does unless asked to go on.
  const int64_t next = (first + r + kLanes<A>) * a.cols;
  const T* x_next = static_cast<const T*>(a.x) + next;
  const T* residual_next = static_cast<const T*>(a.residual) + (a.residual ? next : 0);
  sweep<A>(a.cols, [&](auto lanes, int64_t i) {
    const Vec<A> w = lanes.load(weight + i), b = kCentre ? lanes.load(bias + i) : Vec<A>{};
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      __builtin_prefetch(x_next + k * a.cols + i, 0, 2);
      if (a.residual) __builtin_prefetch(residual_next + k * a.cols + i, 0, 2);
      const Vec<A> v = lanes.load(x + k * group.stride + i);
      const Vec<A> y = kCentre ? (v - mean[r + k]) * rstd[r + k] * w + b : v * rstd[r + k] * w;
      streams<T>(a) ? stream(lanes, out + k * a.cols + i, y) : lanes.store(out + k * a.cols + i, y);
    }
  });
}

// As norm_rows, for rows [first, first + count), at most kLanes<A> of them.
template <bool kCentre, class T, class A = acc_t<T>>
void norm_group(const NormArgs& a, int64_t first, int64_t count, A* buffer, const A* weight, const A* bias) {
  const int64_t n = a.cols;
  Vec<A> totals;
  const Group<A> group = read_group<kCentre, T>(a, first, count, buffer, totals);
  A mean[kLanes<A>], rstd[kLanes<A>];
  if constexpr (kCentre) {
    const Vec<A> means = totals / A(n);
    store(mean, means);
    store_part(static_cast<A*>(a.mean) + first, means, count);
    Vec<A> squares[kLanes<A>] = {};
    for (int64_t r = 0; r < count; ++r) {
      Vec<A> total{};
      sweep<A>(n, [&](auto lanes, int64_t i) {
        const Vec<A> d = lanes.keep(lanes.load(group.rows + r * group.stride + i) - mean[r], 0);
        total += d * d;
      });
      squares[r] = total;
    }
    totals = sum_each(squares);
  }
  const Vec<A> scales = A(1) / sqrt(totals / A(n) + A(a.eps));
  store(rstd, scales);
  store_part(static_cast<A*>(a.rstd) + first, scales, count);
  int64_t r = 0;
  for (; r + kPair <= count; r += kPair)
    scale_rows<kCentre, kPair, T>(a, group, first, r, mean, rstd, weight, bias);
  for (; r < count; ++r) scale_rows<kCentre, 1, T>(a, group, first, r, mean, rstd, weight, bias);
}

// Rows of a group in the backward: as many as have their sums in one vector.
template <bool kCentre, class A> constexpr int64_t kGroupBackward = kLanes<A> / (kCentre ? 2 : 1);

// As backward_rows, for rows [first, first + count), at most kGroupBackward of them.
template <bool kCentre, bool kSum, class T, class A = acc_t<T>>
void backward_group(const NormBackwardArgs& a, int64_t first, int64_t count, const A* weight, A* dweight, A* dbias) {
  const int64_t n = a.cols, at = first * n;
  const T *dy = static_cast<const T*>(a.grad_out) + at, *x = static_cast<const T*>(a.x) + at;
  const T* dsum = static_cast<const T*>(a.grad_sum) + (kSum ? at : 0);
  T* dx = static_cast<T*>(a.grad_x) + at;
  const A *mean = static_cast<const A*>(a.mean) + (kCentre ? first : 0), *rstd = static_cast<const A*>(a.rstd) + first;
  constexpr int64_t kRows = kGroupBackward<kCentre, A>;
  Vec<A> sums[kLanes<A>] = {};   // of g xhat without rstd; and with kCentre, from kRows on, of g
  for (int64_t r = 0; r < count; ++r) {
    Vec<A> g_sum{}, gx_sum{};
    sweep<A>(n, [&](auto lanes, int64_t i) {
      const Vec<A> g = lanes.load(dy + r * n + i) * lanes.load(weight + i), v = lanes.load(x + r * n + i);
      if (kCentre) g_sum += g;
      gx_sum += g * (kCentre ? v - mean[r] : v);   // a lane past the row has g = 0
    });
    sums[r] = gx_sum;
    if (kCentre) sums[kRows + r] = g_sum;
  }
  A gx_mean[kLanes<A>];
  const A* g_mean = gx_mean + kRows;
  store(gx_mean, sum_each(sums) / A(n));
  for (int64_t r = 0; r < count; ++r) gx_mean[r] *= rstd[r];
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> w = lanes.load(weight + i);
    Vec<A> dw = lanes.load(dweight + i), db = kCentre ? lanes.load(dbias + i) : Vec<A>{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t j = r * n + i;
      __builtin_prefetch(dy + j + kRows * n, 0, 2), __builtin_prefetch(x + j + kRows * n, 0, 2);
      const Vec<A> d = lanes.load(dy + j), v = lanes.load(x + j);
      const Vec<A> xhat = kCentre ? (v - mean[r]) * rstd[r] : v * rstd[r];
      Vec<A> g = d * w - xhat * gx_mean[r];
      if (kCentre) g -= g_mean[r];
      dw += d * xhat;
      db += d;
      const Vec<A> gradient = kSum ? g * rstd[r] + lanes.load(dsum + j) : g * rstd[r];
      streams<T>(a) ? stream(lanes, dx + j, gradient) : lanes.store(dx + j, gradient);
    }
    lanes.store(dweight + i, dw);
    if (kCentre) lanes.store(dbias + i, db);
  });
}

}  // namespace
}  // namespace pyfast
