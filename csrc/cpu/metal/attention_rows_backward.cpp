// Gradients of attention for a few queries: bound by reading keys and values and writing their gradients, so nothing
// of those is packed. A worker takes a run of keys of one key head past all strips and rows of queries that use it. It
// owns the gradients of its keys; its sums for dQ are partial, and added up in the order of the runs.
#include "attention_few_gradient.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 1 << 14;   // keys and values read by a thread at least

// What stays of a strip: queries and output gradients as columns and as rows, its statistics, and dQ as columns.
template <class A>
struct StripGradient {
  A *q, *dout, *q_lines, *dout_lines, *lse, *delta, *dq;
};

template <class A>
struct GradientBuffers {
  using Core = StripCore<A>;
  A *k, *v, *dk, *dv, *scores, *dscores, *bias, *strips;
  RowBuffers<A> rows;

  GradientBuffers(Carver& c, const AttentionArgs& a, int64_t count, int64_t slots)
      : k(c.take<A>(kLineKeys * kLine<A>)), v(c.take<A>(kLineKeys * kLine<A>)), dk(c.take<A>(kLineKeys * kLine<A>)),
        dv(c.take<A>(kLineKeys * kLine<A>)), scores(c.take<A>(kLineKeys * kLanes<A>)),
        dscores(c.take<A>(kLineKeys * kLanes<A>)),
        bias(c.take<A>(a.mask.kind == MaskKind::none ? 0 : kLineKeys * kLanes<A>)),
        strips(c.take<A>(count * strip_size(a))), rows(c, a, slots) {}

  static int64_t high(int64_t features) { return round_up(features, Core::kRows) * kLanes<A>; }
  static int64_t strip_size(const AttentionArgs& a) {
    return 2 * high(a.size) + high(a.value_size) + 2 * kLanes<A> * (kLine<A> + 1);
  }
  StripGradient<A> strip(const AttentionArgs& a, int64_t i) const {
    A* q = strips + i * strip_size(a);
    A *dq = q + high(a.size), *dout = dq + high(a.size), *q_lines = dout + high(a.value_size);
    A *dout_lines = q_lines + kLanes<A> * kLine<A>, *lse = dout_lines + kLanes<A> * kLine<A>;
    return {q, dout, q_lines, dout_lines, lse, lse + kLanes<A>, dq};
  }
};

// The sum for delta = dO . O runs in the order in which the products add up dP: a query that sees one key has dP -
// delta of exactly 0. The outputs are packed in `out`.
template <class T, class A>
void load_strip(const AttentionBackwardArgs& g, const Tile& t, const StripGradient<A>& own, A* out) {
  using Core = StripCore<A>;
  const AttentionArgs& a = g.forward;
  constexpr int64_t n = kLanes<A>;
  pack_heads<Core, false, false>(a.dtype, own.q, a.q, t.batch, t.head, t.query, t.queries, a.size);
  pack_heads<Core, false, false>(a.dtype, own.dout, g.grad_out, t.batch, t.head, t.query, t.queries, a.value_size);
  const Heads<const void> outputs{a.out.data, a.out.batch, a.out.head, a.out.time};
  pack_heads<Core, false, false>(a.dtype, out, outputs, t.batch, t.head, t.query, t.queries, a.value_size);
  copy_lines(own.q_lines, at<const T>(a.q, t.batch, t.head, t.query), a.q.time, t.queries, a.size);
  copy_lines(own.dout_lines, at<const T>(g.grad_out, t.batch, t.head, t.query), g.grad_out.time, t.queries,
             a.value_size);
  Vec<A> delta{};
  for (int64_t j = 0; j < a.value_size; ++j) delta += load(own.dout + j * n) * load(out + j * n);
  store(own.delta, delta);
  const A* lse = static_cast<const A*>(a.lse) + (t.batch * a.heads + t.head) * a.queries + t.query;
  for (int64_t i = 0; i < n; ++i) own.lse[i] = i < t.queries ? lse[i] : A(__builtin_inf());
}

// c[rows][features] (+)= sum over the queries of a strip of tile[row][query] lines[query][feature].
template <class A>
void add_to_keys(int64_t rows, int64_t features, int64_t queries, const A* tile, const A* lines, A* c,
                 bool accumulate) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t r = 0; r < rows; r += StripCore<A>::kRows)
    for (int64_t j = 0; j < features; j += n)
      StripCore<A>::template multiply<n, 1>(queries, tile + r * n, lines + j, kLine<A>, c + r * kLine<A> + j, kLine<A>,
                                            accumulate);
}

// One strip against the copied keys: their gradients, and the strip's.
template <class A>
void strip_gradient(const AttentionArgs& a, const Tile& t, int64_t keys, const StripGradient<A>& strip,
                    const GradientBuffers<A>& own, bool first) {
  using Core = StripCore<A>;
  constexpr int64_t n = kLanes<A>, R = Core::kRows;
  for (int64_t r = 0; r < t.keys; r += R) {
    Core::template multiply<kLine<A>, 1>(a.size, own.k + r * kLine<A>, strip.q, n, own.scores + r * n, n, false);
    Core::template multiply<kLine<A>, 1>(a.value_size, own.v + r * kLine<A>, strip.dout, n, own.dscores + r * n, n,
                                         false);
  }
  const A factor = apply_masks<Core>(a, t, own.scores, own.bias);
  softmax_gradient<Core>(own.scores, own.dscores, t.keys, factor, strip.lse, strip.delta);
  const int64_t unseen = round_up(keys, R) - t.keys;   // by this strip, or none
  __builtin_memset(own.scores + t.keys * n, 0, size_t(unseen * n) * sizeof(A));
  __builtin_memset(own.dscores + t.keys * n, 0, size_t(unseen * n) * sizeof(A));
  add_to_keys(keys, a.value_size, t.queries, own.scores, strip.dout_lines, own.dv, !first);
  add_to_keys(keys, a.size, t.queries, own.dscores, strip.q_lines, own.dk, !first);
  for (int64_t j = 0; j < a.size; j += R)
    Core::template multiply<1, kLine<A>>(t.keys, own.k + j, own.dscores, n, strip.dq + j * n, n, true);
}

template <class T, class A>
void store_lines(const Heads<void>& to, int64_t b, int64_t head, int64_t key, int64_t keys, int64_t features,
                 const A* lines, A scale) {
  for (int64_t i = 0; i < keys; ++i) {
    T* row = at<T>(to, b, head, key + i);
    sweep<A>(features, [&](auto lanes, int64_t j) { lanes.store(row + j, load(lines + i * kLine<A> + j) * scale); });
  }
}

// All strips against the copied keys; false if none sees one.
template <class T, class A>
bool strips_gradient(const AttentionArgs& a, int64_t in_strips, int64_t b, int64_t kv_head, int64_t key, int64_t keys,
                     const GradientBuffers<A>& own) {
  const int64_t count = strip_count<A>(a, in_strips);
  if (count == 0) return false;
  copy_lines(own.k, at<const T>(a.k, b, kv_head, key), a.k.time, keys, a.size);
  copy_lines(own.v, at<const T>(a.v, b, kv_head, key), a.v.time, keys, a.value_size);
  bool touched = false;
  for (int64_t i = 0; i < count; ++i) {
    Tile t = strip_of<A>(a, in_strips, b, kv_head, i);
    t.key = key, t.keys = seen_by(a, t, key, key + keys);
    if (t.keys == 0) continue;
    strip_gradient(a, t, keys, own.strip(a, i), own, !touched);
    touched = true;
  }
  return touched;
}

// The sums for dQ of this run of keys.
template <class A>
void store_partials(const AttentionArgs& a, int64_t in_strips, int64_t b, int64_t kv_head, int64_t split,
                    int64_t splits, const GradientBuffers<A>& own) {
  const int64_t stride = splits * a.size;
  const auto to = [&](int64_t head, int64_t query) {
    return static_cast<A*>(a.partials) + ((b * a.heads + head) * a.queries + query) * stride + split * a.size;
  };
  alignas(64) A one[kLanes<A>];
  for (A& x : one) x = 1;
  for (int64_t i = 0; i < strip_count<A>(a, in_strips); ++i) {
    const Tile t = strip_of<A>(a, in_strips, b, kv_head, i);
    store_transposed<StripCore<A>>(own.strip(a, i).dq, one, to(t.head, t.query), stride, t.queries, a.size);
  }
  each_row_group<A>(a, kv_head, in_strips, [&](const RowGroup& rows) {
    for (int64_t i = 0; i < rows.queries; ++i)
      __builtin_memcpy(to(rows.head, rows.query + i), own.rows.dq + (rows.slot + i) * own.rows.wide,
                       size_t(a.size) * sizeof(A));
  });
}

template <class T, class A>
void gradient_run(const AttentionBackwardArgs& g, int64_t b, int64_t kv_head, int64_t split, int64_t splits) {
  const AttentionArgs& a = g.forward;
  const int64_t first = split * a.keys / splits, last = (split + 1) * a.keys / splits;
  const int64_t in_strips = queries_in_strips<A>(a), count = strip_count<A>(a, in_strips);
  const auto own = carve<GradientBuffers<A>>(a, count, slots_of_group<A>(a, in_strips));
  for (int64_t i = 0; i < count; ++i) {
    const auto strip = own.strip(a, i);
    load_strip<T>(g, strip_of<A>(a, in_strips, b, kv_head, i), strip, own.dk);
    __builtin_memset(strip.dq, 0, size_t(own.high(a.size)) * sizeof(A));
  }
  each_row_group<A>(a, kv_head, in_strips, [&](const RowGroup& rows) { load_rows<T>(g, b, rows, own.rows); });
  for (int64_t key = first; key < last; key += kLineKeys) {
    const int64_t keys = min_of(kLineKeys, last - key);
    bool touched = strips_gradient<T>(a, in_strips, b, kv_head, key, keys, own);
    each_row_group<A>(a, kv_head, in_strips, [&](const RowGroup& rows) {
      if (seen_by(a, {b, rows.head, rows.query, rows.queries, 0, 0}, key, key + keys) == 0) return;
      rows_gradient<T>(g, rows, b, key, keys, own.rows, own.dk, own.dv, !touched);
      touched = true;
    });
    if (!touched)
      for (A* sum : {own.dk, own.dv}) __builtin_memset(sum, 0, size_t(keys * kLine<A>) * sizeof(A));
    store_lines<T>(g.grad_k, b, kv_head, key, keys, a.size, own.dk, A(a.scale));
    store_lines<T>(g.grad_v, b, kv_head, key, keys, a.value_size, own.dv, A(1));
  }
  store_partials(a, in_strips, b, kv_head, split, splits, own);
}

template <class T, class A>
void merge_gradient(const AttentionBackwardArgs& g, int64_t row, int64_t splits) {
  const AttentionArgs& a = g.forward;
  const A* partial = static_cast<const A*>(a.partials) + row * splits * a.size;
  T* out = at<T>(g.grad_q, row / (a.queries * a.heads), row / a.queries % a.heads, row % a.queries);
  sweep<A>(a.size, [&](auto lanes, int64_t j) {
    Vec<A> sum{};
    for (int64_t i = 0; i < splits; ++i) sum += lanes.load(partial + i * a.size + j);
    lanes.store(out + j, sum * A(a.scale));
  });
}

}  // namespace

template <>
void attention_rows_backward<kIsa>(const AttentionBackwardArgs& g) {
  const AttentionArgs& a = g.forward;
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const int64_t splits = attention_splits(a), rows = a.batch * a.heads * a.queries;
    const int64_t read = ceil_div(a.keys, splits) * (a.size + a.value_size);
    parallel_for(a.batch * a.kv_heads * splits, ceil_div(kGrainElements, read), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t owner = i / splits;
        gradient_run<T, A>(g, owner / a.kv_heads, owner % a.kv_heads, i % splits, splits);
      }
    });
    parallel_for(rows, ceil_div(kGrainElements, splits * a.size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_gradient<T, A>(g, row, splits);
    });
  });
}

}  // namespace pyfast
