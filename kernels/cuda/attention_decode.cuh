// attention of few queries on many keys, as in decoding: the keys are split over blocks, and a second kernel combines
// what they have found, in one order. Of one query the heads that share keys are taken as queries of one head.
//
// Bound: memory; each block reads its keys and values once for 16 queries. Its four warps take different keys.
#pragma once

#include "attention_decode.h"
#include "attention_softmax.cuh"

namespace pyfast {

template <class T, int kD>
struct DecodeTile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kQueries = 16;
  static constexpr int kKeysOfWarp = kWide ? 8 : 16, kKeys = kKeysOfWarp * kWarps, kStages = kD > 128 ? 1 : 2;
  using Q = SharedTile<T, Major::depth, kQueries, kD>;
  using K = SharedTile<T, Major::depth, kKeys, kD>;
  using V = SharedTile<T, Major::rows, kD, kKeysOfWarp>;   // a warp's part of the values
  static constexpr int kStageBytes = 2 * K::kBytes, kStreamBytes = Q::kBytes + kStages * kStageBytes;
  // At the end: the output of each warp, in rows apart by so much that lanes meet different banks, and its softmax.
  static constexpr int kPitch = kD + 8, kOutputs = kWarps * kQueries * kPitch * 4, kSoftmax = kWarps * kQueries * 8;
  static constexpr int kBytes = kStreamBytes > kOutputs + kSoftmax ? kStreamBytes : kOutputs + kSoftmax;
};

// Adds up the four warps of a block and stores its part: rows of `stride` floats, and their peak and sum.
template <class Tile, class T, int kNj>
__device__ __forceinline__ void store_part(const AttentionDecodeArgs& d, OnlineSoftmax<T, 1>& softmax,
                                           float (&out)[1][kNj][4], uint32_t memory, int64_t first_row, int rows) {
  const uint32_t sums = memory + Tile::kOutputs;
  const int lane = lane_id(), warp = threadIdx.x / 32;
  __syncthreads();   // nobody reads keys and values any more
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = quad_sum(softmax.total[0][h]);
    if (lane % 4 == 0)
      store_shared(sums + (warp * Tile::kQueries + 8 * h + lane / 4) * 8, make_float2(softmax.peak[0][h], total));
  }
  __syncthreads();
  float scale[1][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 8 * h + lane / 4;
    float peak = -kInfinity, total = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) peak = fmaxf(peak, load_shared(sums + (w * Tile::kQueries + row) * 8));
    const float origin = peak == -kInfinity ? 0.0f : peak;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      const float2 part = load_shared_pair(sums + (w * Tile::kQueries + row) * 8);
      total += part.y * score_exp(part.x - origin, softmax.unit);
    }
    scale[0][h] = score_exp(softmax.peak[0][h] - origin, softmax.unit);
    if (warp == 0 && lane % 4 == 0 && row < rows)
      reinterpret_cast<float2*>(d.sums)[first_row + row] = make_float2(peak, total);
  }
  scale_rows(out, scale);
#pragma unroll
  for (int j = 0; j < kNj; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_shared(memory + ((warp * Tile::kQueries + 8 * h + lane / 4) * Tile::kPitch + 8 * j + lane % 4 * 2) * 4,
                   make_float2(out[0][j][2 * h], out[0][j][2 * h + 1]));
  __syncthreads();
  const int chunks = d.stride / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * chunks; i += Tile::kThreads) {
    const int row = i / chunks, col = i % chunks * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      float v[4];
      load_shared(v, memory + ((w * Tile::kQueries + row) * Tile::kPitch + col) * 4);
      sum.x += v[0], sum.y += v[1], sum.z += v[2], sum.w += v[3];
    }
    *reinterpret_cast<float4*>(d.parts + (first_row + row) * d.stride + col) = sum;
  }
}

// Blocks along x: tiles of 16 queries of each head; along y: parts of the keys.
template <class T, int kD>
__global__ void __launch_bounds__(128, 2) attention_decode_kernel(const __grid_constant__ AttentionDecodeArgs d) {
  using Tile = DecodeTile<T, kD>;
  using Q = typename Tile::Q;
  using K = typename Tile::K;
  using V = typename Tile::V;
  constexpr int kThreads = Tile::kThreads, kKeys = Tile::kKeys, kOwn = Tile::kKeysOfWarp;
  const AttentionCudaArgs& a = d.forward;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t q_tile = shared_address(memory), stages = q_tile + Q::kBytes;
  const int tiles = (a.queries + Tile::kQueries - 1) / Tile::kQueries;
  const int first = int(blockIdx.x) % tiles * Tile::kQueries, head = int(blockIdx.x) / tiles % a.heads;
  const int batch = int(blockIdx.x) / tiles / a.heads, kv_head = head / (a.heads / a.kv_heads);
  const int begin = int(blockIdx.y) * d.part_keys, end = min(a.keys, begin + d.part_keys);
  const T* const k = head_data<T>(a.k, batch, kv_head);
  const T* const v = head_data<T>(a.v, batch, kv_head);
  const auto load = [&](int start, uint32_t stage) {
    copy_rows<K, kThreads>(stage, a.k, k, start, a.keys, a.size);
    copy_rows<K, kThreads>(stage + K::kBytes, a.v, v, start, a.keys, a.value_size);
    cp_async_commit();
  };
  copy_rows<Q, kThreads>(q_tile, a.q, head_data<T>(a.q, batch, head), first, a.queries, a.size);
  if (Tile::kStages > 1) load(begin, stages);

  OnlineSoftmax<T, 1> softmax(a);
  float out[1][kD / 8][4] = {};
  const int warp_key = threadIdx.x / 32 * kOwn;
  uint32_t stage = stages, other = stages + (Tile::kStages - 1) * Tile::kStageBytes;
  for (int start = begin; start < end; start += kKeys) {
    if (Tile::kStages == 1) {
      __syncthreads();   // nobody reads the stage any more
      load(start, stage);
    }
    cp_async_wait<0>();   // this stage has arrived ...
    if (!mutant(173)) __syncthreads();   // ... for all threads, and nobody reads the other one any more
    if (Tile::kStages > 1 && start + kKeys < end) load(start + kKeys, other);
    float s[1][kOwn / 8][4] = {}, corrections[1][2];
    multiply_features<Q, K>(s, q_tile, 0, stage, warp_key, a.size);
    make_forward_scores<T>(s, first, start + warp_key, a, batch, head, on_edge(a, first, start + warp_key + kOwn));
    softmax.update(s, corrections);
    scale_rows(out, corrections);
    multiply_held<V>(out, s, stage + K::kBytes + warp_key * kD * int(sizeof(T)), a.value_size);
    const uint32_t read = stage;
    stage = other, other = read;
  }
  const int64_t rows = int64_t(a.batch) * a.heads * a.queries;
  const int64_t row = (int64_t(batch) * a.heads + head) * a.queries + first;
  store_part<Tile>(d, softmax, out, q_tile, int64_t(blockIdx.y) * rows + row, min(Tile::kQueries, a.queries - first));
}

// Four neighbouring columns of a row for each thread: what the parts have found, relative to the largest peak.
template <class T>
__global__ void __launch_bounds__(128) attention_combine_kernel(const __grid_constant__ AttentionDecodeArgs d) {
  const AttentionCudaArgs& a = d.forward;
  const int64_t rows = int64_t(a.batch) * a.heads * a.queries, index = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const int chunks = d.stride / 4, col = int(index % chunks) * 4;
  const int64_t row = index / chunks, plane = row / a.queries;
  if (row >= rows) return;
  const float2* const sums = reinterpret_cast<const float2*>(d.sums) + row;
  float peak = -kInfinity, total = 0.0f;
  for (int part = 0; part < d.parts_count; ++part) peak = fmaxf(peak, sums[part * rows].x);
  const float origin = peak == -kInfinity ? 0.0f : peak, unit = score_unit(a) * kLog2e;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int part = mutant(171); part < d.parts_count; ++part) {
    const float2 own = sums[part * rows];
    const float weight = mutant(172) ? 1.0f : score_exp(own.x - origin, unit);
    const float4 v = *reinterpret_cast<const float4*>(d.parts + (part * rows + row) * d.stride + col);
    total += own.y * weight;
    out.x += v.x * weight, out.y += v.y * weight, out.z += v.z * weight, out.w += v.w * weight;
  }
  if (col == 0) a.lse[row] = log_sum_exp(a, mutant(170) ? sums[0].x : peak, total);
  const float scale = 1.0f / (total > 0.0f ? total : 1.0f);
  const float values[] = {out.x * scale, out.y * scale, out.z * scale, out.w * scale};
  T* const to = head_data<T>(a.out, int(plane / a.heads), int(plane % a.heads)) + row % a.queries * a.out.time + col;
  if (a.out.aligned && col + 4 <= a.value_size) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    else
      *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (col + e < a.value_size) to[e] = T(values[e]);
  }
}

template <class T>
cudaError_t launch_attention_decode_of(const AttentionDecodeArgs& d, cudaStream_t stream) {
  const AttentionCudaArgs& a = d.forward;
  const int64_t rows = int64_t(a.batch) * a.heads * a.queries;
  const cudaError_t status = dispatch_head_size(a.size > a.value_size ? a.size : a.value_size, [&](auto size) {
    using Tile = DecodeTile<T, decltype(size)::value>;
    const int64_t tiles = int64_t(a.batch) * a.heads * ((a.queries + Tile::kQueries - 1) / Tile::kQueries);
    const dim3 blocks(unsigned(tiles), unsigned(d.parts_count));
    return launch_tiles(attention_decode_kernel<T, decltype(size)::value>, blocks, Tile::kThreads, Tile::kBytes, d,
                        stream);
  });
  if (status != cudaSuccess) return status;
  return launch_tiles(attention_combine_kernel<T>, (rows * (d.stride / 4) + 127) / 128, 128, 0, d, stream);
}

}  // namespace pyfast
