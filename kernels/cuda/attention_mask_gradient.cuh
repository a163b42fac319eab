// The gradient of an additive mask: dS summed over what the mask broadcasts over, in one order.
// Bound as the other gradients; all four operands stream past, so that it has the least reuse of them.
#pragma once

#include "attention_backward.cuh"

namespace pyfast {

// A block owns a tile of dmask, or with one row (column) for all queries (keys) its only tile along that dimension.
template <class T, int kD>
__global__ void __launch_bounds__(BackwardTile<T, kD>::kThreads, 2)
    attention_backward_mask_kernel(const __grid_constant__ AttentionBackwardCudaArgs g) {
  using Tile = BackwardTile<T, kD>;
  using Own = typename Tile::Own;
  using Stream = typename Tile::Stream;
  constexpr int kThreads = Tile::kThreads, kOwn = Tile::kOwn, kStream = Tile::kStream, kNs = kStream / 8;
  const AttentionCudaArgs& a = g.forward;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t q_tile = shared_address(memory), dout_tile = q_tile + Own::kBytes;
  const uint32_t k_tile = dout_tile + Own::kBytes, v_tile = k_tile + Stream::kBytes;

  const bool one_query = g.mask_queries == 1, one_key = g.mask_keys == 1;
  const int query_blocks = (a.queries + kOwn - 1) / kOwn, key_blocks = (a.keys + kStream - 1) / kStream;
  const int across = one_key ? 1 : key_blocks, tiles = (one_query ? 1 : query_blocks) * across;
  const int tile = blockIdx.x % tiles, plane = blockIdx.x / tiles, tile_row = threadIdx.x / 32 * 16;
  const int query_steps = one_query ? query_blocks : 1, key_steps = one_key ? key_blocks : 1;
  const int heads_each = a.heads / g.mask_heads, batches_each = a.batch / g.mask_batch;

  float total[1][kNs][4] = {};
  for (int64_t step = 0; step < int64_t(batches_each) * heads_each * query_steps * key_steps; ++step) {
    const int key_block = tile % across + int(step % key_steps);
    const int query_block = tile / across + int(step / key_steps % query_steps);
    const int at = int(step / key_steps / query_steps);
    const int batch = plane / g.mask_heads + at / heads_each, head = plane % g.mask_heads + at % heads_each;
    const int kv_head = head / (a.heads / a.kv_heads), query = query_block * kOwn, key = key_block * kStream;
    __syncthreads();   // nobody reads the tiles any more
    copy_rows<Own, kThreads>(q_tile, a.q, head_data<T>(a.q, batch, head), query, a.queries, a.size);
    copy_rows<Own, kThreads>(dout_tile, g.grad_out, head_data<T>(g.grad_out, batch, head), query, a.queries,
                             a.value_size);
    copy_rows<Stream, kThreads>(k_tile, a.k, head_data<T>(a.k, batch, kv_head), key, a.keys, a.size);
    copy_rows<Stream, kThreads>(v_tile, a.v, head_data<T>(a.v, batch, kv_head), key, a.keys, a.value_size);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();   // they are there for all threads
    const int64_t rows = (int64_t(batch) * a.heads + head) * a.queries;
    float s[1][kNs][4] = {}, dp[1][kNs][4] = {};
    multiply_features<Own, Stream>(s, q_tile, tile_row, k_tile, 0, a.size);
    multiply_features<Own, Stream>(dp, dout_tile, tile_row, v_tile, 0, a.value_size);
    make_scores<T>(s, query + tile_row, key, a, batch, head, true);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = query + tile_row + 8 * h + lane_id() / 4;
      const float lse = row < a.queries ? a.lse[rows + row] : kInfinity;   // no such query: p = 0
      const float delta = row < a.queries ? g.delta[rows + row] : 0.0f;
#pragma unroll
      for (int j = 0; j < kNs; ++j)
#pragma unroll
        for (int w = 0; w < 2; ++w)
          total[0][j][2 * h + w] += probability(s[0][j][2 * h + w], lse) * (dp[0][j][2 * h + w] - delta);
    }
  }

  // Through shared memory, where one row or column is the sum of the tile's.
  float* const sums = reinterpret_cast<float*>(memory);
  static_assert(kOwn * kStream * 4 <= Tile::kBytes, "the tile fits");
  // Pairs of columns are XORed with the row: neither those that half a warp writes at once share a bank, nor, but for
  // every sixteenth, those of a column.
  const auto place = [](int row, int col) {
    return row * kStream + ((col / 2) ^ (row % 4 * 4 + row / 4 % 4) % (kStream / 2)) * 2 + col % 2;
  };
  __syncthreads();
  const int lane_row = tile_row + lane_id() / 4;
#pragma unroll
  for (int j = 0; j < kNs; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(sums + place(lane_row + 8 * h, 8 * j + lane_id() % 4 * 2)) =
          make_float2(total[0][j][2 * h], total[0][j][2 * h + 1]);
  __syncthreads();
  const int rows = one_query ? 1 : min(kOwn, a.queries - tile / across * kOwn);
  const int cols = one_key ? 1 : min(kStream, a.keys - tile % across * kStream);
  const int64_t first_row = int64_t(plane) * g.mask_queries + tile / across * kOwn;
  const int64_t start = first_row * g.mask_keys + tile % across * kStream;
  for (int i = threadIdx.x; i < rows * cols; i += kThreads) {
    const int row = i / cols, col = i % cols;
    float sum = 0.0f;
    for (int r = row; r < (one_query ? kOwn : row + 1); ++r)
      for (int c = col; c < (one_key ? kStream : col + 1); ++c) sum += sums[place(r, c)];
    const int64_t to = start + int64_t(row) * g.mask_keys + col;
    if (a.mask.kind == ScoreMaskKind::float32)
      static_cast<float*>(g.grad_mask)[to] = sum;
    else
      static_cast<T*>(g.grad_mask)[to] = T(sum);
  }
}

template <class T>
cudaError_t launch_attention_mask_gradient(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  const AttentionCudaArgs& a = g.forward;
  return dispatch_head_size(a.size > a.value_size ? a.size : a.value_size, [&](auto size) {
    constexpr int kD = decltype(size)::value;
    using Tile = BackwardTile<T, kD>;
    const int64_t down = g.mask_queries == 1 ? 1 : (a.queries + Tile::kOwn - 1) / Tile::kOwn;
    const int64_t across = g.mask_keys == 1 ? 1 : (a.keys + Tile::kStream - 1) / Tile::kStream;
    return launch_tiles(attention_backward_mask_kernel<T, kD>, down * across * g.mask_batch * g.mask_heads,
                        Tile::kThreads, 2 * (Tile::Own::kBytes + Tile::Stream::kBytes), g, stream);
  });
}

}  // namespace pyfast
