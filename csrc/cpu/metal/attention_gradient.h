// The blocks the gradient passes of attention are made of: packed keys and values, packed queries with their
// statistics, and the tiles P and dS recomputed from them.
#pragma once

#include "attention_scores.h"

namespace pyfast {
namespace {

// A block of queries: a few panels, so that the products over queries are deep enough.
template <class Core> constexpr int64_t kQueryPanels = 64 / Core::kCols;
template <class Core> constexpr int64_t kBlockQueries = kQueryPanels<Core> * Core::kCols;

// Key blocks worked on together, so that queries are packed once for all of them: four with D = 128, 1.4 MB in float.
template <class Core>
int64_t key_blocks_together(const AttentionArgs& a) {
  return max_of(1, (5 << 14) / (kBlockKeys<Core> * max_of(a.size, a.value_size)));
}

template <class Core>
struct KeyBuffers {
  using E = typename Core::Elem;
  E *k, *v, *k_across;   // a block after the other: [keys, D], [keys, Dv] and [D, keys] as rows of products

  KeyBuffers(Carver& c, const AttentionArgs& a, int64_t blocks)
      : k(c.take<E>(blocks * k_size(a))), v(c.take<E>(blocks * v_size(a))),
        k_across(c.take<E>(blocks * across_size(a))) {}

  static int64_t k_size(const AttentionArgs& a) { return kBlockKeys<Core> * padded_depth<Core>(a.size); }
  static int64_t v_size(const AttentionArgs& a) { return kBlockKeys<Core> * padded_depth<Core>(a.value_size); }
  static int64_t across_size(const AttentionArgs& a) {
    return round_up(a.size, Core::kRows) * padded_depth<Core>(kBlockKeys<Core>);
  }

  void pack(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t slot, int64_t key, bool across) const {
    const int64_t keys = min_of(kBlockKeys<Core>, a.keys - key);
    pack_heads<Core, true, false>(a.dtype, k + slot * k_size(a), a.k, b, kv_head, key, keys, a.size);
    pack_heads<Core, true, false>(a.dtype, v + slot * v_size(a), a.v, b, kv_head, key, keys, a.value_size);
    if (across)
      pack_heads<Core, true, true>(a.dtype, k_across + slot * across_size(a), a.k, b, kv_head, key, keys, a.size);
  }
};

template <class Core>
struct QueryBuffers {
  using A = typename Core::Acc;
  using E = typename Core::Elem;
  E *q, *dout;                   // panels of queries, for products over the features
  E *q_across, *dout_across;     // panels of features, for products over the queries
  A *lse, *delta;                // per query: log-sum-exp, and dO . O
  A *scores, *dscores, *bias;    // [panel][key][query]

  QueryBuffers(Carver& c, const AttentionArgs& a)
      : q(c.take<E>(kBlockQueries<Core> * padded_depth<Core>(a.size))),
        dout(c.take<E>(kBlockQueries<Core> * padded_depth<Core>(a.value_size))),
        q_across(c.take<E>(round_up(a.size, Core::kCols) * padded_depth<Core>(kBlockQueries<Core>))),
        dout_across(c.take<E>(round_up(a.value_size, Core::kCols) * padded_depth<Core>(kBlockQueries<Core>))),
        lse(c.take<A>(kBlockQueries<Core>)), delta(c.take<A>(kBlockQueries<Core>)),
        scores(c.take<A>(kQueryPanels<Core> * tile_size())), dscores(c.take<A>(kQueryPanels<Core> * tile_size())),
        bias(c.take<A>(a.mask.kind == MaskKind::none ? 0 : tile_size())) {}

  static int64_t tile_size() { return kBlockKeys<Core> * Core::kCols; }

  void pack(const AttentionBackwardArgs& g, const Tile& t, bool across) const {
    const AttentionArgs& a = g.forward;
    pack_heads<Core, false, false>(a.dtype, q, a.q, t.batch, t.head, t.query, t.queries, a.size);
    pack_heads<Core, false, false>(a.dtype, dout, g.grad_out, t.batch, t.head, t.query, t.queries, a.value_size);
    load_statistics(g, t);
    if (across) {
      pack_heads<Core, false, true>(a.dtype, q_across, a.q, t.batch, t.head, t.query, t.queries, a.size);
      pack_heads<Core, false, true>(a.dtype, dout_across, g.grad_out, t.batch, t.head, t.query, t.queries,
                                    a.value_size);
    }
  }

 private:
  // Queries that do not exist have an infinite lse, and so no probability.
  void load_statistics(const AttentionBackwardArgs& g, const Tile& t) const {
    const AttentionArgs& a = g.forward;
    const A* from = static_cast<const A*>(a.lse) + (t.batch * a.heads + t.head) * a.queries + t.query;
    for (int64_t i = 0; i < kBlockQueries<Core>; ++i) {
      lse[i] = i < t.queries ? from[i] : A(__builtin_inf());
      delta[i] = 0;
    }
    if constexpr (Core::kDepth == 1) load_delta(a, t);
    else load_delta_by_rows(g, t);
  }

  // In the order in which the products of FmaCore add up dP: a query that sees one key has dP - delta of exactly 0.
  // The outputs are packed where later dout_across will be.
  void load_delta(const AttentionArgs& a, const Tile& t) const {
    constexpr int64_t C = Core::kCols, n = kLanes<A>;
    const Heads<const void> out{a.out.data, a.out.batch, a.out.head, a.out.time};
    pack_heads<Core, false, false>(a.dtype, dout_across, out, t.batch, t.head, t.query, t.queries, a.value_size);
    for (int64_t first = 0; first < t.queries; first += C)
      for (int64_t i = 0; i < C; i += n) {
        const int64_t panel = first * a.value_size + i;
        Vec<A> sum{};
        for (int64_t j = 0; j < a.value_size; ++j)
          sum += load(dout + panel + j * C) * load(dout_across + panel + j * C);
        store(delta + first + i, sum);
      }
  }

  static constexpr int64_t kOutAhead = 8;   // rows: each of the outputs is read here alone

  void load_delta_by_rows(const AttentionBackwardArgs& g, const Tile& t) const {
    const AttentionArgs& a = g.forward;
    dispatch_storage<Core>(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t i = 0; i < t.queries; ++i) {
        const T* out = at<const T>(a.out, t.batch, t.head, t.query + i);
        const T* dy = at<const T>(g.grad_out, t.batch, t.head, t.query + i);
        Vec<A> sum{};
        sweep<A>(a.value_size, [&](auto lanes, int64_t j) {
          if (j * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(out + kOutAhead * a.out.time + j);
          sum += lanes.load(out + j) * lanes.load(dy + j);
        });
        delta[i] = sum_lanes(sum);
      }
    });
  }
};

// The keys of a block that a block of queries sees: 0 if none.
inline int64_t keys_seen(const AttentionArgs& a, const Tile& t, int64_t block_keys) {
  const int64_t keys = min_of(block_keys, a.keys - t.key);
  return a.causal ? max_of(0, min_of(keys, t.query + t.queries - t.key)) : keys;
}

// A panel of a block of queries, and the keys it sees of those that the block sees.
template <class Core>
Tile panel_of(const AttentionArgs& a, const Tile& t, int64_t first) {
  const int64_t queries = min_of(Core::kCols, t.queries - first), last = t.query + first + queries;
  const int64_t keys = a.causal ? max_of(0, min_of(t.keys, last - t.key)) : t.keys;
  return {t.batch, t.head, t.query + first, queries, t.key, keys};
}

// P and dS of a tile, panel by panel, in own.scores and own.dscores; 0 where a whole panel does not see a key.
template <class Core>
void recompute_tile(const AttentionArgs& a, const Tile& t, const typename Core::Elem* k, const typename Core::Elem* v,
                    const QueryBuffers<Core>& own) {
  constexpr int64_t C = Core::kCols;
  for (int64_t first = 0; first < t.queries; first += C) {
    auto *s = own.scores + first / C * own.tile_size(), *d = own.dscores + first / C * own.tile_size();
    const Tile panel = panel_of<Core>(a, t, first);
    multiply_rows<Core>(panel.keys, a.size, k, own.q + first * padded_depth<Core>(a.size), s, false);
    multiply_rows<Core>(panel.keys, a.value_size, v, own.dout + first * padded_depth<Core>(a.value_size), d, false);
    const auto factor = apply_masks<Core>(a, panel, s, own.bias);
    softmax_gradient<Core>(s, d, panel.keys, factor, own.lse + first, own.delta + first);
    const size_t unseen = size_t((t.keys - panel.keys) * C) * sizeof(*s);
    for (auto* tile : {s, d}) __builtin_memset(tile + panel.keys * C, 0, unseen);
  }
}

}  // namespace
}  // namespace pyfast
