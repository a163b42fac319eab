// The forward pass of attention on sm_90a: two warpgroups of 64 queries, scores and output in registers.
//
// While the tensor cores add P V of one tile of keys, the warpgroup makes the probabilities of the next one, whose
// scores were multiplied before it; the other warpgroup fills what is left.
//
// Bound: of 128 queries, 64 keys and 64 features 1024 clocks... see attention_forward.cuh for sm_80.
#pragma once

#include "attention_softmax.cuh"
#include "attention_warpgroup.cuh"

namespace pyfast {

// Two stages of keys and two of values, beside the queries of both warpgroups.
template <class T, int kD>
struct ForwardGroupTile {
  static constexpr int kThreads = 256, kQueries = 2 * kGroupRows, kKeys = 64;
  using Q = Panels<T, kQueries, kD>;
  using Stream = Panels<T, kKeys, kD>;
  static constexpr int kBytes = Q::kBytes + 4 * Stream::kBytes;
};

template <class T, int kD>
__device__ __forceinline__ void attention_forward_groups(const AttentionCudaArgs& a, uint32_t memory) {
  using Tile = ForwardGroupTile<T, kD>;
  using Q = typename Tile::Q;
  using Stream = typename Tile::Stream;
  constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  const QueryBlock<Tile::kQueries> block(a);
  const T* const k = head_data<T>(a.k, block.batch, block.kv_head);
  const T* const v = head_data<T>(a.v, block.batch, block.kv_head);
  const uint32_t q_tile = memory + warpgroup() * Q::kBlockBytes, k_stages = memory + Q::kBytes;
  const uint32_t v_stages = k_stages + 2 * Stream::kBytes;
  const int tile_row = threadIdx.x / 32 * 16, row = block.first + tile_row;

  // Tiles of keys: of the block; of them those that this warpgroup sees, and sees in full.
  const int steps = (block.end + kKeys - 1) / kKeys, group_first = block.first + warpgroup() * kGroupRows;
  const int own = group_first >= a.queries ? 0 : a.causal ? min(steps, group_first / kKeys + 1) : steps;
  const int whole = block.seen_by_all(a, warpgroup() * kGroupRows) / kKeys;

  const auto load_keys = [&](int step) {
    Stream::template copy<kThreads>(k_stages + step % 2 * Stream::kBytes, a.k, k, step * kKeys, a.keys, a.size);
  };
  const auto load_values = [&](int step) {
    Stream::template copy<kThreads>(v_stages + step % 2 * Stream::kBytes, a.v, v, step * kKeys, a.keys, a.value_size);
  };
  // Keys of step + 1 and values of step are there for all warps, which read the stages before them no more.
  const auto arrive = [&](int step) {
    cp_async_wait<0>();
    if (!mutant(151)) fence_async_proxy();
    if (!mutant(155)) barrier<kThreads>(1);
    if (step + 2 < steps) load_keys(step + 2);
    if (step + 1 < steps) load_values(step + 1);
    cp_async_commit();
  };
  Q::template copy<kThreads>(memory, a.q, head_data<T>(a.q, block.batch, block.head), block.first, a.queries, a.size);
  load_keys(0);
  cp_async_commit();
  arrive(-1);

  OnlineSoftmax<T, 1> softmax(a);
  float s[1][kKeys / 8][4], corrections[1][2], out[1][kD / 8][4] = {};
  uint32_t p[kKeys / 16][4];
  const auto start_scores = [&](int step) {
    group_multiply<Q, Stream, T>(s[0], q_tile, k_stages + step % 2 * Stream::kBytes);
    wgmma_commit();
  };
  const auto start_values = [&](int step) {
    group_multiply_held<Stream, T>(out[0], p, v_stages + step % 2 * Stream::kBytes);
    wgmma_commit();
  };
  // Adds the values of tile `step` while the probabilities of the next one are made.
  const auto advance = [&](int step, bool edge) {
    arrive(step);
    if (!mutant(156)) wgmma_fence();
    start_scores(step + 1);
    start_values(step);
    if (edge)
      wgmma_wait<0>();   // for all: masks need the registers
    else
      wgmma_wait<1 + mutant(150)>();
    wgmma_arrived(s[0]);
    make_forward_scores<T>(s, row, (step + 1) * kKeys, a, block.batch, block.head, edge);
    softmax.update(s, corrections);
    wgmma_wait<0>();
    wgmma_arrived(out[0]);
    scale_rows(out, corrections);
    pack_held<T>(p, s[0]);
  };
  int step = 0;
  if (own > 0) {
    wgmma_fence();
    start_scores(0);
    wgmma_wait<0>();
    wgmma_arrived(s[0]);
    make_forward_scores<T>(s, row, 0, a, block.batch, block.head, whole == 0);
    softmax.update(s, corrections);
    pack_held<T>(p, s[0]);
    for (; step + 1 < whole; ++step) advance(step, false);
    for (; step + 1 < own; ++step) advance(step, true);
    arrive(step);
    wgmma_fence();
    start_values(step++);
    wgmma_wait<0>();
    wgmma_arrived(out[0]);
  }
  for (; step < steps; ++step) arrive(step);

  barrier<kThreads>(1);   // nobody reads the queries any more
  store_output<typename Q::Whole, T>(a, block, softmax, out, memory, tile_row);
}

}  // namespace pyfast
