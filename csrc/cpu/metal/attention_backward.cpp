// Gradients of attention (Dao, 2023), in five matrix products a tile, P and dS recomputed from the log-sum-exp:
//   S = K Q^T, dP = V dO^T, dV += P dO, dK += dS Q, dQ += dS^T K        (tiles transposed: a row per key)
// One worker does all heads of a key head and owns their gradients. Where that leaves threads idle there are
// two passes, one for dK and dV over shares of the keys, one for dQ over shares of the queries, in seven products.
// Every sum is over blocks in ascending order in either case: the bits do not depend on the number of threads.
#include "attention_gradient.h"

namespace pyfast {
namespace {

constexpr int64_t kKeptBytes = 8 << 20;       // dQ sums a worker may keep from one round of keys to the next
constexpr int64_t kGrainProducts = 1 << 17;   // below this a thread costs more to wake than it saves

template <class Core>
struct BackwardBuffers {
  using A = typename Core::Acc;
  using E = typename Core::Elem;
  KeyBuffers<Core> keys;
  QueryBuffers<Core> queries;
  A *dk, *dv, *dq;
  E *rows, *ds_columns;   // P, then dS, as packed rows; dS as packed columns

  BackwardBuffers(Carver& c, const AttentionArgs& a, int64_t blocks, int64_t kept)
      : keys(c, a, blocks), queries(c, a), dk(c.take<A>(blocks * kBlockKeys<Core> * wide(a.size))),
        dv(c.take<A>(blocks * kBlockKeys<Core> * wide(a.value_size))), dq(c.take<A>(kept * dq_size(a))),
        rows(c.take<E>(rows_size())),
        ds_columns(c.take<E>(Core::kDepth > 1 ? padded_depth<Core>(kBlockKeys<Core>) * Core::kCols : 0)) {}

  static int64_t wide(int64_t features) { return round_up(features, Core::kCols); }
  static int64_t dq_size(const AttentionArgs& a) { return round_up(a.size, Core::kRows) * kBlockQueries<Core>; }
  static int64_t rows_size() {
    return kBlockKeys<Core> * padded_depth<Core>(kBlockQueries<Core>) + kLanes<A>;   // room for the last store
  }
};

// The first query of a block that sees a key from t.key + key on, in whole steps of the depth.
template <class Core>
int64_t first_seeing(bool causal, const Tile& t, int64_t key) {
  return causal ? max_of(0, t.key + key - t.query) / Core::kDepth * Core::kDepth : 0;
}

#if defined(PYFAST_BF16_CORE) && !defined(PYFAST_TILES)
// A row panel of PairTile from two panels of queries, or one: a vector of pairs for each key is then full.
inline void pack_two_panels(bf16* rows, const float* first, const float* second, int64_t keys, int64_t queries) {
  VecU block[16] = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i)
    if (i < keys) block[i] = narrow_two(load(first + i * 16), second ? load(second + i * 16) : VecF{});
  transpose(block);
  for (int64_t i = 0; 2 * i < queries; ++i) __builtin_memcpy(rows + i * 32, &block[i], sizeof block[i]);
}
#endif

// The tile as packed rows, [keys] by the queries as depth, but for panels of queries that see none of a row panel.
// Where a vector holds a whole step of a panel it is stored whole: what it writes too much, the next step or panel
// overwrites.
template <class Core>
void pack_tile_rows(typename Core::Elem* rows, const typename Core::Acc* tile, const Tile& t, bool causal) {
  using A = typename Core::Acc;
  constexpr int64_t C = Core::kCols, R = Core::kRows, n = kLanes<A>;
  constexpr bool kPairs = Core::kDepth == 2;
  constexpr int64_t kStep = kPairs ? 2 * C : C;   // queries packed together
  const int64_t depth = padded_depth<Core>(t.queries);
  for (int64_t key = 0; key < t.keys; key += R)
    for (int64_t q = first_seeing<Core>(causal, t, key) / kStep * kStep; q < t.queries; q += kStep) {
      const A* from = tile + q / C * kBlockKeys<Core> * C + key * C;
      if constexpr (kPairs) {
        pack_two_panels(rows + key * depth + q * R, from, q + C < t.queries ? from + kBlockKeys<Core> * C : nullptr,
                        t.keys - key, min_of(kStep, t.queries - q));
      } else if constexpr (Core::kDepth > 1 || R > n) {
        const Operand<A> part{from, C, 1, t.keys - key, min_of(C, t.queries - q)};
        pack_row_panel<Core>(rows + key * depth + q * R, part);
      } else {
        const int64_t there = t.keys - key;
        for (int64_t i = 0; i < min_of(C, t.queries - q); i += n) {
          Vec<A> block[n] = {};
#pragma GCC unroll 16
          for (int64_t r = 0; r < R; ++r) block[r] = r < there ? load(from + r * C + i) : Vec<A>{};
          transpose(block);
#pragma GCC unroll 16
          for (int64_t j = 0; j < n; ++j) store(rows + key * depth + (q + i + j) * R, block[j]);
        }
      }
    }
}

// sum[keys][wide] += tile^T times the features of the queries.
template <class Core>
void add_key_gradient(bool causal, const Tile& t, const typename Core::Acc* tile, const typename Core::Elem* across,
                      int64_t features, typename Core::Elem* rows, typename Core::Acc* sum) {
  constexpr int64_t C = Core::kCols, R = Core::kRows;
  const int64_t depth = padded_depth<Core>(t.queries), wide = round_up(features, C);
  pack_tile_rows<Core>(rows, tile, t, causal);
  for (int64_t j = 0; j < features; j += C)
    for (int64_t key = 0; key < t.keys; key += R) {
      const int64_t q = first_seeing<Core>(causal, t, key);
      Core::multiply(depth - q, rows + key * depth + q * R, across + j * depth + q * C, sum + key * wide + j, wide,
                     true);
    }
}

// dq[panel][features][query] (+)= K^T dS, for the panels of a block of queries.
template <class Core>
void add_query_gradient(const AttentionArgs& a, const Tile& t, const BackwardBuffers<Core>& own, int64_t slot,
                        typename Core::Acc* dq, bool accumulate) {
  constexpr int64_t C = Core::kCols;
  const auto* k = own.keys.k_across + slot * own.keys.across_size(a);
  const int64_t block = padded_depth<Core>(min_of(kBlockKeys<Core>, a.keys - t.key));
  for (int64_t q = 0; q < t.queries; q += C) {
    const int64_t keys = panel_of<Core>(a, t, q).keys, depth = padded_depth<Core>(keys);
    const auto* ds = as_columns<Core>(own.queries.dscores + q / C * own.queries.tile_size(), keys, own.ds_columns);
    auto* to = dq + q * round_up(a.size, Core::kRows);
    for (int64_t i = 0; i < a.size; i += Core::kRows)
      Core::multiply(depth, k + i * block, ds, to + i * C, C, accumulate);
  }
}

template <class Core>
void store_dq(const AttentionBackwardArgs& g, const Tile& t, const typename Core::Acc* dq) {
  const AttentionArgs& a = g.forward;
  alignas(64) typename Core::Acc scale[Core::kCols];
  for (auto& x : scale) x = typename Core::Acc(a.scale);
  dispatch_storage<Core>(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t q = 0; q < t.queries; q += Core::kCols)
      store_transposed<Core>(dq + q * round_up(a.size, Core::kRows), scale,
                             at<T>(g.grad_q, t.batch, t.head, t.query + q), g.grad_q.time,
                             min_of(Core::kCols, t.queries - q), a.size);
  });
}

template <class Core>
void store_keys(DType dtype, const Heads<void>& to, int64_t b, int64_t kv_head, int64_t key, int64_t keys,
                int64_t features, const typename Core::Acc* sum, typename Core::Acc scale) {
  const int64_t wide = round_up(features, Core::kCols);
  dispatch_storage<Core>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < keys; ++i) {
      T* row = at<T>(to, b, kv_head, key + i);
      sweep<typename Core::Acc>(features, [&](auto lanes, int64_t j) {
        lanes.store(row + j, lanes.load(sum + i * wide + j) * scale);
      });
    }
  });
}

// What one worker does: key blocks, query blocks (of every head of the group), and which gradients it owns.
struct Work {
  int64_t batch, kv_head;
  Share keys, queries;
  bool dkv, dq;
};

// One block of queries against the key blocks [first, first + count) of the share.
template <class Core>
void backward_queries(const AttentionBackwardArgs& g, const Work& w, Tile t, int64_t first, int64_t count,
                      const BackwardBuffers<Core>& own, typename Core::Acc* dq) {
  const AttentionArgs& a = g.forward;
  t.key = w.keys.id(first) * kBlockKeys<Core>;
  if (keys_seen(a, t, kBlockKeys<Core>) > 0) own.queries.pack(g, t, w.dkv);
  for (int64_t slot = 0; slot < count; ++slot) {
    t.key = w.keys.id(first + slot) * kBlockKeys<Core>;
    t.keys = keys_seen(a, t, kBlockKeys<Core>);
    if (t.keys == 0) break;
    const auto &k = own.keys, &q = own.queries;
    recompute_tile<Core>(a, t, k.k + slot * k.k_size(a), k.v + slot * k.v_size(a), q);
    if (w.dkv) {
      auto* dv = own.dv + slot * kBlockKeys<Core> * own.wide(a.value_size);
      auto* dk = own.dk + slot * kBlockKeys<Core> * own.wide(a.size);
      add_key_gradient<Core>(a.causal, t, q.scores, q.dout_across, a.value_size, own.rows, dv);
      add_key_gradient<Core>(a.causal, t, q.dscores, q.q_across, a.size, own.rows, dk);
    }
    if (w.dq) add_query_gradient<Core>(a, t, own, slot, dq, first + slot > 0);
  }
}

template <class Core>
void backward_share(const AttentionBackwardArgs& g, const Work& w) {
  using A = typename Core::Acc;
  const AttentionArgs& a = g.forward;
  const int64_t together = min_of(key_blocks_together<Core>(a), w.keys.count()), group = a.heads / a.kv_heads;
  const int64_t count = w.queries.count(), rounds = ceil_div(w.keys.count(), together);
  const bool keep = w.dq && rounds > 1;
  const auto own = carve<BackwardBuffers<Core>>(a, together, keep ? group * count : 1);
  for (int64_t first = 0; first < w.keys.count(); first += together) {
    const int64_t blocks = min_of(together, w.keys.count() - first);
    for (int64_t slot = 0; slot < blocks; ++slot)
      own.keys.pack(a, w.batch, w.kv_head, slot, w.keys.id(first + slot) * kBlockKeys<Core>, w.dq);
    if (w.dkv) {
      __builtin_memset(own.dk, 0, size_t(blocks * kBlockKeys<Core> * own.wide(a.size)) * sizeof(A));
      __builtin_memset(own.dv, 0, size_t(blocks * kBlockKeys<Core> * own.wide(a.value_size)) * sizeof(A));
    }
    for (int64_t i = 0; i < group * count; ++i) {
      const int64_t query = w.queries.id(i % count) * kBlockQueries<Core>;
      const Tile t{w.batch, w.kv_head * group + i / count, query, min_of(kBlockQueries<Core>, a.queries - query), 0, 0};
      A* dq = own.dq + (keep ? i : 0) * own.dq_size(a);
      backward_queries<Core>(g, w, t, first, blocks, own, dq);
      if (w.dq && first + together >= w.keys.count()) store_dq<Core>(g, t, dq);
    }
    for (int64_t slot = 0; w.dkv && slot < blocks; ++slot) {
      const int64_t key = w.keys.id(first + slot) * kBlockKeys<Core>, keys = min_of(kBlockKeys<Core>, a.keys - key);
      store_keys<Core>(a.dtype, g.grad_k, w.batch, w.kv_head, key, keys, a.size,
                       own.dk + slot * kBlockKeys<Core> * own.wide(a.size), A(a.scale));
      store_keys<Core>(a.dtype, g.grad_v, w.batch, w.kv_head, key, keys, a.value_size,
                       own.dv + slot * kBlockKeys<Core> * own.wide(a.value_size), 1);
    }
  }
}

template <class Core>
void backward(const AttentionBackwardArgs& g) {
  const AttentionArgs& a = g.forward;
  const int64_t group = a.heads / a.kv_heads, groups = a.batch * a.kv_heads, threads = thread_count();
  const int64_t key_blocks = ceil_div(a.keys, kBlockKeys<Core>);
  const int64_t query_blocks = ceil_div(a.queries, kBlockQueries<Core>);
  const int64_t kept = key_blocks > key_blocks_together<Core>(a)
                           ? group * BackwardBuffers<Core>::dq_size(a) * int64_t(sizeof(typename Core::Acc))
                           : 0;   // of a query block
  const auto run = [&](int64_t key_shares, int64_t query_shares, bool dkv, bool dq) {
    const int64_t shares = key_shares * query_shares;   // one of the two is 1
    const int64_t products = a.queries * a.keys * (a.size + a.value_size) * group / shares;
    parallel_for(groups * shares, ceil_div(kGrainProducts, products), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename Core::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t owner = i / shares, share = i % shares;
        backward_share<Core>(g, {owner / a.kv_heads, owner % a.kv_heads,
                                 {share % key_shares, key_shares, key_blocks},
                                 {share % query_shares, query_shares, query_blocks}, dkv, dq});
      }
    });
  };
  const bool busy = 7 * groups >= 5 * threads * ceil_div(groups, threads);   // else two passes are quicker
  if ((busy || key_blocks * query_blocks == 1) && kept * query_blocks <= kKeptBytes) return run(1, 1, true, true);
  const int64_t least = min_of(query_blocks, max_of(1, ceil_div(kept * query_blocks, kKeptBytes)));
  run(share_count(groups, 1, key_blocks), 1, true, false);
  run(1, share_count(groups, least, query_blocks), false, true);
}

}  // namespace

template <>
void attention_backward<kIsa>(const AttentionBackwardArgs& g) {
  dispatch_core(g.forward.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(g); });
}

}  // namespace pyfast
