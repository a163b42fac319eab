// The gradients of attention, in kernels that each own what they write: no atomics, one order of every sum.
//
// With P = 2^(s - lse) computed again: dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta = the row sums of dO * O,
// dQ = scale dS K, dK = scale dS^T Q. Seven products of tiles where one kernel with atomics would need five.
//
// Bound: tensor cores, then shared memory: a warp owns 16 rows and reads both tiles that stream past twice, 0.75 KB of
// fragments for an mma of 4096 FLOP.
#pragma once

#include "attention_tiles.cuh"

namespace pyfast {

// A block of kWarps warps owns 16 rows in each, of queries or of keys, and streams kStream rows of the others through
// kStages stages. At most 96 KB: what GPUs of capability 8.6 and 8.9 have.
template <class T, int kD>
struct BackwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && kD > 128 ? 2 : 4, kThreads = 32 * kWarps, kOwn = 16 * kWarps;
  static constexpr int kStream = kWide ? (kD > 128 ? 16 : 32) : kD > 64 ? 32 : 64;
  static constexpr int kStages = kD > (kWide ? 64 : 128) ? 1 : 2;
  using Own = SharedTile<T, Major::depth, kOwn, kD>;
  using Stream = SharedTile<T, Major::depth, kStream, kD>;
  using Across = SharedTile<T, Major::rows, kD, kStream>;   // the same bytes: the transpose of what streams
  static constexpr int kStageBytes = 2 * Stream::kBytes, kBytes = 2 * Own::kBytes + kStages * kStageBytes;
};

// Runs step(index, stage's address) for `steps` stages that load(index, address) fills.
template <class Tile, class Load, class Step>
__device__ __forceinline__ void stream_stages(uint32_t stages, int steps, const Load& load, const Step& step) {
  if (Tile::kStages > 1 && steps > 0) load(0, stages);
  cp_async_commit();
  for (int i = 0; i < steps; ++i) {
    const uint32_t stage = stages + i % Tile::kStages * Tile::kStageBytes;
    if (Tile::kStages == 1) {
      __syncthreads();   // nobody reads the stage any more
      load(i, stage);
      cp_async_commit();
    }
    cp_async_wait<mutant(146)>();   // this stage has arrived ...
    if (!mutant(145)) __syncthreads();   // ... for all threads, and nobody reads the other one any more
    if (Tile::kStages > 1) {
      if (i + 1 < steps) load(i + 1, stages + (i + 1) % Tile::kStages * Tile::kStageBytes);
      cp_async_commit();
    }
    step(i, stage);
  }
}

// delta[row] = the sum of dO * O over a row. Eight lanes share a row.
template <class T>
__global__ void __launch_bounds__(128) attention_delta_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  const AttentionCudaArgs& a = g.forward;
  constexpr int kSize = 16 / int(sizeof(T));
  const int64_t index = int64_t(blockIdx.x) * 16 + threadIdx.x / 8, heads = index / a.queries;
  const int query = int(index % a.queries), head = int(heads % a.heads);
  const int64_t batch = heads / a.heads;
  float sum = 0.0f;
  if (batch < a.batch) {
    const T* const dout = head_data<T>(g.grad_out, int(batch), head) + query * g.grad_out.time;
    const T* const out = head_data<T>(a.out, int(batch), head) + query * a.out.time;
    union Chunk {
      uint4 whole;
      T part[kSize];
    };
    const auto load = [&](const T* row, int col, bool aligned) {
      const int count = a.value_size - col;
      Chunk chunk;
      chunk.whole = aligned && count >= kSize ? *reinterpret_cast<const uint4*>(row + col)
                                              : gather(row + col, count * int(sizeof(T)));
      return chunk;
    };
    for (int col = threadIdx.x % 8 * kSize; col < a.value_size; col += 8 * kSize) {
      const Chunk x = load(dout, col, g.grad_out.aligned), y = load(out, col, a.out.aligned);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += float(x.part[e]) * float(y.part[e]);
    }
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (batch < a.batch && threadIdx.x % 8 == 0) g.delta[index] = sum;
}

// P and dS of a score: P <= 1 also where lse has lost the sum.
__device__ __forceinline__ float probability(float score, float lse) {
  return exp2_approx(fminf(score - lse, 0.0f));
}

// The rows of dQ of one block of queries.
template <class T, int kD>
__global__ void __launch_bounds__(BackwardTile<T, kD>::kThreads, 2)
    attention_backward_dq_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  using Tile = BackwardTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads;
  const AttentionCudaArgs& a = g.forward;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t q_tile = shared_address(memory), dout_tile = q_tile + Own::kBytes;

  const int blocks = (a.queries + Tile::kOwn - 1) / Tile::kOwn;
  const int block = blocks - 1 - blockIdx.x % blocks, head = blockIdx.x / blocks % a.heads;
  const int batch = blockIdx.x / blocks / a.heads, kv_head = head / (a.heads / a.kv_heads);
  const int first = block * Tile::kOwn, tile_row = threadIdx.x / 32 * 16, row = first + tile_row;
  const int end = a.causal ? min(a.keys, first + Tile::kOwn) : a.keys;
  const T* const k = head_data<T>(a.k, batch, kv_head);
  const T* const v = head_data<T>(a.v, batch, kv_head);
  const HeadMask<T> mask(a.mask, batch, head);
  copy_rows<Own, kThreads>(q_tile, a.q, head_data<T>(a.q, batch, head), first, a.queries, a.size);
  copy_rows<Own, kThreads>(dout_tile, g.grad_out, head_data<T>(g.grad_out, batch, head), first, a.queries,
                           a.value_size);

  float lse[2], delta[2], dq[1][kD / 8][4] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {   // a query that does not exist has an infinite lse: p = 0
    const int query = row + 8 * h + lane_id() / 4;
    const int64_t at = (int64_t(batch) * a.heads + head) * a.queries + query;
    lse[h] = query < a.queries ? a.lse[at] * kLog2e : kInfinity;
    delta[h] = query < a.queries + mutant(148) ? g.delta[at] : 0.0f;
  }
  const auto load = [&](int step, uint32_t stage) {
    copy_rows<Stream, kThreads>(stage, a.k, k, step * Tile::kStream, a.keys, a.size);
    copy_rows<Stream, kThreads>(stage + Stream::kBytes, a.v, v, step * Tile::kStream, a.keys, a.value_size);
  };
  stream_stages<Tile>(dout_tile + Own::kBytes, (end + Tile::kStream - 1) / Tile::kStream, load,
                      [&](int step, uint32_t stage) {
    const int start = step * Tile::kStream;
    if (row >= a.queries || (a.causal && start > row + 15)) return;   // no query of this warp sees them
    float s[1][Tile::kStream / 8][4] = {}, dp[1][Tile::kStream / 8][4] = {};
    multiply<Own, Stream>(s, q_tile, tile_row, stage, 0, a.size);
    multiply<Own, Stream>(dp, dout_tile, tile_row, stage + Stream::kBytes, 0, a.value_size);
    mask_scores(s, row, start, a, mask, on_edge(a, row, start + Tile::kStream));
#pragma unroll
    for (int j = 0; j < Tile::kStream / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        s[0][j][r] = probability(s[0][j][r], lse[r / 2]) * (dp[0][j][r] - (mutant(147) ? 0.0f : delta[r / 2]));
    multiply_held<typename Tile::Across>(dq, s, stage, a.size);
  });
#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) dq[0][j][r] *= a.scale;
  cp_async_wait<0>();   // where no key is seen: the queries are still on their way
  __syncthreads();
  store_rows<Own>(q_tile, tile_row, dq, head_data<T>(g.grad_q, batch, head) + row * g.grad_q.time, g.grad_q.time,
                  a.queries - row, a.size, g.grad_q.aligned);
}

enum class KeyGradients { both, keys, values };   // of wide heads one at a time: registers

// The rows of dK and dV of one block of keys, over all heads of queries that share them.
template <class T, int kD, KeyGradients kWhich>
__global__ void __launch_bounds__(BackwardTile<T, kD>::kThreads, 2)
    attention_backward_dkdv_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  using Tile = BackwardTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kNs = Tile::kStream / 8;
  constexpr bool kKeys = kWhich != KeyGradients::values, kValues = kWhich != KeyGradients::keys;
  const AttentionCudaArgs& a = g.forward;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t k_tile = shared_address(memory), v_tile = k_tile + Own::kBytes;

  const int blocks = (a.keys + Tile::kOwn - 1) / Tile::kOwn, group = a.heads / a.kv_heads;
  const int block = blockIdx.x % blocks, kv_head = blockIdx.x / blocks % a.kv_heads;
  const int batch = blockIdx.x / blocks / a.kv_heads;
  const int first = block * Tile::kOwn, tile_row = threadIdx.x / 32 * 16, row = first + tile_row;
  copy_rows<Own, kThreads>(k_tile, a.k, head_data<T>(a.k, batch, kv_head), first, a.keys, a.size);
  if (kKeys) copy_rows<Own, kThreads>(v_tile, a.v, head_data<T>(a.v, batch, kv_head), first, a.keys, a.value_size);

  // Blocks of queries that see none of the keys are left out.
  const int skipped = a.causal ? min(first, a.queries) / Tile::kStream : 0;
  const int steps = (a.queries + Tile::kStream - 1) / Tile::kStream - skipped;
  const auto head_of = [&](int step) { return kv_head * group + (mutant(149) ? 0 : step / steps); };
  const auto start_of = [&](int step) { return (skipped + step % steps) * Tile::kStream; };
  const auto load = [&](int step, uint32_t stage) {
    const int head = head_of(step), start = start_of(step);
    copy_rows<Stream, kThreads>(stage, a.q, head_data<T>(a.q, batch, head), start, a.queries, a.size);
    copy_rows<Stream, kThreads>(stage + Stream::kBytes, g.grad_out, head_data<T>(g.grad_out, batch, head), start,
                                a.queries, a.value_size);
  };
  float dk[1][kKeys ? kD / 8 : 1][4] = {}, dv[1][kValues ? kD / 8 : 1][4] = {};
  stream_stages<Tile>(v_tile + Own::kBytes, steps * group, load, [&](int step, uint32_t stage) {
    const int head = head_of(step), start = start_of(step);
    if (row >= a.keys || (a.causal && start + Tile::kStream <= row)) return;   // no query sees this warp's keys
    const HeadMask<T> mask(a.mask, batch, head);
    const int64_t at = (int64_t(batch) * a.heads + head) * a.queries;
    float s[1][kNs][4] = {};   // [keys, queries]
    multiply<Own, Stream>(s, k_tile, tile_row, stage, 0, a.size);
    mask_scores<true>(s, row, start, a, mask, on_edge(a, start, row + 16));
    each_element(s, row, start, [&](float& score, int, int query) {
      score = probability(score, query < a.queries ? a.lse[at + query] * kLog2e : kInfinity);   // no such query: p = 0
    });
    if constexpr (kValues) multiply_held<typename Tile::Across>(dv, s, stage + Stream::kBytes, a.value_size);
    if constexpr (kKeys) {
      float dp[1][kNs][4] = {};
      multiply<Own, Stream>(dp, v_tile, tile_row, stage + Stream::kBytes, 0, a.value_size);
      each_element(dp, row, start, [&](float& value, int, int query) {
        value -= query < a.queries ? g.delta[at + query] : 0.0f;
      });
#pragma unroll
      for (int j = 0; j < kNs; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) s[0][j][r] *= dp[0][j][r];
      multiply_held<typename Tile::Across>(dk, s, stage, a.size);
    }
  });
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (kKeys) {
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) dk[0][j][r] *= a.scale;
    store_rows<Own>(k_tile, tile_row, dk, head_data<T>(g.grad_k, batch, kv_head) + row * g.grad_k.time,
                    g.grad_k.time, a.keys - row, a.size, g.grad_k.aligned);
  }
  if constexpr (kValues)
    store_rows<Own>(v_tile, tile_row, dv, head_data<T>(g.grad_v, batch, kv_head) + row * g.grad_v.time,
                    g.grad_v.time, a.keys - row, a.value_size, g.grad_v.aligned);
}

template <class T>
cudaError_t launch_attention_delta(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const int64_t rows = int64_t(g.forward.batch) * g.forward.heads * g.forward.queries;
  return launch_tiles(attention_delta_kernel<T>, (rows + 15) / 16, 128, 0, g, stream);
}

template <class T>
cudaError_t launch_attention_dq(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const AttentionCudaArgs& a = g.forward;
  return dispatch_head_size(a.size > a.value_size ? a.size : a.value_size, [&](auto size) {
    using Tile = BackwardTile<T, decltype(size)::value>;
    const int64_t blocks = int64_t(a.batch) * a.heads * ((a.queries + Tile::kOwn - 1) / Tile::kOwn);
    return launch_tiles(attention_backward_dq_kernel<T, decltype(size)::value>, blocks, Tile::kThreads, Tile::kBytes,
                        g, stream);
  });
}

template <class T>
cudaError_t launch_attention_dkdv(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const AttentionCudaArgs& a = g.forward;
  return dispatch_head_size(a.size > a.value_size ? a.size : a.value_size, [&](auto size) {
    constexpr int kD = decltype(size)::value;
    using Tile = BackwardTile<T, kD>;
    const int64_t blocks = int64_t(a.batch) * a.kv_heads * ((a.keys + Tile::kOwn - 1) / Tile::kOwn);
    const auto launch = [&](auto kernel) {
      return launch_tiles(kernel, blocks, Tile::kThreads, Tile::kBytes, g, stream);
    };
    if constexpr (kD <= 128) {
      return launch(attention_backward_dkdv_kernel<T, kD, KeyGradients::both>);
    } else {
      const cudaError_t status = launch(attention_backward_dkdv_kernel<T, kD, KeyGradients::keys>);
      return status == cudaSuccess ? launch(attention_backward_dkdv_kernel<T, kD, KeyGradients::values>) : status;
    }
  });
}

}  // namespace pyfast
