// Attention of a few queries, as in decoding: bound by reading keys and values, so nothing is packed or copied.
// A worker reads a run of keys of one key head for all queries that use it; the runs are merged in order.
#include "attention_scores.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 1 << 15;   // keys and values read by a thread at least

// s[key] = q . k[key], a vector of keys at a time: the sums of the products are transposed, so that adding them
// up needs no sum across lanes.
template <class T, class A>
void dot_keys(const A* q, const T* k, int64_t stride, int64_t keys, int64_t size, A* s) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t key = 0; key < keys; key += n) {
    Vec<A> sum[n] = {};
    const int64_t there = min_of(n, keys - key);
    for (int64_t j = 0; j < there; ++j) {
      const T* row = k + (key + j) * stride;
      Vec<A> dot{};
      sweep<A>(size, [&](auto lanes, int64_t i) { dot += lanes.load(q + i) * lanes.load(row + i); });
      sum[j] = dot;
    }
    transpose(sum);
    for (int64_t half = n / 2; half; half /= 2)
      for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
    store_part(s + key, sum[0], there);
  }
}

// out = sum over keys of p[key] v[key].
template <class T, class A>
void add_values(const A* p, const T* v, int64_t stride, int64_t keys, int64_t size, A* out) {
  constexpr int64_t n = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 * n <= size; i += 4 * n) {
    Vec<A> sum[4] = {};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec<A> weight = splat(p[key]);
      for (int64_t j = 0; j < 4; ++j) sum[j] += weight * load(v + key * stride + i + j * n);
    }
    for (int64_t j = 0; j < 4; ++j) store(out + i + j * n, sum[j]);
  }
  sweep<A>(size - i, [&](auto lanes, int64_t j) {
    Vec<A> sum{};
    for (int64_t key = 0; key < keys; ++key) sum += p[key] * lanes.load(v + key * stride + i + j);
    lanes.store(out + i + j, sum);
  });
}

template <class T, class A>
void add_mask(const AttentionArgs& a, const Tile& t, A* s) {
  const AttentionMask& m = a.mask;
  const int64_t at = t.batch * m.batch + t.head * m.head + t.query * m.query + t.key * m.key;
  const A lowest = sizeof(A) == 8 ? A(-__DBL_MAX__) : A(-__FLT_MAX__);
  const auto add = [&](const auto* mask) {
    for (int64_t key = 0; key < t.keys; ++key) {
      const A raw = A(load_one(mask + at + key * m.key)), scaled = raw * A(kLog2e);
      s[key] += raw == -A(__builtin_inf()) ? raw : scaled < lowest ? lowest : scaled;
    }
  };
  if (m.kind == MaskKind::boolean) add(static_cast<const Flag*>(m.data));
  else if (m.kind == MaskKind::float32) add(static_cast<const float*>(m.data));
  else if (m.kind == MaskKind::same) add(static_cast<const T*>(m.data));
}

// One query against a run of keys: partial = [peak, total, sum of 2^(s - peak) v].
template <class T, class A>
void partial_row(const AttentionArgs& a, const Tile& t, const A* q, A* s, A* partial) {
  const int64_t kv_head = t.head / (a.heads / a.kv_heads);
  dot_keys(q, at<const T>(a.k, t.batch, kv_head, t.key), a.k.time, t.keys, a.size, s);
  add_mask<T>(a, t, s);
  const A inf = A(__builtin_inf());
  Vec<A> peaks = splat(-inf), totals{};
  sweep<A>(t.keys, [&](auto lanes, int64_t i) { peaks = max_of(peaks, lanes.keep(lanes.load(s + i), -inf)); });
  const A peak = max_lanes(peaks), shift = peak == -inf ? 0 : peak;
  sweep<A>(t.keys, [&](auto lanes, int64_t i) {
    const Vec<A> p = exp2(lanes.load(s + i) - shift);
    totals += lanes.keep(p, 0);
    lanes.store(s + i, p);
  });
  partial[0] = peak;
  partial[1] = sum_lanes(totals);
  add_values(s, at<const T>(a.v, t.batch, kv_head, t.key), a.v.time, t.keys, a.value_size, partial + 2);
}

template <class T, class A>
void partial_group(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t split, int64_t splits) {
  const int64_t group = a.heads / a.kv_heads, first = split * a.keys / splits, last = (split + 1) * a.keys / splits;
  A *q = scratch<A>(0, a.size), *s = scratch<A>(1, last - first);
  const A factor = A(a.scale * kLog2e);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t query = 0; query < a.queries; ++query) {
      const T* from = at<const T>(a.q, b, h, query);
      sweep<A>(a.size, [&](auto lanes, int64_t i) { lanes.store(q + i, lanes.load(from + i) * factor); });
      const int64_t seen = a.causal ? min_of(last, query + 1) : last;
      const Tile t{b, h, query, 1, first, max_of(0, seen - first)};
      const int64_t row = (b * a.heads + h) * a.queries + query;
      partial_row<T>(a, t, q, s, static_cast<A*>(a.partials) + (row * splits + split) * (a.value_size + 2));
    }
}

template <class T, class A>
void merge_row(const AttentionArgs& a, int64_t row, int64_t splits) {
  const int64_t width = a.value_size + 2, query = row % a.queries, h = row / a.queries % a.heads;
  A* partial = static_cast<A*>(a.partials) + row * splits * width;
  A peak = partial[0], total = 0;
  for (int64_t i = 1; i < splits; ++i) peak = partial[i * width] > peak ? partial[i * width] : peak;
  const A shift = peak == -A(__builtin_inf()) ? 0 : peak;
  for (int64_t i = 0; i < splits; ++i) {
    A* one = partial + i * width;
    one[0] = A(__builtin_exp2(double(one[0] - shift)));
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
      total == 0 ? A(__builtin_inf()) : A((double(peak) + __builtin_log2(double(total))) * kLn2);
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
        partial_group<T, A>(a, g / a.kv_heads, g % a.kv_heads, i % splits, splits);
      }
    });
    parallel_for(rows, ceil_div(kGrainElements, splits * a.value_size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_row<T, A>(a, row, splits);
    });
  });
}

}  // namespace pyfast
