// What the kernels of dK and dV share: the queries that stream past a block of keys, and what it stores at the end.
#pragma once

#include "attention_tiles.cuh"

namespace pyfast {

// The tiles of kStream queries that a block of keys meets, head after head of those that share them. Tiles that see
// none of the keys are left out.
struct QueryStream {
  int batch, kv_head, first;           // the block's first key
  int group, tiles, skipped, stream;   // heads; tiles of each head, and those left out before them; queries of a tile
  int at_head = 0, at_tile = 0;

  __device__ __forceinline__ QueryStream(const AttentionCudaArgs& a, int own, int stream) : stream(stream) {
    const int blocks = (a.keys + own - 1) / own;
    group = a.heads / a.kv_heads, kv_head = int(blockIdx.x) / blocks % a.kv_heads;
    batch = int(blockIdx.x) / blocks / a.kv_heads, first = int(blockIdx.x) % blocks * own;
    skipped = a.causal ? min(first, a.queries) / stream : 0;
    tiles = (a.queries + stream - 1) / stream - skipped;
  }
  __device__ __forceinline__ int steps() const { return tiles * group; }
  __device__ __forceinline__ int head() const { return kv_head * group + (mutant(149) ? 0 : at_head); }
  __device__ __forceinline__ int start() const { return (skipped + at_tile) * stream; }
  __device__ __forceinline__ void next() {
    if (++at_tile == tiles) at_tile = 0, ++at_head;
  }

  // Of each head: gather(step, head, first query, edge) for every tile that sees some of the `own` keys from `key` on,
  // arrive(step) alone for those before. `edge`: some query may not see some key.
  template <class Arrive, class Gather>
  __device__ __forceinline__ void each_tile(const AttentionCudaArgs& a, int key, int own, const Arrive& arrive,
                                            const Gather& gather) const {
    const int left_out = key >= a.keys ? tiles : a.causal ? min(tiles, key / stream - skipped) : 0;
    const int diagonal = a.causal ? (key + own + stream - 2) / stream - skipped : 0;   // tiles before its end
    const int edges = a.mask.kind != ScoreMaskKind::none ? tiles : min(tiles, max(left_out, diagonal));
    int step = 0;
    for (int h = 0; h < group; ++h) {
      const int head = kv_head * group + (mutant(149) ? 0 : h);
      int tile = 0;
      for (; tile < left_out; ++tile) arrive(step++);
      for (; tile < edges; ++tile) gather(step++, head, (skipped + tile) * stream, true);
      for (; tile < tiles; ++tile) gather(step++, head, (skipped + tile) * stream, false);
    }
  }
};

// lse and delta of the queries of a tile, in shared memory.
template <class T, int kQueries>
struct QueryStatistics {
  static constexpr int kBytes = 2 * kQueries * 4;
  uint32_t at;

  // An asynchronous copy. Queries that do not exist are zeros, as their features: P = 1 times dO = 0, dS = 1 (0 - 0).
  __device__ __forceinline__ void copy(const AttentionBackwardCudaArgs& g, int batch, int head, int start) const {
    if (threadIdx.x >= 2 * kQueries) return;
    const AttentionCudaArgs& a = g.forward;
    const int query = start + int(threadIdx.x) % kQueries;
    const float* const from = threadIdx.x < kQueries ? a.lse : g.delta;
    const bool there = query < a.queries;
    cp_async_word(at + threadIdx.x * 4, from + (int64_t(batch) * a.heads + head) * a.queries + (there ? query : 0),
                  there ? 4 : 0);
  }

  // P of scores [keys, queries].
  template <int kNs>
  __device__ __forceinline__ void make_probabilities(float (&s)[1][kNs][4]) const {
#pragma unroll
    for (int j = 0; j < kNs; ++j) {
      const float2 lse = load_shared_pair(at + (8 * j + lane_id() % 4 * 2) * 4);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        s[0][j][r] = probability(s[0][j][r], r % 2 ? lse.y : lse.x);
    }
  }
  // dP becomes dS = P (dP - delta).
  template <int kNs>
  __device__ __forceinline__ void make_gradients(float (&dp)[1][kNs][4], const float (&p)[1][kNs][4]) const {
#pragma unroll
    for (int j = 0; j < kNs; ++j) {
      const float2 delta = load_shared_pair(at + (kQueries + 8 * j + lane_id() % 4 * 2) * 4);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float mean = mutant(167) ? 0.0f : r % 2 ? delta.y : delta.x;
        dp[0][j][r] = p[0][j][r] * (dp[0][j][r] - mean);
      }
    }
  }
};

template <class Own, int kNj, class T = typename Own::Element>
__device__ __forceinline__ void store_keys(const AttentionBackwardCudaArgs& g, const QueryStream& s, uint32_t tile,
                                           int tile_row, float (&dk)[1][kNj][4]) {
#pragma unroll
  for (int j = 0; j < kNj; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) dk[0][j][r] *= g.forward.scale;
  const int row = s.first + tile_row;
  store_rows<Own>(tile, tile_row, dk, head_data<T>(g.grad_k, s.batch, s.kv_head) + row * g.grad_k.time, g.grad_k.time,
                  g.forward.keys - row, g.forward.size, g.grad_k.aligned);
}

template <class Own, int kNj, class T = typename Own::Element>
__device__ __forceinline__ void store_values(const AttentionBackwardCudaArgs& g, const QueryStream& s, uint32_t tile,
                                             int tile_row, float (&dv)[1][kNj][4]) {
  const int row = s.first + tile_row;
  store_rows<Own>(tile, tile_row, dv, head_data<T>(g.grad_v, s.batch, s.kv_head) + row * g.grad_v.time, g.grad_v.time,
                  g.forward.keys - row, g.forward.value_size, g.grad_v.aligned);
}

}  // namespace pyfast
