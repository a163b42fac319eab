// The gradient of an additive mask: dS, summed over the dimensions the mask is broadcast along. A worker owns a
// block of queries of the mask and visits all heads and batches that share it, so that no sum is shared.
#include "attention_gradient.h"

namespace pyfast {
namespace {

template <class Core>
struct MaskBuffers {
  KeyBuffers<Core> keys;
  QueryBuffers<Core> queries;
  typename Core::Acc* sum;   // [panel][Tk][query]

  MaskBuffers(Carver& c, const AttentionArgs& a)
      : keys(c, a, 1), queries(c, a), sum(c.take<typename Core::Acc>(a.keys * kBlockQueries<Core>)) {}
};

template <class Core>
void add_block(const AttentionBackwardArgs& g, Tile t, const MaskBuffers<Core>& own) {
  const AttentionArgs& a = g.forward;
  constexpr int64_t C = Core::kCols, n = kLanes<typename Core::Acc>;
  own.queries.pack(g, t, false);
  for (t.key = 0; t.key < a.keys; t.key += kBlockKeys<Core>) {
    t.keys = keys_seen(a, t, kBlockKeys<Core>);
    if (t.keys == 0) return;
    own.keys.pack(a, t.batch, t.head / (a.heads / a.kv_heads), 0, t.key, false);
    recompute_tile<Core>(a, t, own.keys.k, own.keys.v, own.queries);
    for (int64_t q = 0; q < t.queries; q += C) {
      auto* to = own.sum + (q / C * a.keys + t.key) * C;
      const auto* from = own.queries.dscores + q / C * own.queries.tile_size();
      for (int64_t i = 0; i < t.keys * C; i += n) store(to + i, load(to + i) + load(from + i));
    }
  }
}

// Sums along dimensions of size 1 of the mask go to the first key, or the first query, of the block.
template <class Core>
void collapse(const AttentionBackwardArgs& g, typename Core::Acc* sum) {
  using A = typename Core::Acc;
  constexpr int64_t C = Core::kCols, n = kLanes<A>;
  const int64_t keys = g.forward.keys;
  for (int64_t p = 0; g.mask_keys == 1 && p < kQueryPanels<Core>; ++p)
    for (int64_t i = 0; i < C; i += n) {
      A* first = sum + p * keys * C + i;
      Vec<A> total{};
      for (int64_t key = 0; key < keys; ++key) total += load(first + key * C);
      store(first, total);
    }
  for (int64_t key = 0; g.mask_queries == 1 && key < g.mask_keys; ++key) {
    Vec<A> total{};
    for (int64_t p = 0; p < kQueryPanels<Core>; ++p)
      for (int64_t i = 0; i < C; i += n) total += load(sum + (p * keys + key) * C + i);
    sum[key * C] = sum_lanes(total);
  }
}

template <class Core>
void store_block(const AttentionBackwardArgs& g, int64_t owner, int64_t query, const typename Core::Acc* sum) {
  const AttentionArgs& a = g.forward;
  constexpr int64_t C = Core::kCols;
  alignas(64) typename Core::Acc one[C];
  for (auto& x : one) x = 1;
  const auto write = [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = static_cast<T*>(g.grad_mask) + (owner * g.mask_queries + query) * g.mask_keys;
    const int64_t queries = min_of(kBlockQueries<Core>, g.mask_queries - query);
    for (int64_t q = 0; q < queries; q += C)
      store_transposed<Core>(sum + q * a.keys, one, out + q * g.mask_keys, g.mask_keys, min_of(C, queries - q),
                             g.mask_keys);
  };
  if constexpr (sizeof(typename Core::Acc) == 4) {
    if (a.mask.kind == MaskKind::float32) return write(TypeTag<float>{});
  }
  dispatch_storage<Core>(a.dtype, write);
}

template <class Core>
void grad_mask(const AttentionBackwardArgs& g) {
  const AttentionArgs& a = g.forward;
  const int64_t all = ceil_div(a.queries, kBlockQueries<Core>), blocks = g.mask_queries == 1 ? 1 : all;
  parallel_for(g.mask_batch * g.mask_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Core::Session session;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t owner = i / blocks, block = i % blocks;
      const auto own = carve<MaskBuffers<Core>>(a);
      __builtin_memset(own.sum, 0, size_t(a.keys * kBlockQueries<Core>) * sizeof(*own.sum));
      for (int64_t b = owner / g.mask_heads; b < a.batch; b += g.mask_batch)
        for (int64_t h = owner % g.mask_heads; h < a.heads; h += g.mask_heads)
          for (int64_t q = block; q < all; q += blocks) {
            const int64_t query = q * kBlockQueries<Core>;
            add_block<Core>(g, {b, h, query, min_of(kBlockQueries<Core>, a.queries - query), 0, 0}, own);
          }
      collapse<Core>(g, own.sum);
      store_block<Core>(g, owner, block * kBlockQueries<Core>, own.sum);
    }
  });
}

}  // namespace

template <>
void attention_grad_mask<kIsa>(const AttentionBackwardArgs& g) {
  dispatch_core(g.forward.dtype, [&](auto tag) { grad_mask<typename decltype(tag)::type>(g); });
}

}  // namespace pyfast
