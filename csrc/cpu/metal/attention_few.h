// Products of a few queries by rows, keys and values read as they lie. Scores add up in one order, forward and
// backward: of large ones another order would lose the digits that their difference to the log-sum-exp has.
#pragma once

#include "attention_strips.h"

namespace pyfast {
namespace {

constexpr int64_t kRowQueries = 12;   // of a head, that make no strip

// Queries that read a key together: more, and their sums would not fit into registers.
template <class A> constexpr int64_t kTogether = min_of(4, kLanes<A>);
template <class A>
int64_t taken_together(int64_t queries) {
  return queries < 3 ? min_of(2, queries) : min_of(kTogether<A>, queries);
}

// The first queries of a head, in whole strips or one that is all but full; the others are taken by rows, in a strip
// of few lanes they would take longer.
template <class A>
int64_t queries_in_strips(const AttentionArgs& a) {
  const int64_t rest = a.queries % kLanes<A>, rows = rest <= kLanes<A> * 3 / 4 ? rest : 0;
  return a.queries <= kRowQueries ? 0 : a.queries - rows;
}

// s[i][key] = q[i] . k[key] for kQueries queries, `stride` apart in q, and as many keys at a time as fill a vector with
// the products: these are added up across lanes together. May write a vector more than `keys`.
template <int64_t kQueries, class T, class A>
void dot_keys(const A* q, int64_t q_stride, const T* k, int64_t stride, int64_t keys, int64_t size, A* s,
              int64_t s_stride) {
  constexpr int64_t n = kLanes<A>, kKeys = n / kQueries;
  for (int64_t key = 0; key < keys; key += kKeys) {
    Vec<A> sum[n] = {};
    const T* row[kKeys];
    for (int64_t j = 0; j < kKeys; ++j) row[j] = k + min_of(key + j, keys - 1) * stride;
    if constexpr (kQueries == 1) {   // row by row, as they lie in memory
      for (int64_t j = 0; j < kKeys; ++j)
        sweep<A>(size, [&](auto lanes, int64_t d) { sum[j] += lanes.load(q + d) * lanes.load(row[j] + d); });
    } else {
      sweep<A>(size, [&](auto lanes, int64_t d) {
        Vec<A> of_key[kKeys];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kKeys; ++j) of_key[j] = lanes.load(row[j] + d);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kQueries; ++i) {
          const Vec<A> of_query = lanes.load(q + i * q_stride + d);
#pragma GCC unroll 16
          for (int64_t j = 0; j < kKeys; ++j) sum[i * kKeys + j] += of_query * of_key[j];
        }
      });
    }
    alignas(64) A sums[n];
    store(sums, sum_each(sum));
    for (int64_t i = 0; i < kQueries; ++i)
      __builtin_memcpy(s + i * s_stride + key, sums + i * kKeys, sizeof(A) * kKeys);
  }
}

// out[i] (+)= sum over keys of p[i][key] v[key].
template <int64_t kQueries, class T, class A>
void add_values(const A* p, int64_t p_stride, const T* v, int64_t stride, int64_t keys, int64_t size, A* out,
                int64_t out_stride, bool accumulate) {
  constexpr int64_t n = kLanes<A>, kVectors = kQueries == 1 || kVectorBytes == 64 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVectors * n <= size; d += kVectors * n) {
    Vec<A> sum[kQueries][kVectors];
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = accumulate ? load(out + i * out_stride + d + j * n) : Vec<A>{};
    for (int64_t key = 0; key < keys; ++key) {
      Vec<A> value[kVectors];
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) value[j] = load(v + key * stride + d + j * n);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kQueries; ++i) {
        const Vec<A> weight = splat(p[i * p_stride + key]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) sum[i][j] += weight * value[j];
      }
    }
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t j = 0; j < kVectors; ++j) store(out + i * out_stride + d + j * n, sum[i][j]);
  }
  sweep<A>(size - d, [&](auto lanes, int64_t j) {
    Vec<A> sum[kQueries];
    for (int64_t i = 0; i < kQueries; ++i)
      sum[i] = accumulate ? lanes.load(out + i * out_stride + d + j) : Vec<A>{};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec<A> value = lanes.load(v + key * stride + d + j);
      for (int64_t i = 0; i < kQueries; ++i) sum[i] += p[i * p_stride + key] * value;
    }
    for (int64_t i = 0; i < kQueries; ++i) lanes.store(out + i * out_stride + d + j, sum[i]);
  });
}

template <class T, class A>
void add_mask(const AttentionArgs& a, const Tile& t, A* s) {
  const AttentionMask& m = a.mask;
  const int64_t at = t.batch * m.batch + t.head * m.head + t.query * m.query + t.key * m.key;
  const auto add = [&](const auto* mask) {
    for (int64_t key = 0; key < t.keys; ++key) s[key] += A(load_one(mask + at + key * m.key));
  };
  if (m.kind == MaskKind::boolean) add(static_cast<const Flag*>(m.data));
  else if (m.kind == MaskKind::float32) add(static_cast<const float*>(m.data));
  else if (m.kind == MaskKind::same) add(static_cast<const T*>(m.data));
}

}  // namespace
}  // namespace pyfast
