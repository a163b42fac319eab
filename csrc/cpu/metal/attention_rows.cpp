// Attention of a few queries, as in decoding: bound by reading keys and values, so nothing is packed.
// A worker reads a run of keys of one key head for all queries that use it; the runs are merged in order.
#include "attention_few.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 1 << 15;   // keys and values read by a thread at least

// kQueries queries of one head, or the t.queries there are of them, against a run of keys: partial = [peak, total, sum
// of e^(s - peak) v].
template <int64_t kQueries, class T, class A>
void partial_rows(const AttentionArgs& a, const Tile& t, A* partial, int64_t stride) {
  const int64_t kv_head = t.head / (a.heads / a.kv_heads), wide = round_up(a.size, kLanes<A>);
  const int64_t run = round_up(t.keys + kLanes<A>, kLanes<A>), last = t.key + t.keys;
  A *q = scratch<A>(0, kQueries * wide), *s = scratch<A>(1, kQueries * run);
  const A factor = A(a.scale), inf = A(__builtin_inf());
  for (int64_t i = 0; i < kQueries; ++i) {   // a query that is not there is the last once more
    const T* from = at<const T>(a.q, t.batch, t.head, t.query + min_of(i, t.queries - 1));
    sweep<A>(a.size, [&](auto lanes, int64_t j) { lanes.store(q + i * wide + j, lanes.load(from + j) * factor); });
  }
  dot_keys<kQueries>(q, wide, at<const T>(a.k, t.batch, kv_head, t.key), a.k.time, t.keys, a.size, s, run);
  for (int64_t i = 0; i < t.queries; ++i) {
    const int64_t seen = a.causal ? max_of(0, min_of(last, t.query + i + 1) - t.key) : t.keys;
    A* own = s + i * run;
    add_mask<T>(a, {t.batch, t.head, t.query + i, 1, t.key, seen}, own);
    Vec<A> peaks = splat(-inf), totals{};
    sweep<A>(seen, [&](auto lanes, int64_t j) { peaks = max_of(peaks, lanes.keep(lanes.load(own + j), -inf)); });
    const A peak = max_lanes(peaks), shift = peak == -inf ? 0 : peak;
    sweep<A>(seen, [&](auto lanes, int64_t j) {
      const Vec<A> p = exp2(lanes.load(own + j) - shift, A(kLog2e));
      totals += lanes.keep(p, 0);
      lanes.store(own + j, p);
    });
    for (int64_t j = seen; j < t.keys; ++j) own[j] = 0;
    partial[i * stride] = peak;
    partial[i * stride + 1] = sum_lanes(totals);
  }
  A* out = partial + 2;
  const T* v = at<const T>(a.v, t.batch, kv_head, t.key);
  if (t.queries == kQueries) 
    return add_values<kQueries>(s, run, v, a.v.time, t.keys, a.value_size, out, stride, false);
  for (int64_t i = 0; i < t.queries; ++i)
    add_values<1>(s + i * run, run, v, a.v.time, t.keys, a.value_size, out + i * stride, stride, false);
}

// The queries from `query` on of all heads of a group.
template <class T, class A>
void partial_group(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t split, int64_t splits, int64_t query) {
  constexpr int64_t most = kTogether<A>;
  const int64_t group = a.heads / a.kv_heads, first = split * a.keys / splits, last = (split + 1) * a.keys / splits;
  const int64_t width = a.value_size + 2, stride = splits * width;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t i = query, count; i < a.queries; i += count) {
      count = taken_together<A>(a.queries - i);
      Tile t{b, h, i, count, first, 0};
      t.keys = seen_by(a, t, first, last);
      A* partial = static_cast<A*>(a.partials) + ((b * a.heads + h) * a.queries + i) * stride + split * width;
      if (count == 1) partial_rows<1, T>(a, t, partial, stride);
      else if (count == 2) partial_rows<2, T>(a, t, partial, stride);
      else partial_rows<most, T>(a, t, partial, stride);
    }
}

template <class T, class A>
void partial_run(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t split, int64_t splits) {
  const int64_t in_strips = queries_in_strips<A>(a);
  if (in_strips) partial_group_of_strips<T, A>(a, in_strips, b, kv_head, split, splits);
  partial_group<T, A>(a, b, kv_head, split, splits, in_strips);
}

// ---- the runs together ---------------------------------------------------------------------------
template <class T, class A>
void merge_row(const AttentionArgs& a, int64_t row, int64_t splits) {
  const int64_t width = a.value_size + 2, query = row % a.queries, h = row / a.queries % a.heads;
  A* partial = static_cast<A*>(a.partials) + row * splits * width;
  A peak = partial[0], total = 0;
  for (int64_t i = 1; i < splits; ++i) peak = partial[i * width] > peak ? partial[i * width] : peak;
  const A shift = peak == -A(__builtin_inf()) ? 0 : peak;
  for (int64_t i = 0; i < splits; ++i) {
    A* one = partial + i * width;
    one[0] = A(__builtin_exp(double(one[0] - shift)));
    total += one[0] * one[1];
  }
  const A factor = total == 0 ? 0 : 1 / total;
  T* out = at<T>(a.out, row / (a.queries * a.heads), h, query);
  sweep<A>(a.value_size, [&](auto lanes, int64_t j) {
    Vec<A> sum{};
    for (int64_t i = 0; i < splits; ++i) sum += partial[i * width] * lanes.load(partial + i * width + 2 + j);
    lanes.store(out + j, sum * factor);
  });
  static_cast<A*>(a.lse)[row] =
      total == 0 ? A(__builtin_inf()) : A(double(peak) + __builtin_log(double(total)));
}

}  // namespace

template <>
void attention_rows<kIsa>(const AttentionArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const int64_t splits = attention_splits(a), rows = a.batch * a.heads * a.queries;
    const int64_t read = ceil_div(a.keys, splits) * (a.size + a.value_size);
    parallel_for(a.batch * a.kv_heads * splits, ceil_div(kGrainElements, read), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / splits;
        partial_run<T, A>(a, g / a.kv_heads, g % a.kv_heads, i % splits, splits);
      }
    });
    parallel_for(rows, ceil_div(kGrainElements, splits * a.value_size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_row<T, A>(a, row, splits);
    });
  });
}

}  // namespace pyfast
