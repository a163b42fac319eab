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
    return !products_suffice(a) ? 0 : a.causal ? min(first + from, a.keys) : a.keys;
  }
};

// A score of the forward pass, whether product or scaled, is so many natural exponents.
__device__ __forceinline__ float score_unit(const AttentionCudaArgs& a) { return products_suffice(a) ? a.scale : 1.0f; }

// As make_scores, but that products stay where they suffice.
template <class T, int kMi, int kNj>
__device__ __forceinline__ void make_forward_scores(float (&s)[kMi][kNj][4], int row, int col,
                                                    const AttentionCudaArgs& a, int batch, int head, bool edge) {
  if (!edge) return;
  if (!products_suffice(a)) scale_scores(s, a.scale);
  mask_scores<T>(s, row, col, a, batch, head);
}

// The log-sum-exp of scores whose largest is `peak`, as it is stored: +inf of none.
__device__ __forceinline__ float log_sum_exp(const AttentionCudaArgs& a, float peak, float total) {
  const bool any = !(total == 0.0f);   // a sum that is nan shows
  return any ? __fmul_rn(peak, score_unit(a)) + log2f(total) * kLn2 : kInfinity;
}

// The running softmax of a row: the largest score, this lane's part of the sum of e^(score - peak).
template <class T, int kMi>
struct OnlineSoftmax {
  float unit, peak[kMi][2], total[kMi][2];   // exponents of base 2 in a score

  __device__ __forceinline__ explicit OnlineSoftmax(const AttentionCudaArgs& a) : unit(score_unit(a) * kLog2e) {
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
        const float correction = mutant(142) ? 1.0f : score_exp(peak[i][h] - origin, unit);
        peak[i][h] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kNs; ++j)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            float& p = s[i][j][2 * h + w];
            p = score_exp(p - origin, unit);
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
      if (query < a.queries && lane_id() % 4 == 0) lse[query] = log_sum_exp(a, softmax.peak[i][h], total);
    }
  scale_rows(out, scale);
  store_rows<Out>(tile, tile_row, out, head_data<T>(a.out, block.batch, block.head) + row * a.out.time, a.out.time,
                  a.queries - row, a.value_size, a.out.aligned);
}

}  // namespace pyfast
