// out = softmax(q k^T scale + mask) v: blocks of keys stream past blocks of queries (Dao, 2023).
//
// Bound: of 32 queries and 64 keys a warp makes 2 x 64 FMA for each of 32 x 64 scores and feature block of 64: 256
// clocks of an A100's tensor cores for four warps, beside 192 of shared memory (keys and values are read by every
// warp, which is why it takes 32 queries) and some 5 instructions a score for the softmax, 160 clocks.
#pragma once

#include "attention_tiles.cuh"

namespace pyfast {

// A block of four warps holds kMi tiles of 16 queries in each, and streams kKeys keys at a time.
template <class T, int kD>
struct ForwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kMi = kWide || kD > 128 ? 1 : 2, kKeys = kWide ? (kD > 128 ? 16 : 32) : kD > 64 ? 32 : 64;
  static constexpr int kThreads = 128, kQueries = 64 * kMi;
  using Q = SharedTile<T, Major::depth, kQueries, kD>;
  using K = SharedTile<T, Major::depth, kKeys, kD>;
  using V = SharedTile<T, Major::rows, kD, kKeys>;
  static constexpr int kBytes = Q::kBytes + K::kBytes + V::kBytes;
};

// The running softmax of a row: the largest score, this lane's part of the sum of 2^(score - peak).
template <int kMi>
struct OnlineSoftmax {
  float peak[kMi][2], total[kMi][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) peak[i][h] = -kInfinity, total[i][h] = 0.0f;
  }

  // Turns scores into probabilities relative to the new peak, and rescales what stood relative to the old one.
  template <int kNs, int kNj>
  __device__ __forceinline__ void update(float (&s)[kMi][kNs][4], float (&out)[kMi][kNj][4]) {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = peak[i][h];
#pragma unroll
        for (int j = 0; j < kNs; ++j) top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        top = quad_max(top);
        const float origin = top == -kInfinity ? 0.0f : top;   // nothing seen yet: p is 2^-inf = 0
        const float correction = mutant(142) ? 1.0f : exp2_approx(peak[i][h] - origin);
        peak[i][h] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kNs; ++j)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            float& p = s[i][j][2 * h + w];
            p = exp2_approx(p - origin);
            sum += p;
          }
        total[i][h] = total[i][h] * correction + sum;
#pragma unroll
        for (int j = 0; j < kNj; ++j) out[i][j][2 * h] *= correction, out[i][j][2 * h + 1] *= correction;
      }
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(128, 2) attention_forward_kernel(const __grid_constant__ AttentionCudaArgs a) {
  using Tile = ForwardTile<T, kD>;
  using Q = typename Tile::Q;
  using K = typename Tile::K;
  using V = typename Tile::V;
  constexpr int kMi = Tile::kMi, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + Q::kBytes, v_tile = k_tile + K::kBytes;

  // The longest blocks of a causal head come first.
  const int blocks = (a.queries + Tile::kQueries - 1) / Tile::kQueries;
  const int block = blocks - 1 - blockIdx.x % blocks, head = blockIdx.x / blocks % a.heads;
  const int batch = blockIdx.x / blocks / a.heads, kv_head = head / (a.heads / a.kv_heads);
  const T* const k = head_data<T>(a.k, batch, kv_head);
  const T* const v = head_data<T>(a.v, batch, kv_head);
  const HeadMask<T> mask(a.mask, batch, head);
  const int first = block * Tile::kQueries, tile_row = threadIdx.x / 32 * 16 * kMi, row = first + tile_row;
  const int end = a.causal ? min(a.keys, first + Tile::kQueries) : a.keys;

  copy_rows<Q, kThreads>(q_tile, a.q, head_data<T>(a.q, batch, head), first, a.queries, a.size);
  copy_rows<K, kThreads>(k_tile, a.k, k, 0, a.keys, a.size);
  cp_async_commit();

  OnlineSoftmax<kMi> softmax;
  float out[kMi][kD / 8][4] = {};
  for (int start = 0; start < end; start += kKeys) {
    float s[kMi][kKeys / 8][4] = {};
    const bool seen = row < a.queries && (!a.causal || start < row + 16 * kMi);   // by any query of this warp
    cp_async_wait<0>();   // queries and keys have arrived ...
    __syncthreads();      // ... for all threads, and nobody reads the last values any more
    copy_rows<V, kThreads>(v_tile, a.v, v, start, a.keys, a.value_size);
    cp_async_commit();
    if (seen) {
      multiply<Q, K>(s, q_tile, tile_row, k_tile, 0, a.size);
      mask_scores(s, row, start, a, mask, on_edge(a, row, start + kKeys));
      softmax.update(s, out);
    }
    cp_async_wait<mutant(143)>();   // values have arrived ...
    if (!mutant(144)) __syncthreads();   // ... for all threads, and nobody reads these keys any more
    if (start + kKeys < end) copy_rows<K, kThreads>(k_tile, a.k, k, start + kKeys, a.keys, a.size);
    cp_async_commit();
    if (seen) multiply_held<V>(out, s, v_tile, a.value_size);
  }

  float* const lse = a.lse + (int64_t(batch) * a.heads + head) * a.queries;
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(softmax.total[i][h]), scale = 1.0f / (total > 0.0f ? total : 1.0f);
      const int query = row + 16 * i + 8 * h + lane_id() / 4;
      const bool any = !(total == 0.0f);   // a sum that is nan shows
      if (query < a.queries && lane_id() % 4 == 0)
        lse[query] = any ? (softmax.peak[i][h] + log2f(total)) * kLn2 : kInfinity;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) out[i][j][2 * h] *= scale, out[i][j][2 * h + 1] *= scale;
    }
  store_rows<Q>(q_tile, tile_row, out, head_data<T>(a.out, batch, head) + row * a.out.time, a.out.time,
                a.queries - row, a.value_size, a.out.aligned);   // its own queries are read
}

template <class T>
cudaError_t launch_attention_forward(const AttentionCudaArgs& a, cudaStream_t stream) {
  return dispatch_head_size(a.size > a.value_size ? a.size : a.value_size, [&](auto size) {
    using Tile = ForwardTile<T, decltype(size)::value>;
    const int64_t blocks = int64_t(a.batch) * a.heads * ((a.queries + Tile::kQueries - 1) / Tile::kQueries);
    return launch_tiles(attention_forward_kernel<T, decltype(size)::value>, blocks, Tile::kThreads, Tile::kBytes, a,
                        stream);
  });
}

}  // namespace pyfast
