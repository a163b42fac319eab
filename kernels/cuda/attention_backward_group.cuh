// The gradients of attention on sm_90a: warpgroups of 64 queries, or keys, in registers; the others stream past.
//
// A warpgroup turns one product into the left operand of the next in its own registers: the scores [queries, keys] for
// dQ, and transposed for dK and dV. While it does, tensor cores have another product of its own, or of the other
// warpgroup. Seven products for each pair of tiles, as in attention_backward.cuh.
#pragma once

#include "attention_softmax.cuh"
#include "attention_warpgroup.cuh"

namespace pyfast {

// P of a score: P <= 1 also where lse has lost the sum.
__device__ __forceinline__ float probability(float score, float lse) {
  return score_exp(fminf(score - lse, 0.0f));
}

// delta = the sums of dO * O over the warp's 16 queries from `row` on: as lanes have rows of a product, and to global
// memory for the other gradients. dO lies in shared memory, its chunks at(row of the warp, chunk). Eight lanes share a
// row. Of float32 it is added up as the products add up dP, in runs of features: a query that sees one key has O = V
// and dS = 0, to the bit.
template <class T, class At>
__device__ __forceinline__ void make_delta(float (&delta)[2], const AttentionBackwardCudaArgs& g, int batch, int head,
                                           int row, const At& at) {
  constexpr int kSize = 16 / int(sizeof(T));
  const AttentionCudaArgs& a = g.forward;
  const T* const out = head_data<T>(a.out, batch, head);
  const int lane = lane_id();
#pragma unroll 1
  for (int first = 0; first < 16; first += 4) {
    const int query = row + first + lane / 8;
    float sum = 0.0f;
    for (int start = 0; start < a.value_size; start += 8 * kSize) {   // zeros past the last feature, and query
      const int chunk = start / kSize + lane % 8, count = a.value_size - chunk * kSize;
      union Chunk {
        uint4 whole;
        T part[kSize];
      } x, y;
      x.whole = load_shared_chunk(at(first + lane / 8, chunk));
      const T* const from = out + query * a.out.time + chunk * kSize;
      y.whole = query < a.queries && a.out.aligned && count >= kSize
                    ? *reinterpret_cast<const uint4*>(from)
                    : gather(from, query < a.queries ? count * int(sizeof(T)) : 0);
      float part = 0.0f;
      if constexpr (sizeof(T) == 4) {
        static_assert(8 * kSize == kRun);
#pragma unroll
        for (int other = 0; other < 8; ++other)
#pragma unroll
          for (int e = 0; e < kSize; ++e)
            part = fmaf(__shfl_sync(~0u, x.part[e], other, 8), __shfl_sync(~0u, y.part[e], other, 8), part);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e) part += float(x.part[e]) * float(y.part[e]);
      }
      sum += part;
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    }
    const float own = __shfl_sync(~0u, sum, lane / 4 % 4 * 8);   // of row lane / 4 of the product, or eight further
#pragma unroll
    for (int h = 0; h < 2; ++h) delta[h] = first == 8 * h + lane / 16 * 4 ? own : delta[h];
  }
  float* const to = g.delta + (int64_t(batch) * a.heads + head) * a.queries;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int query = row + 8 * h + lane / 4;
    if (lane % 4 == 0 && query < a.queries + mutant(148)) to[query] = delta[h];
  }
}

// 128 queries and their dO stay; keys stream through three stages, for what their last product has still to read
// while the next ones arrive, and values through two.
template <class T, int kD>
struct QueryGradientGroupTile {
  static constexpr int kThreads = 256, kOwn = 2 * kGroupRows, kStream = kD > 128 ? 32 : 64;
  using Own = Panels<T, kOwn, kD>;
  using Stream = Panels<T, kStream, kD>;
  static constexpr int kBytes = 2 * Own::kBytes + 5 * Stream::kBytes;
};

template <class T, int kD>
__device__ __forceinline__ void attention_backward_dq_groups(const AttentionBackwardCudaArgs& g, uint32_t memory) {
  using Tile = QueryGradientGroupTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kStream = Tile::kStream;
  const AttentionCudaArgs& a = g.forward;
  const QueryBlock<Tile::kOwn> block(a);
  const T* const k = head_data<T>(a.k, block.batch, block.kv_head);
  const T* const v = head_data<T>(a.v, block.batch, block.kv_head);
  const uint32_t q_tile = memory + warpgroup() * Own::kBlockBytes, dout_tile = q_tile + Own::kBytes;
  const uint32_t k_stages = memory + 2 * Own::kBytes, v_stages = k_stages + 3 * Stream::kBytes;
  const int tile_row = threadIdx.x / 32 * 16, row = block.first + tile_row;

  // Tiles of keys: of the block; of them those that this warpgroup sees, and sees in full.
  const int steps = (block.end + kStream - 1) / kStream, group_first = block.first + warpgroup() * kGroupRows;
  const int seen = a.causal ? (group_first + kGroupRows) / kStream : steps;
  const int own = group_first >= a.queries ? 0 : min(steps, seen);
  const int whole = block.seen_by_all(a, warpgroup() * kGroupRows) / kStream;   // others are at an edge

  const auto k_stage = [&](int step) { return k_stages + step % 3 * Stream::kBytes; };
  const auto v_stage = [&](int step) { return v_stages + step % 2 * Stream::kBytes; };
  const auto load = [&](int step) {
    Stream::template copy<kThreads>(k_stage(step), a.k, k, step * kStream, a.keys, a.size);
    Stream::template copy<kThreads>(v_stage(step), a.v, v, step * kStream, a.keys, a.value_size);
    cp_async_commit();
  };
  // The tile after `step` is there for all warps, which read those before `step` no more.
  const auto arrive = [&](int step) {
    cp_async_wait<0>();
    if (!mutant(160)) fence_async_proxy();
    if (!mutant(161)) barrier<kThreads>(1);
    if (step + 2 < steps) load(step + 2);
  };
  Own::template copy<kThreads>(memory, a.q, head_data<T>(a.q, block.batch, block.head), block.first, a.queries, a.size);
  Own::template copy<kThreads>(memory + Own::kBytes, g.grad_out, head_data<T>(g.grad_out, block.batch, block.head),
                               block.first, a.queries, a.value_size);
  load(0);
  arrive(-1);

  float lse[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {   // a query that does not exist has an infinite lse: p = 0
    const int query = row + 8 * h + lane_id() / 4;
    const int64_t at = (int64_t(block.batch) * a.heads + block.head) * a.queries + query;
    lse[h] = query < a.queries ? a.lse[at] : kInfinity;
  }
  make_delta<T>(delta, g, block.batch, block.head, row, [&](int line, int chunk) {
    using Panel = typename Own::Panel;
    const uint32_t panel = dout_tile + chunk / Panel::kChunks * Panel::kBytes;
    return panel + Panel::offset(tile_row % kGroupRows + line, chunk % Panel::kChunks);
  });
  float s[1][kStream / 8][4], dp[1][kStream / 8][4], dq[1][kD / 8][4] = {};
  uint32_t ds[kStream / 16][4];
  const auto start_scores = [&](int step) {
    group_multiply<Own, Stream, T>(s[0], q_tile, k_stage(step));
    wgmma_commit();
    group_multiply<Own, Stream, T>(dp[0], dout_tile, v_stage(step));
    wgmma_commit();
  };
  const auto start_gradient = [&](int step) {
    group_multiply_held<Stream, T>(dq[0], ds, k_stage(step));
    wgmma_commit();
  };
  const auto make_probabilities = [&](int step, bool edge) {
    wgmma_arrived(s[0]);
    make_scores<T>(s, row, step * kStream, a, block.batch, block.head, edge);
#pragma unroll
    for (int j = 0; j < kStream / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) s[0][j][r] = probability(s[0][j][r], lse[r / 2]);
  };
  const auto make_gradient = [&] {
    wgmma_arrived(dp[0]);
#pragma unroll
    for (int j = 0; j < kStream / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) s[0][j][r] *= dp[0][j][r] - delta[r / 2];
  };
  // Adds what tile `step` gives to dQ while dS of the next one is made.
  const auto advance = [&](int step, bool edge) {
    arrive(step);
    if (!mutant(162)) wgmma_fence();
    start_scores(step + 1);
    start_gradient(step);
    if (edge)
      wgmma_wait<0>();   // for all: masks need the registers
    else
      wgmma_wait<2>();
    make_probabilities(step + 1, edge);
    wgmma_wait<1>();
    make_gradient();
    if (!mutant(163)) wgmma_wait<0>();
    wgmma_arrived(dq[0]);
    pack_held<T>(ds, s[0]);
  };
  int step = 0;
  if (own > 0) {
    wgmma_fence();
    start_scores(0);
    wgmma_wait<0>();
    make_probabilities(0, whole == 0);
    make_gradient();
    pack_held<T>(ds, s[0]);
    for (; step + 1 < whole; ++step) advance(step, false);
    for (; step + 1 < own; ++step) advance(step, true);
    arrive(step);
    wgmma_fence();
    start_gradient(step++);
    wgmma_wait<0>();
    wgmma_arrived(dq[0]);
  }
  for (; step < steps; ++step) arrive(step);

#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) dq[0][j][r] *= a.scale;
  barrier<kThreads>(1);   // nobody reads the queries any more
  T* const to = head_data<T>(g.grad_q, block.batch, block.head) + row * g.grad_q.time;
  store_rows<typename Own::Whole>(memory, tile_row, dq, to, g.grad_q.time, a.queries - row, a.size, g.grad_q.aligned);
}

}  // namespace pyfast
