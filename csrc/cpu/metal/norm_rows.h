// layer_norm (kCentre: the mean is taken away first) and rms_norm, row by row. A row is read from memory once
// and stays in the first-level cache for the passes that follow.
#pragma once

#include "norm_stores.h"

namespace pyfast {
namespace {

constexpr int kSums = 4;           // running sums per row: an addition takes 4 cycles, one can start every cycle
constexpr int kRowsAtOnce = 2;     // backward: column sums are loaded and stored once per so many rows; 4 leave L1
constexpr int64_t kMostTogether = 2048;   // forward: columns up to which two rows and their results stay in L1

// f(lanes, i, k) as sweep() does it, k = 0 .. kSums - 1 in turn.
template <class A, class F>
inline __attribute__((always_inline)) void sweep_sums(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kSums * kLanes<A> <= n; i += kSums * kLanes<A>) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) f(Whole<A>{}, i + k * kLanes<A>, k);
  }
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(Whole<A>{}, i, 0);
  if (i < n) f(Part<A>{n - i}, i, 0);
}

template <class A>
inline A sum_of(const Vec<A> (&sums)[kSums]) {
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of x + residual (if any) as the accumulator type, and the sum (kCentre) or sum of squares of each. What is
// normalised is the sum as stored, rounded to T. `rows` tells where they are: in `buffer`, or in place.
template <bool kCentre, int kRows, class T, class A>
inline void read_rows(const NormArgs& a, int64_t at, A* buffer, const A* (&rows)[kRows], A (&totals)[kRows]) {
  const int64_t n = a.cols;
  const T *x = static_cast<const T*>(a.x) + at, *residual = static_cast<const T*>(a.residual) + (a.residual ? at : 0);
  T* sum = static_cast<T*>(a.sum) + (a.residual ? at : 0);
  Vec<A> sums[kRows][kSums] = {};
  const auto count = [&](auto lanes, int64_t i, int r, int k, Vec<A> v) {
    if (sizeof(T) != sizeof(A) || streams<T>(a)) lanes.store(buffer + r * n + i, v);
    sums[r][k] += kCentre ? v : v * v;
  };
  if (a.residual) {
    sweep_sums<A>(n, [&](auto lanes, int64_t i, int k) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const int64_t j = r * n + i;
        count(lanes, i, r, k, stored<A>(lanes, sum + j, lanes.load(x + j) + lanes.load(residual + j), streams<T>(a)));
      }
    });
  } else {
    sweep_sums<A>(n, [&](auto lanes, int64_t i, int k) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) count(lanes, i, r, k, lanes.load(x + r * n + i));
    });
  }
  for (int r = 0; r < kRows; ++r) {
    totals[r] = sum_of<A>(sums[r]);
    if constexpr (sizeof(T) != sizeof(A)) rows[r] = buffer + r * n;
    else rows[r] = (streams<T>(a) ? buffer : a.residual ? sum : x) + r * n;
  }
}

// Rows [first, first + kRows), side by side: what one waits for, the other has work for. Mean and variance by the
// two-pass formula: the difference of two large sums would lose the digits.
template <bool kCentre, int kRows, class T, class A = acc_t<T>>
void norm_rows(const NormArgs& a, int64_t first, A* buffer, const A* weight, const A* bias) {
  const int64_t n = a.cols;
  A totals[kRows], mean[kRows] = {}, rstd[kRows];
  const A* x[kRows];
  read_rows<kCentre, kRows, T>(a, first * n, buffer, x, totals);
  if constexpr (kCentre) {
    Vec<A> squares[kRows][kSums] = {};
    for (int r = 0; r < kRows; ++r) static_cast<A*>(a.mean)[first + r] = mean[r] = totals[r] / A(n);
    sweep_sums<A>(n, [&](auto lanes, int64_t i, int k) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> d = lanes.keep(lanes.load(x[r] + i) - mean[r], 0);
        squares[r][k] += d * d;
      }
    });
    for (int r = 0; r < kRows; ++r) totals[r] = sum_of<A>(squares[r]);
  }
  for (int r = 0; r < kRows; ++r)
    static_cast<A*>(a.rstd)[first + r] = rstd[r] = 1 / A(__builtin_sqrt(totals[r] / A(n) + A(a.eps)));
  T* out = static_cast<T*>(a.out) + first * n;
  // The rows that follow: reading them ends where a page does unless asked to go on.
  const T* x_next = static_cast<const T*>(a.x) + (first + kRows) * n;
  const T* residual_next = static_cast<const T*>(a.residual) + (a.residual ? (first + kRows) * n : 0);
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> w = lanes.load(weight + i), b = kCentre ? lanes.load(bias + i) : Vec<A>{};
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(x_next + r * n + i, 0, 2);
      if (a.residual) __builtin_prefetch(residual_next + r * n + i, 0, 2);
      const Vec<A> v = lanes.load(x[r] + i);
      const Vec<A> scaled = (kCentre ? (v - mean[r]) * rstd[r] : v * rstd[r]) * w;
      const Vec<A> y = kCentre ? scaled + b : scaled;
      streams<T>(a) ? stream(lanes, out + r * n + i, y) : lanes.store(out + r * n + i, y);
    }
  });
}

// What the gradient of one row needs to know.
template <class A>
struct RowGradient {
  A mean, rstd;
  A g_mean, gx_mean;   // means over the row of g and of g xhat
};

// xhat = (x - mean) rstd, without mean in rms_norm; g = grad_out * weight.
template <bool kCentre, class T, class A>
inline RowGradient<A> row_gradient(const NormBackwardArgs& a, int64_t row, const A* weight) {
  const int64_t n = a.cols, at = row * n;
  const T *dy = static_cast<const T*>(a.grad_out) + at, *x = static_cast<const T*>(a.x) + at;
  const A mean = kCentre ? static_cast<const A*>(a.mean)[row] : 0, rstd = static_cast<const A*>(a.rstd)[row];
  Vec<A> g_sums[kSums] = {}, gx_sums[kSums] = {};
  sweep_sums<A>(n, [&](auto lanes, int64_t i, int k) {
    const Vec<A> g = lanes.load(dy + i) * lanes.load(weight + i);
    if (kCentre) g_sums[k] += g;
    gx_sums[k] += g * (kCentre ? lanes.load(x + i) - mean : lanes.load(x + i));   // a lane past the row has g = 0
  });
  return {mean, rstd, sum_of<A>(g_sums) / A(n), sum_of<A>(gx_sums) * rstd / A(n)};
}

// grad_x = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum (no mean(g) in rms_norm);
// grad_weight += grad_out xhat; grad_bias += grad_out: for rows [first, first + kRows), a column at a time.
template <bool kCentre, int kRows, bool kSum, class T, class A = acc_t<T>>
void backward_rows(const NormBackwardArgs& a, int64_t first, const A* weight, A* dweight, A* dbias) {
  const int64_t n = a.cols, at = first * n;
  RowGradient<A> rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = row_gradient<kCentre, T, A>(a, first + r, weight);
  const T *dy = static_cast<const T*>(a.grad_out) + at, *x = static_cast<const T*>(a.x) + at;
  const T* dsum = static_cast<const T*>(a.grad_sum) + (kSum ? at : 0);
  T* dx = static_cast<T*>(a.grad_x) + at;
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> w = lanes.load(weight + i);
    Vec<A> dw = lanes.load(dweight + i), db = kCentre ? lanes.load(dbias + i) : Vec<A>{};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t j = r * n + i;
      __builtin_prefetch(dy + j + kRows * n), __builtin_prefetch(x + j + kRows * n);   // the next rows
      const Vec<A> d = lanes.load(dy + j), v = lanes.load(x + j);
      const Vec<A> xhat = kCentre ? (v - rows[r].mean) * rows[r].rstd : v * rows[r].rstd;
      Vec<A> g = d * w - xhat * rows[r].gx_mean;
      if (kCentre) g -= rows[r].g_mean;
      dw += d * xhat;
      db += d;
      const Vec<A> gradient = kSum ? g * rows[r].rstd + lanes.load(dsum + j) : g * rows[r].rstd;
      streams<T>(a) ? stream(lanes, dx + j, gradient) : lanes.store(dx + j, gradient);
    }
    lanes.store(dweight + i, dw);
    if (kCentre) lanes.store(dbias + i, db);
  });
}

}  // namespace
}  // namespace pyfast
