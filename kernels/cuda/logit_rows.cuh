// From the tiles of logits to losses, and from losses to what their gradients are made of: one thread for each row.
#pragma once

#include "linear_cross_entropy.h"
#include "logit_epilogues.cuh"

namespace pyfast {

constexpr int kJoinWarps = 8;   // of a block; each takes every eighth tile of its 32 rows

struct JoinArgs {
  const float2* partial;   // [tiles, rows], of TileLossEpilogue
  const float *spread, *at_target;
  const float* tile_weights;   // [tiles], or null: a class weighs 1
  const float* class_weight;
  CountedRows counted;
  float *loss, *lse;
  int64_t rows;
  int classes, tiles, width;   // classes of a tile
  float smoothing;
};

// loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c), as of cross_entropy; zeros for rows that do not count.
template <class = void>
__global__ void __launch_bounds__(32 * kJoinWarps) join_tiles_kernel(JoinArgs a) {
  __shared__ float4 meeting[kJoinWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * 32 + lane;
  const bool there = row < a.rows, counts = there && row < *a.counted.count;
  const int place = counts ? a.counted.place[row] : -1;
  const float at_target = place >= 0 ? a.at_target[row] : nanf("");   // of no class
  const float origin = fabsf(at_target) < kHuge ? at_target : 0;
  float peak = kLowest, total = 0, shifted = 0, weights = 0;   // shifted: of w (x - origin)
  for (int tile = warp; counts && tile < a.tiles; tile += kJoinWarps) {
    const int64_t at = int64_t(tile) * a.rows + row;
    const float2 part = a.partial[at];
    const float top = fmaxf(peak, part.x);
    total = (mutant(135) ? total : total * exp_approx(peak - top)) + part.y * exp_approx(part.x - top);
    peak = top;
    if (!a.spread) continue;
    const float w = a.tile_weights ? a.tile_weights[tile] : float(min(a.classes - tile * a.width, a.width));
    shifted += a.spread[at] + w * (part.x - origin);
    weights += w;
  }
  meeting[warp][lane] = make_float4(peak, total, shifted, weights);
  __syncthreads();
  if (warp > 0 || !there) return;
  for (int w = 1; w < kJoinWarps; ++w) {
    const float4 other = meeting[w][lane];
    const float top = fmaxf(peak, other.x);
    total = total * exp_approx(peak - top) + other.y * exp_approx(other.x - top);
    peak = top, shifted += other.z, weights += other.w;
  }
  const float log_total = counts ? logf(total) : 0;
  float loss = 0;
  if (counts) {
    const float own = a.class_weight && place >= 0 ? a.class_weight[place] : 1;
    loss = (1 - a.smoothing) * own * ((peak - at_target) + log_total);
    if (a.spread) loss += a.smoothing / float(a.classes) * (weights * ((peak - origin) + log_total) - shifted);
  }
  const int64_t to = a.counted.index[row];
  a.loss[to] = loss;
  reinterpret_cast<float2*>(a.lse)[to] = make_float2(counts ? peak : 0, log_total);
}

// g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t, with g the gradient of the loss.
template <class = void>
__global__ void __launch_bounds__(256) row_factors_kernel(RowFactors* to, CountedRows counted, int64_t rows,
                                                          int classes, const float* grad_loss, int64_t grad_loss_stride,
                                                          const float* lse, const float* totals,
                                                          const float* class_weight, float smoothing, bool mean) {
  const int64_t row = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (row >= rows || row >= *counted.count) return;
  const int64_t from = counted.index[row];
  const int place = counted.place[row];
  float g = grad_loss ? grad_loss[from * grad_loss_stride] : 1;
  if (mean) g /= totals[0];
  RowFactors f{lse[2 * from], lse[2 * from + 1], 0, 0, 0, place, {}};
  f.picked = place >= 0 ? g * (1 - smoothing) * (class_weight ? class_weight[place] : 1) : nanf("");
  f.uniform = g * (smoothing / float(classes));
  f.scale = f.picked;
  if (smoothing > 0) f.scale += f.uniform * (class_weight ? totals[1] : float(classes));
  float4* const whole = reinterpret_cast<float4*>(to + row);   // field by field each would ask for the sector
  whole[0] = make_float4(f.top, f.log_total, f.scale, f.picked);
  whole[1] = make_float4(f.uniform, __int_as_float(f.place), 0, 0);
}

}  // namespace pyfast
