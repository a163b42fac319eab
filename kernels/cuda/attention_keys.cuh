// The gradients of keys and values: blocks that own rows of dK and dV, over all heads of queries that share them.
#pragma once

#include "attention_keys_pair.cuh"

namespace pyfast {

template <class T, int kD, int kWarps>
__device__ __forceinline__ void attention_backward_dkdv_tile(const AttentionBackwardCudaArgs& g, uint32_t memory) {
  using Tile = KeysTile<T, kD, kWarps>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kNs = Tile::kStream / 8;
  const AttentionCudaArgs& a = g.forward;
  const uint32_t k_tile = memory, v_tile = k_tile + Own::kBytes;
  const QueryStream stream(a, Tile::kOwn, Tile::kStream);
  const int batch = stream.batch, kv_head = stream.kv_head, first = stream.first;
  const int tile_row = threadIdx.x / 32 * 16, row = first + tile_row;
  copy_rows<Own, kThreads>(k_tile, a.k, head_data<T>(a.k, batch, kv_head), first, a.keys, a.size);
  copy_rows<Own, kThreads>(v_tile, a.v, head_data<T>(a.v, batch, kv_head), first, a.keys, a.value_size);

  QueryStream loaded = stream;
  const auto load = [&](int, uint32_t stage) {
    copy_queries<Tile>(stage, g, loaded);
    loaded.next();
  };
  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
  const Stages<Tile, decltype(load)> stages(v_tile + Own::kBytes, stream.steps(), load);
  const auto gather = [&](int step, int head, int start, bool edge) {
    const uint32_t stage = stages.arrive(step);
    if (row >= a.keys || (edge && a.causal && start + Tile::kStream <= row)) return;   // no query sees this warp's keys
    const auto statistics = Tile::statistics(stage);
    float s[1][kNs][4] = {}, dp[1][kNs][4] = {};   // [keys, queries]
    multiply_features<Own, Stream>(s, k_tile, tile_row, stage, 0, a.size);
    make_scores<T, true>(s, row, start, a, batch, head, edge && on_edge(a, start, row + 16));
    statistics.make_probabilities(s);
    multiply_held<typename Tile::Across>(dv, s, stage + Stream::kBytes, a.value_size);
    multiply_features<Own, Stream>(dp, v_tile, tile_row, stage + Stream::kBytes, 0, a.value_size);
    statistics.make_gradients(dp, s);
    multiply_held<typename Tile::Across>(dk, dp, stage, a.size);
  };
  stream.each_tile(a, first, Tile::kOwn, [&](int step) { stages.arrive(step); }, gather);
  cp_async_wait<0>();
  __syncthreads();
  store_keys<Own>(g, stream, k_tile, tile_row, dk);
  store_values<Own>(g, stream, v_tile, tile_row, dv);
}

// kGroups: for GPUs of capability 9.0, in blocks of two warpgroups. The gradients of wide heads do not fit in one warp,
// or warpgroup: two share them.
template <class T, int kD, bool kGroups>
struct KeysKernel {
  static constexpr bool kPairs = kD > 128;
  static constexpr int kWarps = kGroups ? 8 : 4;
  using Tile = KeysTile<T, tile_size(kD), kWarps>;
  using PairTile = KeysPairTile<T, tile_size(kD), kWarps>;
  static constexpr int kOwn = kPairs ? PairTile::kOwn : Tile::kOwn;
  static constexpr int kTileBytes = kPairs ? PairTile::kBytes : Tile::kBytes;
  static constexpr int kGroupBytes = kPairs ? KeysPairGroupTile<T, kD>::kBytes : KeysGroupTile<T, kD>::kBytes;
  static constexpr int kBytes = kGroups ? std::max(kGroupBytes, kTileBytes) : kTileBytes;
};

template <class T, int kD, bool kGroups>
__global__ void __launch_bounds__(kGroups ? 256 : 128, kGroups ? 1 : 2)
    attention_backward_dkdv_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  using Kernel = KeysKernel<T, kD, kGroups>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t start = shared_address(memory);
  if constexpr (kGroups && kHasWarpgroups && Kernel::kPairs)
    attention_backward_dkdv_group_pair<T, kD>(g, start);
  else if constexpr (kGroups && kHasWarpgroups)
    attention_backward_dkdv_groups<T, kD>(g, start);
  else if constexpr (Kernel::kPairs && launched_here<T, kGroups>())
    attention_backward_dkdv_pair<T, tile_size(kD), Kernel::kWarps>(g, start);
  else if constexpr (launched_here<T, kGroups>())
    attention_backward_dkdv_tile<T, tile_size(kD), Kernel::kWarps>(g, start);
  else
    __trap();   // never launched
}

template <class T>
cudaError_t launch_attention_dkdv(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const AttentionCudaArgs& a = g.forward;
  return dispatch_heads<T>(a, [&](auto size, auto groups) {
    using Kernel = KeysKernel<T, decltype(size)::value, decltype(groups)::value>;
    const int64_t blocks = int64_t(a.batch) * a.kv_heads * ((a.keys + Kernel::kOwn - 1) / Kernel::kOwn);
    return launch_tiles(attention_backward_dkdv_kernel<T, decltype(size)::value, decltype(groups)::value>, blocks,
                        32 * Kernel::kWarps, Kernel::kBytes, g, stream);
  });
}

}  // namespace pyfast
