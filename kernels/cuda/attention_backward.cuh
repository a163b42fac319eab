// The gradients of attention, in kernels that each own what they write: no atomics, one order of every sum.
//
// With P = e^(s - lse) computed again: dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta = the row sums of dO * O,
// dQ = scale dS K, dK = scale dS^T Q. Seven products of tiles where one kernel with atomics would need five.
//
// Bound: tensor cores, then shared memory: a warp owns 16 rows and reads both tiles that stream past twice, 0.75 KB of
// fragments for an mma of 4096 FLOP.
#pragma once

#include "attention_backward_group.cuh"

namespace pyfast {

// A block of kWarps warps owns 16 rows in each, of queries or of keys, and streams kStream rows of the others through
// kStages stages. At most 99 KB: what GPUs of capability 8.6 and 8.9 have.
template <class T, int kD, int kWarpCount = (sizeof(T) == 4 && kD > 128 ? 2 : 4)>
struct BackwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWarpCount, kThreads = 32 * kWarps, kOwn = 16 * kWarps;
  static constexpr int kStream = kWide ? (kD > 128 ? 16 : 32) : kD > 64 ? 32 : 64;
  static constexpr int kStages = kD > (kWide ? 64 : 128) ? 1 : 2;
  using Own = SharedTile<T, Major::depth, kOwn, kD>;
  using Stream = SharedTile<T, Major::depth, kStream, kD>;
  using Across = SharedTile<T, Major::rows, kD, kStream>;   // the same bytes: the transpose of what streams
  static constexpr int kStageBytes = 2 * Stream::kBytes, kBytes = 2 * Own::kBytes + kStages * kStageBytes;
};

// The stages that a block fills and reads in turn: `steps` of them, by load(index, stage's address).
template <class Tile, class Load>
struct Stages {
  uint32_t memory;
  int steps;
  const Load& load;

  __device__ __forceinline__ Stages(uint32_t memory, int steps, const Load& load)
      : memory(memory), steps(steps), load(load) {
    if (Tile::kStages > 1 && steps > 0) load(0, memory);
    cp_async_commit();
  }
  __device__ __forceinline__ uint32_t stage(int step) const {
    return memory + step % Tile::kStages * Tile::kStageBytes;
  }
  // Stage `step` is there for all threads, which read the one before no more.
  __device__ __forceinline__ uint32_t arrive(int step) const {
    if (Tile::kStages == 1) {
      __syncthreads();   // nobody reads the stage any more
      load(step, stage(step));
      cp_async_commit();
    }
    cp_async_wait<mutant(146)>();   // this stage has arrived ...
    if (!mutant(145)) __syncthreads();   // ... for all threads, and nobody reads the other one any more
    if (Tile::kStages > 1) {
      if (step + 1 < steps) load(step + 1, stage(step + 1));
      cp_async_commit();
    }
    return stage(step);
  }
};

template <class T, int kD, int kWarps>
__device__ __forceinline__ void attention_backward_dq_tile(const AttentionBackwardCudaArgs& g, uint32_t memory) {
  using Tile = BackwardTile<T, kD, kWarps>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads;
  const AttentionCudaArgs& a = g.forward;
  const uint32_t q_tile = memory, dout_tile = q_tile + Own::kBytes;
  const QueryBlock<Tile::kOwn> block(a);
  const int batch = block.batch, head = block.head, first = block.first;
  const int tile_row = threadIdx.x / 32 * 16, row = first + tile_row;
  const T* const k = head_data<T>(a.k, batch, block.kv_head);
  const T* const v = head_data<T>(a.v, batch, block.kv_head);
  copy_rows<Own, kThreads>(q_tile, a.q, head_data<T>(a.q, batch, head), first, a.queries, a.size);
  copy_rows<Own, kThreads>(dout_tile, g.grad_out, head_data<T>(g.grad_out, batch, head), first, a.queries,
                           a.value_size);

  float lse[2], delta[2], dq[1][kD / 8][4] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {   // a query that does not exist has an infinite lse: p = 0
    const int query = row + 8 * h + lane_id() / 4;
    const int64_t at = (int64_t(batch) * a.heads + head) * a.queries + query;
    lse[h] = query < a.queries ? a.lse[at] : kInfinity;
  }
  const auto load = [&](int step, uint32_t stage) {
    copy_rows<Stream, kThreads>(stage, a.k, k, step * Tile::kStream, a.keys, a.size);
    copy_rows<Stream, kThreads>(stage + Stream::kBytes, a.v, v, step * Tile::kStream, a.keys, a.value_size);
  };
  const int steps = (block.end + Tile::kStream - 1) / Tile::kStream;
  const int whole = sizeof(T) == 4 ? 0 : block.seen_by_all(a) / Tile::kStream;   // a second loop of FMA would spill
  const Stages<Tile, decltype(load)> stages(dout_tile + Own::kBytes, steps, load);
  cp_async_wait<0>();   // dO has arrived ...
  __syncthreads();      // ... for all threads
  make_delta<T>(delta, g, batch, head, row,
                [&](int line, int chunk) { return dout_tile + Own::offset(tile_row + line, chunk); });
  const auto gather = [&](int step, bool edge) {
    const int start = step * Tile::kStream;
    const uint32_t stage = stages.arrive(step);
    if (row >= a.queries || (edge && a.causal && start > row + 15)) return;   // no query of this warp sees them
    float s[1][Tile::kStream / 8][4] = {}, dp[1][Tile::kStream / 8][4] = {};
    multiply_features<Own, Stream>(s, q_tile, tile_row, stage, 0, a.size);
    make_scores<T>(s, row, start, a, batch, head, edge && on_edge(a, row, start + Tile::kStream));
    multiply_features<Own, Stream>(dp, dout_tile, tile_row, stage + Stream::kBytes, 0, a.value_size);
#pragma unroll
    for (int j = 0; j < Tile::kStream / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        s[0][j][r] = probability(s[0][j][r], lse[r / 2]) * (dp[0][j][r] - (mutant(147) ? 0.0f : delta[r / 2]));
    multiply_held<typename Tile::Across>(dq, s, stage, a.size);
  };
  int step = 0;
  for (; step < whole; ++step) gather(step, false);
  for (; step < steps; ++step) gather(step, true);
#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) dq[0][j][r] *= a.scale;
  cp_async_wait<0>();   // where no key is seen: the queries are still on their way
  __syncthreads();
  store_rows<Own>(q_tile, tile_row, dq, head_data<T>(g.grad_q, batch, head) + row * g.grad_q.time, g.grad_q.time,
                  a.queries - row, a.size, g.grad_q.aligned);
}

// The rows of dQ of one block of queries. kGroups: for GPUs of capability 9.0, in blocks of two warpgroups.
template <class T, int kD, bool kGroups>
__global__ void __launch_bounds__(kGroups ? 256 : BackwardTile<T, kD>::kThreads, kGroups ? 1 : 2)
    attention_backward_dq_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  extern __shared__ __align__(1024) unsigned char memory[];
  if constexpr (kGroups && kHasWarpgroups)
    attention_backward_dq_groups<T, kD>(g, shared_address(memory));
  else if constexpr (launched_here<T, kGroups>())
    attention_backward_dq_tile<T, tile_size(kD), kGroups ? 8 : BackwardTile<T, kD>::kWarps>(g, shared_address(memory));
  else
    __trap();   // never launched
}

template <class T, int kD, bool kGroups>
cudaError_t launch_attention_dq_of(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const AttentionCudaArgs& a = g.forward;
  using Tile = BackwardTile<T, tile_size(kD), kGroups ? 8 : BackwardTile<T, kD>::kWarps>;
  const int bytes = kGroups ? std::max(QueryGradientGroupTile<T, kD>::kBytes, Tile::kBytes) : Tile::kBytes;
  const int64_t blocks = int64_t(a.batch) * a.heads * ((a.queries + Tile::kOwn - 1) / Tile::kOwn);
  return launch_tiles(attention_backward_dq_kernel<T, kD, kGroups>, blocks, Tile::kThreads, bytes, g, stream);
}

template <class T>
cudaError_t launch_attention_dq(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  return dispatch_heads<T>(g.forward, [&](auto size, auto groups) {
    return launch_attention_dq_of<T, decltype(size)::value, decltype(groups)::value>(g, stream);
  });
}

}  // namespace pyfast
