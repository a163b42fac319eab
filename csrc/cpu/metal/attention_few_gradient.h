// Gradients of the queries that attention takes by rows: their keys and values are read as they lie, too.
#pragma once

#include "attention_few.h"

namespace pyfast {
namespace {

template <class A> constexpr int64_t kRunKeys = kLineKeys + kLanes<A>;   // dot_keys() may write a vector more

// Queries taken together, of one head; those that are not there are 0 and have an infinite lse.
struct RowGroup {
  int64_t head, query, queries, slot;   // slot: of the first, among all of a worker
};

template <class A>
struct RowBuffers {
  A *scaled, *q, *dout, *dq;   // a row each slot
  A *lse, *delta, *p, *dp;
  int64_t wide, wide_value;

  RowBuffers(Carver& c, const AttentionArgs& a, int64_t slots)
      : scaled(c.take<A>(slots * whole(a.size))), q(c.take<A>(slots * whole(a.size))),
        dout(c.take<A>(slots * whole(a.value_size))), dq(c.take<A>(slots * whole(a.size))), lse(c.take<A>(slots)),
        delta(c.take<A>(slots)), p(c.take<A>(kTogether<A> * kRunKeys<A>)), dp(c.take<A>(kTogether<A> * kRunKeys<A>)),
        wide(whole(a.size)), wide_value(whole(a.value_size)) {}

  static int64_t whole(int64_t features) { return round_up(features, kLanes<A>); }
};

// Slots of `queries` queries of a head: three take four.
template <class A>
int64_t slots_of(int64_t queries) {
  return queries + (kTogether<A> == 4 && queries % 4 == 3);
}

// Of the queries from `query` on of all heads of a group.
template <class A>
int64_t slots_of_group(const AttentionArgs& a, int64_t query) {
  return a.heads / a.kv_heads * slots_of<A>(a.queries - query);
}

// f(RowGroup) for the queries from `query` on of all heads of a group.
template <class A, class F>
void each_row_group(const AttentionArgs& a, int64_t kv_head, int64_t query, const F& f) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t slot = 0;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t i = query, count; i < a.queries; i += count, slot += slots_of<A>(count)) {
      count = taken_together<A>(a.queries - i);
      f(RowGroup{h, i, count, slot});
    }
}

// delta = dO . O is added up as dP is: a query that sees one key has dP - delta of exactly 0.
template <class T, class A>
void load_rows(const AttentionBackwardArgs& g, int64_t b, const RowGroup& group, const RowBuffers<A>& own) {
  const AttentionArgs& a = g.forward;
  for (int64_t i = 0; i < slots_of<A>(group.queries); ++i) {
    const int64_t slot = group.slot + i, query = group.query + i;
    A *scaled = own.scaled + slot * own.wide, *q = own.q + slot * own.wide, *dout = own.dout + slot * own.wide_value;
    __builtin_memset(own.dq + slot * own.wide, 0, size_t(own.wide) * sizeof(A));
    if (i >= group.queries) {
      for (A* row : {scaled, q}) __builtin_memset(row, 0, size_t(own.wide) * sizeof(A));
      __builtin_memset(dout, 0, size_t(own.wide_value) * sizeof(A));
      own.lse[slot] = A(__builtin_inf()), own.delta[slot] = 0;
      continue;
    }
    const T* from = at<const T>(a.q, b, group.head, query);
    sweep<A>(a.size, [&](auto lanes, int64_t j) {
      const Vec<A> x = lanes.load(from + j);
      store(q + j, x), store(scaled + j, x * A(a.scale));
    });
    from = at<const T>(g.grad_out, b, group.head, query);
    sweep<A>(a.value_size, [&](auto lanes, int64_t j) { store(dout + j, lanes.load(from + j)); });
    own.lse[slot] = static_cast<const A*>(a.lse)[(b * a.heads + group.head) * a.queries + query];
    dot_keys<1>(dout, 0, at<const T>(a.out, b, group.head, query), 0, 1, a.value_size, own.p, 0);
    own.delta[slot] = own.p[0];
  }
}

// lines[key] (+)= sum over queries of weight[query][key] row[query], kVectors vectors of them.
template <int64_t kQueries, int64_t kVectors, class A>
void add_part(const A* weight, const A* rows, int64_t row_stride, int64_t keys, A* lines, bool accumulate) {
  constexpr int64_t n = kLanes<A>;
  Vec<A> row[kQueries][kVectors];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) row[i][j] = load(rows + i * row_stride + j * n);
  for (int64_t key = 0; key < keys; ++key, lines += kLine<A>)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
      Vec<A> sum = accumulate ? load(lines + j * n) : Vec<A>{};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kQueries; ++i) sum += splat(weight[i * kRunKeys<A> + key]) * row[i][j];
      store(lines + j * n, sum);
    }
}
template <int64_t kQueries, class A>
void add_to_lines(const A* weight, const A* rows, int64_t row_stride, int64_t keys, int64_t size, A* lines,
                  bool accumulate) {
  constexpr int64_t n = kLanes<A>, kVectors = kQueries == 1 || kVectorBytes == 64 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVectors * n <= size; d += kVectors * n)
    add_part<kQueries, kVectors>(weight, rows + d, row_stride, keys, lines + d, accumulate);
  for (; d < size; d += n) add_part<kQueries, 1>(weight, rows + d, row_stride, keys, lines + d, accumulate);
}

// In place of s and dp of a query against `keys` keys, of which it sees some: P and dS = P (dP - delta).
template <class A>
void row_gradient(A* s, A* dp, int64_t keys, int64_t seen, A lse, A delta) {
  sweep<A>(seen, [&](auto lanes, int64_t j) {
    const Vec<A> t = lanes.load(s + j) - lse, p = exp2(min_of(Vec<A>{}, t), A(kLog2e));   // a NaN stays
    lanes.store(s + j, p);
    lanes.store(dp + j, p * (lanes.load(dp + j) - delta));
  });
  for (int64_t j = seen; j < keys; ++j) s[j] = dp[j] = 0;
}

// Queries taken together against at most kLineKeys keys: the gradients of the keys, and of the queries.
template <int64_t kQueries, class T, class A>
void rows_gradient(const AttentionBackwardArgs& g, const RowGroup& group, int64_t b, int64_t key, int64_t keys,
                   const RowBuffers<A>& own, A* dk, A* dv, bool first) {
  const AttentionArgs& a = g.forward;
  const int64_t kv_head = group.head / (a.heads / a.kv_heads), slot = group.slot;
  const T *k = at<const T>(a.k, b, kv_head, key), *v = at<const T>(a.v, b, kv_head, key);
  const A *q = own.q + slot * own.wide, *dout = own.dout + slot * own.wide_value;
  dot_keys<kQueries>(own.scaled + slot * own.wide, own.wide, k, a.k.time, keys, a.size, own.p, kRunKeys<A>);
  dot_keys<kQueries>(dout, own.wide_value, v, a.v.time, keys, a.value_size, own.dp, kRunKeys<A>);
  for (int64_t i = 0; i < kQueries; ++i) {
    A* s = own.p + i * kRunKeys<A>;
    const int64_t query = group.query + i, last = i < group.queries ? key + keys : key;
    const int64_t seen = seen_by(a, {b, group.head, query, 1, key, 0}, key, last);
    add_mask<T>(a, {b, group.head, query, 1, key, seen}, s);
    row_gradient(s, own.dp + i * kRunKeys<A>, keys, seen, own.lse[slot + i], own.delta[slot + i]);
  }
  add_to_lines<kQueries>(own.p, dout, own.wide_value, keys, a.value_size, dv, !first);
  add_to_lines<kQueries>(own.dp, q, own.wide, keys, a.size, dk, !first);
  add_values<kQueries>(own.dp, kRunKeys<A>, k, a.k.time, keys, a.size, own.dq + slot * own.wide, own.wide, true);
}

template <class T, class A>
void rows_gradient(const AttentionBackwardArgs& g, const RowGroup& group, int64_t b, int64_t key, int64_t keys,
                   const RowBuffers<A>& own, A* dk, A* dv, bool first) {
  if (group.queries == 1) rows_gradient<1, T>(g, group, b, key, keys, own, dk, dv, first);
  else if (group.queries == 2) rows_gradient<2, T>(g, group, b, key, keys, own, dk, dv, first);
  else rows_gradient<kTogether<A>, T>(g, group, b, key, keys, own, dk, dv, first);
}

}  // namespace
}  // namespace pyfast
