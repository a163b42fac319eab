// dK and dV of attention on sm_90a: warpgroups of 64 keys, past which the queries of all their heads stream.
#pragma once

#include "attention_backward_group.cuh"
#include "attention_keys_stream.cuh"

namespace pyfast {

// A tile of queries and of dO in shared memory, with lse and delta of its queries.
template <class Stream>
struct GroupStage {
  using Statistics = QueryStatistics<typename Stream::Element, Stream::kRows>;
  static constexpr int kBytes = 2 * Stream::kBytes + Statistics::kBytes;
  uint32_t tiles;
  Statistics statistics;

  __device__ __forceinline__ uint32_t queries() const { return tiles; }
  __device__ __forceinline__ uint32_t gradients() const { return tiles + Stream::kBytes; }
};

// The two stages that a block of keys fills and reads in turn.
template <class T, class Stream, int kThreads>
struct GroupStages {
  using Stage = GroupStage<Stream>;
  const AttentionBackwardCudaArgs& g;
  QueryStream next;   // to be loaded
  uint32_t memory;
  int steps;

  __device__ __forceinline__ GroupStages(const AttentionBackwardCudaArgs& g, const QueryStream& stream, uint32_t at)
      : g(g), next(stream), memory(at), steps(stream.steps()) {}

  __device__ __forceinline__ Stage stage(int step) const {
    return {memory + step % 2 * 2 * Stream::kBytes,
            {memory + 4 * Stream::kBytes + step % 2 * Stage::Statistics::kBytes}};
  }

  __device__ __forceinline__ void load(int step) {
    const AttentionCudaArgs& a = g.forward;
    const int batch = next.batch, head = next.head(), start = next.start();
    const Stage to = stage(step);
    Stream::template copy<kThreads>(to.queries(), a.q, head_data<T>(a.q, batch, head), start, a.queries, a.size);
    Stream::template copy<kThreads>(to.gradients(), g.grad_out, head_data<T>(g.grad_out, batch, head), start, a.queries,
                                    a.value_size);
    to.statistics.copy(g, batch, head, start);
    cp_async_commit();
    next.next();
  }
  __device__ __forceinline__ void begin() {
    if (steps > 0) load(0);
  }
  // Step `step` is there for all warps, which read the one before no more.
  __device__ __forceinline__ Stage arrive(int step) {
    cp_async_wait<0>();
    if (!mutant(164)) fence_async_proxy();
    if (!mutant(165)) barrier<kThreads>(1);
    if (step + 1 < steps) load(step + 1);
    return stage(step);
  }

  template <class Gather>
  __device__ __forceinline__ void each_tile(int row, const Gather& gather) {
    const QueryStream stream = next;   // a copy: the loads go on in `next`
    stream.each_tile(g.forward, stream.first + row, kGroupRows, [&](int step) { arrive(step); }, gather);
  }
};

template <class T, int kD>
struct KeysGroupTile {
  static constexpr int kThreads = 256, kOwn = 2 * kGroupRows, kStream = 64;
  using Own = Panels<T, kOwn, kD>;
  using Stream = Panels<T, kStream, kD>;
  static constexpr int kBytes = 2 * Own::kBytes + 2 * GroupStage<Stream>::kBytes;
};

template <class T, int kD>
__device__ __forceinline__ void attention_backward_dkdv_groups(const AttentionBackwardCudaArgs& g, uint32_t memory) {
  using Tile = KeysGroupTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kNs = Tile::kStream / 8;
  const AttentionCudaArgs& a = g.forward;
  const uint32_t v_tiles = memory + Own::kBytes;
  const uint32_t k_tile = memory + warpgroup() * Own::kBlockBytes, v_tile = k_tile + Own::kBytes;
  GroupStages<T, Stream, kThreads> stages(g, QueryStream(a, Tile::kOwn, Tile::kStream), v_tiles + Own::kBytes);
  const int batch = stages.next.batch, kv_head = stages.next.kv_head, first = stages.next.first;
  const int tile_row = threadIdx.x / 32 * 16;
  Own::template copy<kThreads>(memory, a.k, head_data<T>(a.k, batch, kv_head), first, a.keys, a.size);
  Own::template copy<kThreads>(v_tiles, a.v, head_data<T>(a.v, batch, kv_head), first, a.keys, a.value_size);
  stages.begin();

  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
  stages.each_tile(warpgroup() * kGroupRows, [&](int step, int head, int start, bool edge) {
    float s[1][kNs][4], dp[1][kNs][4];   // [keys, queries]
    uint32_t p[Tile::kStream / 16][4], ds[Tile::kStream / 16][4];
    const GroupStage<Stream> stage = stages.arrive(step);
    wgmma_fence();
    group_multiply<Own, Stream, T>(s[0], k_tile, stage.queries());
    wgmma_commit();
    group_multiply<Own, Stream, T>(dp[0], v_tile, stage.gradients());
    wgmma_commit();
    wgmma_wait<1 + mutant(166)>();
    wgmma_arrived(s[0]);
    make_scores<T, true>(s, first + tile_row, start, a, batch, head, edge);
    stage.statistics.make_probabilities(s);
    pack_held<T>(p, s[0]);
    wgmma_fence();
    group_multiply_held<Stream, T>(dv[0], p, stage.gradients());
    wgmma_commit();
    wgmma_wait<1>();   // for dp
    wgmma_arrived(dp[0]);
    stage.statistics.make_gradients(dp, s);
    pack_held<T>(ds, dp[0]);
    wgmma_fence();
    group_multiply_held<Stream, T>(dk[0], ds, stage.queries());
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_arrived(dv[0]);
    wgmma_arrived(dk[0]);
  });
  using Out = typename Own::Whole;
  cp_async_wait<0>();     // where no query sees a key: they are still on their way
  barrier<kThreads>(1);   // nobody reads keys and values any more
  store_keys<Out>(g, stages.next, memory, tile_row, dk);
  store_values<Out>(g, stages.next, v_tiles, tile_row, dv);
}

}  // namespace pyfast
