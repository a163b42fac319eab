// out = softmax(q k^T scale + mask) v: blocks of keys stream past blocks of queries (Dao, 2023).
//
// Bound: of 32 queries and 64 keys a warp makes 2 x 64 FMA for each of 32 x 64 scores and feature block of 64: 256
// clocks of an A100's tensor cores for four warps, beside 192 of shared memory (keys and values are read by every
// warp, which is why it takes 32 queries) and some 5 instructions a score for the softmax, 160 clocks.
#pragma once

#include "attention_forward_group.cuh"

namespace pyfast {

// A block of kWarps warps holds kMi tiles of 16 queries in each, and streams kKeys keys at a time.
template <class T, int kD, int kWarps>
struct ForwardTile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kMi = kWide || kD > 128 || kWarps > 4 ? 1 : 2;
  static constexpr int kKeys = kWide ? (kD > 128 ? 16 : 32) : kD > 64 ? 32 : 64;
  static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kMi * kWarps;
  using Q = SharedTile<T, Major::depth, kQueries, kD>;
  using K = SharedTile<T, Major::depth, kKeys, kD>;
  using V = SharedTile<T, Major::rows, kD, kKeys>;
  static constexpr int kBytes = Q::kBytes + K::kBytes + V::kBytes;
};

template <class T, int kD, int kWarps>
__device__ __forceinline__ void attention_forward_tile(const AttentionCudaArgs& a, uint32_t memory) {
  using Tile = ForwardTile<T, kD, kWarps>;
  using Q = typename Tile::Q;
  using K = typename Tile::K;
  using V = typename Tile::V;
  constexpr int kMi = Tile::kMi, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  const uint32_t q_tile = memory, k_tile = q_tile + Q::kBytes, v_tile = k_tile + K::kBytes;
  const QueryBlock<Tile::kQueries> block(a);
  const T* const k = head_data<T>(a.k, block.batch, block.kv_head);
  const T* const v = head_data<T>(a.v, block.batch, block.kv_head);
  const int tile_row = threadIdx.x / 32 * 16 * kMi, row = block.first + tile_row;

  copy_rows<Q, kThreads>(q_tile, a.q, head_data<T>(a.q, block.batch, block.head), block.first, a.queries, a.size);
  copy_rows<K, kThreads>(k_tile, a.k, k, 0, a.keys, a.size);
  cp_async_commit();

  OnlineSoftmax<T, kMi> softmax(a);
  float out[kMi][kD / 8][4] = {};
  const auto advance = [&](int start, bool edge) {
    float s[kMi][kKeys / 8][4] = {}, corrections[kMi][2];
    const bool seen = row < a.queries && !(edge && a.causal && start >= row + 16 * kMi);   // by any query of this warp
    cp_async_wait<0>();   // queries and keys have arrived ...
    __syncthreads();      // ... for all threads, and nobody reads the last values any more
    copy_rows<V, kThreads>(v_tile, a.v, v, start, a.keys, a.value_size);
    cp_async_commit();
    if (seen) {
      multiply_features<Q, K>(s, q_tile, tile_row, k_tile, 0, a.size);
      make_forward_scores<T>(s, row, start, a, block.batch, block.head, edge && on_edge(a, row, start + kKeys));
      softmax.update(s, corrections);
      scale_rows(out, corrections);
    }
    cp_async_wait<mutant(143)>();   // values have arrived ...
    if (!mutant(144)) __syncthreads();   // ... for all threads, and nobody reads these keys any more
    if (start + kKeys < block.end) copy_rows<K, kThreads>(k_tile, a.k, k, start + kKeys, a.keys, a.size);
    cp_async_commit();
    if (seen) multiply_held<V>(out, s, v_tile, a.value_size);
  };
  const int whole = sizeof(T) == 4 ? 0 : block.seen_by_all(a) / kKeys * kKeys;   // a second loop of FMA would spill
  int start = 0;
  for (; start < whole; start += kKeys) advance(start, false);
  for (; start < block.end; start += kKeys) advance(start, true);
  store_output<Q, T>(a, block, softmax, out, q_tile, tile_row);   // its own queries are read
}

// Eight warps where two blocks of four would not be there at once, and in the place of two warpgroups.
template <class T, int kD, bool kGroups>
constexpr int kForwardWarps = kGroups || (sizeof(T) == 2 && kD > 128) ? 8 : 4;

// kGroups: for GPUs of capability 9.0, in blocks of two warpgroups.
template <class T, int kD, bool kGroups>
__global__ void __launch_bounds__(32 * kForwardWarps<T, kD, kGroups>,
                                  kD > 64 && (kForwardWarps<T, kD, kGroups> > 4) ? 1 : 2)
    attention_forward_kernel(const __grid_constant__ AttentionCudaArgs a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  if constexpr (kGroups && kHasWarpgroups)
    attention_forward_groups<T, kD>(a, shared_address(memory));
  else if constexpr (launched_here<T, kGroups>())
    attention_forward_tile<T, tile_size(kD), kForwardWarps<T, kD, kGroups>>(a, shared_address(memory));
  else
    __trap();   // never launched
}

template <class T, int kD, bool kGroups>
cudaError_t launch_attention_forward_of(const AttentionCudaArgs& a, cudaStream_t stream) {
  using Tile = ForwardTile<T, tile_size(kD), kForwardWarps<T, kD, kGroups>>;
  const int bytes = kGroups ? std::max(ForwardGroupTile<T, kD>::kBytes, Tile::kBytes) : Tile::kBytes;
  const int64_t blocks = int64_t(a.batch) * a.heads * ((a.queries + Tile::kQueries - 1) / Tile::kQueries);
  return launch_tiles(attention_forward_kernel<T, kD, kGroups>, blocks, Tile::kThreads, bytes, a, stream);
}

template <class T>
cudaError_t launch_attention_forward(const AttentionCudaArgs& a, cudaStream_t stream) {
  return dispatch_heads<T>(a, [&](auto size, auto groups) {
    return launch_attention_forward_of<T, decltype(size)::value, decltype(groups)::value>(a, stream);
  });
}

}  // namespace pyfast
