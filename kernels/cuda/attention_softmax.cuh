// The softmax of attention: what a block of queries keeps while keys stream past it, and what it leaves at the end.
#pragma once

#include "attention_tiles.cuh"

namespace pyfast {

// Which queries of which head a block has, and how far it must look.
template <int kQueries>
struct QueryBlock {
  int batch, head, kv_head, first, end;   // its first query; keys from `end` on are seen by none

  // The longest blocks of a causal head come first.
  __device__ __forceinline__ explicit QueryBlock(const AttentionCudaArgs& a) {
    const int blocks = (a.queries + kQueries - 1) / kQueries;
    first = (blocks - 1 - int(blockIdx.x) % blocks) * kQueries, head = int(blockIdx.x) / blocks % a.heads;
    batch = int(blockIdx.x) / blocks / a.heads, kv_head = head / (a.heads / a.kv_heads);
    end = a.causal ? min(a.keys, min(a.queries, first + kQueries)) : a.keys;
  }

  // The keys before this one are no edge to any query from `from` rows down the block on.
  __device__ __forceinline__ int seen_by_all(const AttentionCudaArgs& a, int from = 0) const {
    return a.mask.kind != ScoreMaskKind::none ? 0 : a.causal ? min(first + from, a.keys) : a.keys;
  }
};

// The running softmax of a row: the largest score, this lane's part of the sum of e^(score - peak).
template <class T, int kMi>
struct OnlineSoftmax {
  float peak[kMi][2], total[kMi][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) peak[i][h] = -kInfinity, total[i][h] = 0.0f;
  }

  // Turns scores into probabilities relative to the new peak, and tells what rescales all that stood relative to the
  // old one.
  template <int kNs>
  __device__ __forceinline__ void update(float (&s)[kMi][kNs][4], float (&corrections)[kMi][2]) {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = peak[i][h];
#pragma unroll
        for (int j = 0; j < kNs; ++j) top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        top = quad_max(top);
        const float origin = top == -kInfinity ? 0.0f : top;   // nothing seen yet: p is 2^-inf = 0
        const float correction = mutant(142) ? 1.0f : score_exp<T>(peak[i][h] - origin);
        peak[i][h] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kNs; ++j)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            float& p = s[i][j][2 * h + w];
            p = score_exp<T>(p - origin);
            sum += p;
          }
        total[i][h] = total[i][h] * correction + sum;
        corrections[i][h] = correction;
      }
  }
};

template <int kMi, int kNj>
__device__ __forceinline__ void scale_rows(float (&out)[kMi][kNj][4], const float (&by)[kMi][2]) {
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int j = 0; j < kNj; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) out[i][j][r] *= by[i][r / 2];
}

// Stores what the warp's queries, from `row` on, have gathered; Out is the tile of shared memory they pass through.
template <class Out, class T, int kMi, int kNj, int kQueries>
__device__ __forceinline__ void store_output(const AttentionCudaArgs& a, const QueryBlock<kQueries>& block,
                                             const OnlineSoftmax<T, kMi>& softmax, float (&out)[kMi][kNj][4],
                                             uint32_t tile, int tile_row) {
  const int row = block.first + tile_row;
  float* const lse = a.lse + (int64_t(block.batch) * a.heads + block.head) * a.queries;
  float scale[kMi][2];
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(softmax.total[i][h]);
      scale[i][h] = 1.0f / (total > 0.0f ? total : 1.0f);
      const int query = row + 16 * i + 8 * h + lane_id() / 4;
      const bool any = !(total == 0.0f);   // a sum that is nan shows
      if (query < a.queries && lane_id() % 4 == 0)
        lse[query] = any ? log_sum_exp<T>(softmax.peak[i][h], total) : kInfinity;
    }
  scale_rows(out, scale);
  store_rows<Out>(tile, tile_row, out, head_data<T>(a.out, block.batch, block.head) + row * a.out.time, a.out.time,
                  a.queries - row, a.value_size, a.out.aligned);
}

}  // namespace pyfast
