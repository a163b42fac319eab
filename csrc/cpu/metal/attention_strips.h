// Products of a few queries, a strip: the lanes of one vector. Keys and values are bound to be read once, so they are
// not packed: a few rows at a time are copied, widened, to where they do not compete for the same cache lines, and
// their elements are broadcast from there.
#pragma once

#include "attention_scores.h"

namespace pyfast {
namespace {

// A tile of kRows x kCols; kRows sums hide the latency of a multiply-add.
template <class A>
struct StripCore {
  using Elem = A;
  using Acc = A;
  static constexpr int64_t kCols = kLanes<A>, kRows = max_of(8, kCols), kDepth = 1;

  // c[kRows][kCols] (+)= sum over k of a(row, k) b[k][kCols], each with its strides.
  template <int64_t kRowStride, int64_t kDepthStride>
  static void multiply(int64_t depth, const A* a, const A* b, int64_t b_stride, A* c, int64_t c_stride,
                       bool accumulate) {
    Vec<A> sum[kRows] = {};
    for (int64_t k = 0; k < depth; ++k, a += kDepthStride, b += b_stride) {
      const Vec<A> lanes = load(b);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) sum[r] += splat(a[r * kRowStride]) * lanes;
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      A* to = c + r * c_stride;
      store(to, accumulate ? load(to) + sum[r] : sum[r]);
    }
  }
};

constexpr int64_t kLineKeys = 32;   // copied at a time
// Elements from one copied row to the next: the longest, and a cache line more.
template <class A> constexpr int64_t kLine = 256 + 64 / int64_t(sizeof(A));

// `count` rows, each of them a line; those that follow are fetched meanwhile.
template <class A, class T>
void copy_lines(A* lines, const T* from, int64_t stride, int64_t count, int64_t features) {
  for (int64_t i = 0; i < count; ++i, lines += kLine<A>, from += stride)
    sweep<A>(features, [&](auto lanes, int64_t j) {
      if (j * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(from + kLineKeys * stride + j);
      store(lines + j, lanes.load(from + j));
    });
}

// The strips of the first `queries` queries of the heads that share a key head: `which` counts them head by head.
template <class A>
Tile strip_of(const AttentionArgs& a, int64_t queries, int64_t b, int64_t kv_head, int64_t which) {
  constexpr int64_t n = kLanes<A>;
  const int64_t in_head = ceil_div(queries, n), query = which % in_head * n;
  return {b, kv_head * (a.heads / a.kv_heads) + which / in_head, query, min_of(n, queries - query), 0, 0};
}
template <class A>
int64_t strip_count(const AttentionArgs& a, int64_t queries) {
  return a.heads / a.kv_heads * ceil_div(queries, kLanes<A>);
}

// Of the keys from `first` to `last`, those that a strip sees at all.
inline int64_t seen_by(const AttentionArgs& a, const Tile& t, int64_t first, int64_t last) {
  return max_of(0, (a.causal ? min_of(last, t.query + t.queries) : last) - first);
}

// ---- the forward pass ----------------------------------------------------------------------------
constexpr int64_t kStripsAtOnce = 4;   // past the same keys

template <class A>
struct StripBuffers {
  A *q, *scores, *out, *lines, *bias;

  StripBuffers(Carver& c, const AttentionArgs& a, int64_t keys)
      : q(c.take<A>(kStripsAtOnce * q_size(a))), scores(c.take<A>(kStripsAtOnce * scores_size(keys))),
        out(c.take<A>(kStripsAtOnce * out_size(a))), lines(c.take<A>(kLineKeys * kLine<A>)),
        bias(c.take<A>(a.mask.kind == MaskKind::none ? 0 : keys * kLanes<A>)) {}

  static int64_t q_size(const AttentionArgs& a) { return a.size * kLanes<A>; }
  static int64_t scores_size(int64_t keys) { return round_up(keys, kLineKeys) * kLanes<A>; }
  static int64_t out_size(const AttentionArgs& a) {
    return round_up(a.value_size, StripCore<A>::kRows) * kLanes<A>;
  }
};

// partial = [peak, total, sum of e^(s - peak) v] of every query of some strips against a run of keys.
template <class T, class A>
void partial_strips(const AttentionArgs& a, Tile* strips, int64_t count, int64_t first, int64_t last, A* partials,
                    int64_t stride, const StripBuffers<A>& own) {
  using Core = StripCore<A>;
  constexpr int64_t n = Core::kCols, R = Core::kRows;
  const int64_t b = strips[0].batch, kv_head = strips[0].head / (a.heads / a.kv_heads);
  const int64_t scores_size = own.scores_size(last - first);
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    Tile& t = strips[i];
    t.key = first, t.keys = seen_by(a, t, first, last), most = max_of(most, t.keys);
    pack_heads<Core, false, false>(a.dtype, own.q + i * own.q_size(a), a.q, b, t.head, t.query, t.queries, a.size);
  }
  for (int64_t key = 0; key < most; key += kLineKeys) {
    copy_lines(own.lines, at<const T>(a.k, b, kv_head, first + key), a.k.time, min_of(kLineKeys, most - key), a.size);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < min_of(kLineKeys, strips[i].keys - key); r += R)
        Core::template multiply<kLine<A>, 1>(a.size, own.lines + r * kLine<A>, own.q + i * own.q_size(a), n,
                                             own.scores + i * scores_size + (key + r) * n, n, false);
  }
  alignas(64) A peak[kStripsAtOnce][n], total[kStripsAtOnce][n], one[n];
  for (A& x : one) x = 1;
  for (int64_t i = 0; i < count; ++i) {
    A* s = own.scores + i * scores_size;
    const A factor = apply_masks<Core>(a, strips[i], s, own.bias);
    Vec<A> highest = splat(-A(__builtin_inf()));
    store(total[i], exponentials<n>(s, strips[i].keys, A(factor * kLog2e), highest));
    store(peak[i], highest * factor);
  }
  __builtin_memset(own.out, 0, size_t(count * own.out_size(a)) * sizeof(A));
  for (int64_t key = 0; key < most; key += kLineKeys) {
    const int64_t keys = min_of(kLineKeys, most - key);
    copy_lines(own.lines, at<const T>(a.v, b, kv_head, first + key), a.v.time, keys, a.value_size);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < a.value_size; j += R)
        Core::template multiply<1, kLine<A>>(min_of(keys, strips[i].keys - key), own.lines + j,
                                             own.scores + i * scores_size + key * n, n,
                                             own.out + i * own.out_size(a) + j * n, n, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Tile& t = strips[i];
    A* to = partials + ((b * a.heads + t.head) * a.queries + t.query) * stride;
    store_transposed<Core>(own.out + i * own.out_size(a), one, to + 2, stride, t.queries, a.value_size);
    for (int64_t lane = 0; lane < t.queries; ++lane, to += stride) to[0] = peak[i][lane], to[1] = total[i][lane];
  }
}

// The first `queries` queries of all heads of a group against a run of keys.
template <class T, class A>
void partial_group_of_strips(const AttentionArgs& a, int64_t queries, int64_t b, int64_t kv_head, int64_t split,
                             int64_t splits) {
  const int64_t first = split * a.keys / splits, last = (split + 1) * a.keys / splits;
  const int64_t all = strip_count<A>(a, queries);
  const auto own = carve<StripBuffers<A>>(a, last - first);
  A* partials = static_cast<A*>(a.partials) + split * (a.value_size + 2);
  for (int64_t done = 0; done < all; done += kStripsAtOnce) {
    const int64_t count = min_of(kStripsAtOnce, all - done);
    Tile strips[kStripsAtOnce];
    for (int64_t i = 0; i < count; ++i) strips[i] = strip_of<A>(a, queries, b, kv_head, done + i);
    partial_strips<T>(a, strips, count, first, last, partials, splits * (a.value_size + 2), own);
  }
}

}  // namespace
}  // namespace pyfast
