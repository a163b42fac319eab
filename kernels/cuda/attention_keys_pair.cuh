// dK and dV of heads too wide for one warp to hold both: a warp makes P and dV, and hands P to another one, which makes
// dS and dK. Each product is made once. So do two warpgroups on sm_90a.
#pragma once

#include "attention_backward.cuh"
#include "attention_keys_group.cuh"

namespace pyfast {

// Of a stage: queries, dO, and the statistics of these queries.
template <class T, int kD, int kWarps>
struct KeysTile : BackwardTile<T, kD, kWarps> {
  using Base = BackwardTile<T, kD, kWarps>;
  using Statistics = QueryStatistics<T, Base::kStream>;
  static constexpr int kStageBytes = Base::kStageBytes + Statistics::kBytes;
  static constexpr int kBytes = 2 * Base::Own::kBytes + Base::kStages * kStageBytes;

  static __device__ __forceinline__ Statistics statistics(uint32_t stage) { return {stage + Base::kStageBytes}; }
};

template <class Tile>
__device__ __forceinline__ void copy_queries(uint32_t to, const AttentionBackwardCudaArgs& g, const QueryStream& s) {
  using Stream = typename Tile::Stream;
  using T = typename Stream::Element;
  constexpr int kThreads = Tile::kThreads;
  const AttentionCudaArgs& a = g.forward;
  copy_rows<Stream, kThreads>(to, a.q, head_data<T>(a.q, s.batch, s.head()), s.start(), a.queries, a.size);
  copy_rows<Stream, kThreads>(to + Stream::kBytes, g.grad_out, head_data<T>(g.grad_out, s.batch, s.head()), s.start(),
                              a.queries, a.value_size);
  Tile::statistics(to).copy(g, s.batch, s.head(), s.start());
}

// P of 16 keys passes from lane to lane, as both warps hold it; barrier 2 + `pair` is theirs.
template <int kNs>
__device__ __forceinline__ void hand_over(const float (&p)[1][kNs][4], uint32_t exchange, int pair) {
#pragma unroll
  for (int j = 0; j < kNs; ++j)
    store_shared(exchange + ((pair * kNs + j) * 32 + lane_id()) * 16,
                 make_uint4(__float_as_uint(p[0][j][0]), __float_as_uint(p[0][j][1]), __float_as_uint(p[0][j][2]),
                            __float_as_uint(p[0][j][3])));
  if (!mutant(168)) barrier_arrive<64>(2 + pair);
}
template <int kNs>
__device__ __forceinline__ void take_over(float (&p)[1][kNs][4], uint32_t exchange, int pair) {
  if (!mutant(168)) barrier<64>(2 + pair);
#pragma unroll
  for (int j = 0; j < kNs; ++j) load_shared(p[0][j], exchange + ((pair * kNs + j) * 32 + lane_id()) * 16);
}

// kWarps / 2 warps make dV of 16 keys in each, as many dK.
template <class T, int kD, int kWarps>
struct KeysPairTile : KeysTile<T, kD, kWarps> {
  using Base = KeysTile<T, kD, kWarps>;
  static constexpr int kOwn = Base::kOwn / 2, kNs = Base::kStream / 8;
  using Own = SharedTile<T, Major::depth, kOwn, kD>;
  static constexpr int kExchange = 2 * Own::kBytes + Base::kStages * Base::kStageBytes;
  static constexpr int kBytes = kExchange + kWarps / 2 * kNs * 512;
};

template <class T, int kD, int kWarps>
__device__ __forceinline__ void attention_backward_dkdv_pair(const AttentionBackwardCudaArgs& g, uint32_t memory) {
  using Tile = KeysPairTile<T, kD, kWarps>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  using Across = typename Tile::Across;
  constexpr int kThreads = Tile::kThreads, kNs = Tile::kNs;
  const AttentionCudaArgs& a = g.forward;
  const uint32_t k_tile = memory, v_tile = k_tile + Own::kBytes, exchange = memory + Tile::kExchange;
  const QueryStream stream(a, Tile::kOwn, Tile::kStream);
  const int batch = stream.batch, kv_head = stream.kv_head, first = stream.first;
  const int pair = threadIdx.x / 32 % (kWarps / 2), tile_row = 16 * pair, row = first + tile_row;
  const bool values = threadIdx.x < kThreads / 2;
  copy_rows<Own, kThreads>(k_tile, a.k, head_data<T>(a.k, batch, kv_head), first, a.keys, a.size);
  copy_rows<Own, kThreads>(v_tile, a.v, head_data<T>(a.v, batch, kv_head), first, a.keys, a.value_size);

  QueryStream loaded = stream;
  const auto load = [&](int, uint32_t stage) {
    copy_queries<Tile>(stage, g, loaded);
    loaded.next();
  };
  float gradient[1][kD / 8][4] = {};   // of values, or of keys
  const Stages<Tile, decltype(load)> stages(v_tile + Own::kBytes, stream.steps(), load);
  const auto gather = [&](int step, int head, int start, bool edge) {
    const uint32_t stage = stages.arrive(step);
    const auto statistics = Tile::statistics(stage);
    if (row >= a.keys || (edge && a.causal && start + Tile::kStream <= row)) return;   // no query sees this pair's keys
    float s[1][kNs][4] = {};   // [keys, queries]
    if (values) {
      multiply_features<Own, Stream>(s, k_tile, tile_row, stage, 0, a.size);
      make_scores<T, true>(s, row, start, a, batch, head, edge && on_edge(a, start, row + 16));
      statistics.make_probabilities(s);
      hand_over(s, exchange, pair);
      multiply_held<Across>(gradient, s, stage + Stream::kBytes, a.value_size);
    } else {
      float p[1][kNs][4];
      multiply_features<Own, Stream>(s, v_tile, tile_row, stage + Stream::kBytes, 0, a.value_size);
      take_over(p, exchange, pair);
      statistics.make_gradients(s, p);
      multiply_held<Across>(gradient, s, stage, a.size);
    }
  };
  stream.each_tile(a, first, Tile::kOwn, [&](int step) { stages.arrive(step); }, gather);
  cp_async_wait<0>();
  __syncthreads();
  if (values)
    store_values<Own>(g, stream, v_tile, tile_row, gradient);
  else
    store_keys<Own>(g, stream, k_tile, tile_row, gradient);
}

// Two stages of queries and dO beside 64 keys and values, one warpgroup for dV and one for dK.
template <class T, int kD>
struct KeysPairGroupTile {
  static constexpr int kThreads = 256, kOwn = kGroupRows, kStream = 64, kNs = kStream / 8;
  using Own = Panels<T, kOwn, kD>;
  using Stream = Panels<T, kStream, kD>;
  static constexpr int kExchange = 2 * Own::kBytes + 2 * GroupStage<Stream>::kBytes;
  static constexpr int kBytes = kExchange + 4 * kNs * 512;
};

template <class T, int kD>
__device__ __forceinline__ void attention_backward_dkdv_group_pair(const AttentionBackwardCudaArgs& g,
                                                                   uint32_t memory) {
  using Tile = KeysPairGroupTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kNs = Tile::kNs;
  const AttentionCudaArgs& a = g.forward;
  const uint32_t k_tile = memory, v_tile = k_tile + Own::kBytes, exchange = memory + Tile::kExchange;
  const int pair = threadIdx.x / 32 % 4, tile_row = 16 * pair;
  GroupStages<T, Stream, kThreads> stages(g, QueryStream(a, Tile::kOwn, Tile::kStream), v_tile + Own::kBytes);
  const int batch = stages.next.batch, kv_head = stages.next.kv_head, first = stages.next.first;
  Own::template copy<kThreads>(k_tile, a.k, head_data<T>(a.k, batch, kv_head), first, a.keys, a.size);
  Own::template copy<kThreads>(v_tile, a.v, head_data<T>(a.v, batch, kv_head), first, a.keys, a.value_size);
  stages.begin();

  float gradient[1][kD / 8][4] = {};   // of values, or of keys
  float s[1][kNs][4];                  // [keys, queries]
  uint32_t held[Tile::kStream / 16][4];
  const auto finish = [&](uint32_t other) {
    pack_held<T>(held, s[0]);
    wgmma_fence();
    group_multiply_held<Stream, T>(gradient[0], held, other);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_arrived(gradient[0]);
  };
  const auto multiply_tiles = [&](uint32_t own, uint32_t other) {
    wgmma_fence();
    group_multiply<Own, Stream, T>(s[0], own, other);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_arrived(s[0]);
  };
  if (warpgroup() == 0) {
    const auto gather = [&](int step, int head, int start, bool edge) {
      const GroupStage<Stream> stage = stages.arrive(step);
      multiply_tiles(k_tile, stage.queries());
      make_scores<T, true>(s, first + tile_row, start, a, batch, head, edge);
      stage.statistics.make_probabilities(s);
      hand_over(s, exchange, pair);
      finish(stage.gradients());
    };
    stages.each_tile(0, gather);
  } else {
    const auto gather = [&](int step, int, int, bool) {
      const GroupStage<Stream> stage = stages.arrive(step);
      float p[1][kNs][4];
      multiply_tiles(v_tile, stage.gradients());
      take_over(p, exchange, pair);
      stage.statistics.make_gradients(s, p);
      finish(stage.queries());
    };
    stages.each_tile(0, gather);
  }
  using Out = typename Own::Whole;
  cp_async_wait<0>();     // where no query sees a key: they are still on their way
  barrier<kThreads>(1);   // nobody reads keys and values any more
  if (warpgroup() == 0)
    store_values<Out>(g, stages.next, v_tile, tile_row, gradient);
  else
    store_keys<Out>(g, stages.next, k_tile, tile_row, gradient);
}

}  // namespace pyfast
