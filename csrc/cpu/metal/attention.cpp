// Attention, forward (Dao, 2023: FlashAttention-2, with queries in the lanes of a tile). A worker owns panels of
// queries of all heads that share a key head: it packs a block of keys and values once, and takes all its
// panels past it.
#include "attention_scores.h"

namespace pyfast {
namespace {

constexpr int64_t kStateBytes = 768 * 1024;   // queries and outputs of a worker: they should stay in L2
constexpr int64_t kGrainProducts = 1 << 17;   // below this a thread costs more to wake than it saves

template <class Core>
struct ForwardBuffers {
  using A = typename Core::Acc;
  using E = typename Core::Elem;
  E *q, *k, *v, *p;
  A *out, *scores, *bias;
  Softmax<Core>* softmax;

  ForwardBuffers(Carver& c, const AttentionArgs& a, int64_t panels)
      : q(c.take<E>(panels * q_size(a))), k(c.take<E>(kBlockKeys<Core> * padded_depth<Core>(a.size))),
        v(c.take<E>(round_up(a.value_size, Core::kRows) * padded_depth<Core>(kBlockKeys<Core>))),
        p(c.take<E>(Core::kDepth > 1 ? padded_depth<Core>(kBlockKeys<Core>) * Core::kCols : 0)),
        out(c.take<A>(panels * out_size(a))), scores(c.take<A>(kBlockKeys<Core> * Core::kCols)),
        bias(c.take<A>(a.mask.kind == MaskKind::none ? 0 : kBlockKeys<Core> * Core::kCols)),
        softmax(c.take<Softmax<Core>>(panels)) {}

  static int64_t q_size(const AttentionArgs& a) { return padded_depth<Core>(a.size) * Core::kCols; }
  static int64_t out_size(const AttentionArgs& a) { return round_up(a.value_size, Core::kRows) * Core::kCols; }
};

// One panel of queries against one block of keys, of which `packed` are packed and t.keys seen.
template <class Core>
void forward_tile(const AttentionArgs& a, const Tile& t, int64_t packed, const ForwardBuffers<Core>& own,
                  int64_t panel) {
  using A = typename Core::Acc;
  alignas(64) A correction[Core::kCols];
  const auto* q = own.q + panel * own.q_size(a);
  A* out = own.out + panel * own.out_size(a);
  multiply_rows<Core>(t.keys, a.size, own.k, q, own.scores, false);
  const A factor = apply_masks<Core>(a, t, own.scores, own.bias);
  softmax_step<Core>(own.scores, t.keys, factor, own.softmax[panel], correction);
  if (t.key > 0)
    for (int64_t i = 0; i < a.value_size; ++i)
      for (int64_t j = 0; j < Core::kCols; j += kLanes<A>) {
        A* at = out + i * Core::kCols + j;
        store(at, load(at) * load(correction + j));
      }
  const auto* p = as_columns<Core>(own.scores, t.keys, own.p);
  const int64_t depth = padded_depth<Core>(t.keys), block = padded_depth<Core>(packed);
  for (int64_t i = 0; i < a.value_size; i += Core::kRows)
    Core::multiply(depth, own.v + i * block, p, out + i * Core::kCols, Core::kCols, t.key > 0);
}

// out = O / total, lse = log of the sum of e^scores; a query that saw no key gets 0 and +inf.
template <class Core>
void finish_panel(const AttentionArgs& a, const Tile& t, const typename Core::Acc* out, const Softmax<Core>& softmax) {
  using A = typename Core::Acc;
  const A scale = A(score_factor(a));
  A factor[Core::kCols];
  A* lse = static_cast<A*>(a.lse) + (t.batch * a.heads + t.head) * a.queries + t.query;
  for (int64_t i = 0; i < Core::kCols; ++i) {
    const A total = softmax.total[i];
    factor[i] = total == 0 ? 0 : 1 / total;
    if (i < t.queries)
      lse[i] = total == 0 ? A(__builtin_inf()) : A(double(softmax.peak[i] * scale) + __builtin_log(double(total)));
  }
  dispatch_storage<Core>(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store_transposed<Core>(out, factor, at<T>(a.out, t.batch, t.head, t.query), a.out.time, t.queries, a.value_size);
  });
}

// All panels of a share of the queries of one key head, past all blocks of keys.
template <class Core>
void forward_share(const AttentionArgs& a, int64_t b, int64_t kv_head, const Share& share) {
  constexpr int64_t C = Core::kCols;
  const int64_t group = a.heads / a.kv_heads, count = share.count(), panels = group * count;
  const auto own = carve<ForwardBuffers<Core>>(a, panels);
  const auto tile = [&](int64_t panel) {
    const int64_t query = share.id(panel % count) * C;
    return Tile{b, kv_head * group + panel / count, query, min_of(C, a.queries - query), 0, 0};
  };
  for (int64_t panel = 0; panel < panels; ++panel) {
    const Tile t = tile(panel);
    pack_heads<Core, false, false>(a.dtype, own.q + panel * own.q_size(a), a.q, b, t.head, t.query, t.queries, a.size);
    own.softmax[panel].start();
  }
  for (int64_t key = 0; key < a.keys; key += kBlockKeys<Core>) {
    const int64_t keys = min_of(kBlockKeys<Core>, a.keys - key);
    bool packed = false;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Tile t = tile(panel);
      t.key = key;
      t.keys = a.causal ? min_of(keys, t.query + t.queries - key) : keys;
      if (t.keys <= 0) continue;
      if (!packed) {
        pack_heads<Core, true, false>(a.dtype, own.k, a.k, b, kv_head, key, keys, a.size);
        pack_heads<Core, true, true>(a.dtype, own.v, a.v, b, kv_head, key, keys, a.value_size);
        packed = true;
      }
      forward_tile<Core>(a, t, keys, own, panel);
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel)
    finish_panel<Core>(a, tile(panel), own.out + panel * own.out_size(a), own.softmax[panel]);
}

template <class Core>
void forward(const AttentionArgs& a) {
  using A = typename Core::Acc;
  const int64_t group = a.heads / a.kv_heads, groups = a.batch * a.kv_heads, panels = ceil_div(a.queries, Core::kCols);
  const int64_t state = (a.size + a.value_size) * Core::kCols * int64_t(sizeof(A)) * group;   // of a panel number
  const int64_t least = min_of(panels, ceil_div(panels * state, kStateBytes));
  const int64_t shares = share_count(groups, least, panels);
  const int64_t products = a.queries * a.keys * (a.size + a.value_size) * group / shares;
  parallel_for(groups * shares, ceil_div(kGrainProducts, products), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Core::Session session;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / shares;
      forward_share<Core>(a, g / a.kv_heads, g % a.kv_heads, {i % shares, shares, panels});
    }
  });
}

}  // namespace

template <>
void attention<kIsa>(const AttentionArgs& a) {
  dispatch_core(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
