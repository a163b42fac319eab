// What forward and backward of attention share: heads, masks on the scores, and tiles that are stored.
//
// Exponents are in base 2: e^(scale s + mask) = 2^(log2e scale s + log2e mask). Features beyond the head's size are
// zeros in shared memory; products skip them 32 at a time, so that one kernel serves all sizes up to its own.
#pragma once

#include "attention_operands.h"
#include "mma.cuh"

namespace pyfast {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf(), kLowest = -3.402823466e+38f;

template <class T>
__device__ __forceinline__ T* head_data(const AttentionHeads& h, int batch, int head) {
  return static_cast<T*>(h.data) + batch * h.batch + head * h.head;
}

// Where the scores [Tq, Tk] of one head find their mask.
template <class T>
struct HeadMask {
  const ScoreMask& mask;
  int64_t start;

  __device__ __forceinline__ HeadMask(const ScoreMask& m, int batch, int head)
      : mask(m), start(batch * m.batch + head * m.head) {}

  // A finite mask stays finite in base 2: rows masked by the lowest float throughout average all keys, as in torch.
  __device__ __forceinline__ float operator()(float s, int query, int key) const {
    const int64_t at = start + query * mask.query + key * mask.key;
    if (mask.kind == ScoreMaskKind::boolean) return static_cast<const bool*>(mask.data)[at] ? s : -kInfinity;
    const float added = mask.kind == ScoreMaskKind::float32 ? static_cast<const float*>(mask.data)[at]
                                                            : float(static_cast<const T*>(mask.data)[at]);
    return s + (added == -kInfinity ? added : fmaxf(added * kLog2e, kLowest));
  }
};

// Products become scores in base 2, -inf where a key takes no part. `edge`: some of the tile's keys may take none;
// kKeysDown: the tile is [keys, queries] and not [queries, keys].
template <bool kKeysDown = false, class T, int kMi, int kNj>
__device__ __forceinline__ void mask_scores(float (&s)[kMi][kNj][4], int row, int col, const AttentionCudaArgs& a,
                                            const HeadMask<T>& mask, bool edge) {
  const float scale = a.scale * kLog2e;
  if (!edge && a.mask.kind == ScoreMaskKind::none) {
    each_element(s, row, col, [&](float& score, int, int) { score *= scale; });
    return;
  }
  each_element(s, row, col, [&](float& score, int i, int j) {
    const int query = kKeysDown ? j : i, key = kKeysDown ? i : j;
    score *= scale;
    if (a.mask.kind != ScoreMaskKind::none && query < a.queries && key < a.keys) score = mask(score, query, key);
    if (key >= a.keys || (a.causal && key > query && !mutant(141))) score = -kInfinity;
  });
}

// Whether queries from `query` on may not see some of the keys before `end`.
__device__ __forceinline__ bool on_edge(const AttentionCudaArgs& a, int query, int end) {
  return end > a.keys || (a.causal && end > query + 1);
}

// Stores the 16 kMi rows of a warp that begin at `row` of the head, through its own rows of a tile in shared memory:
// neighbouring lanes store neighbouring chunks.
template <class Tile, int kMi, int kNj, class T = typename Tile::Element>
__device__ __forceinline__ void store_rows(uint32_t tile, int tile_row, float (&c)[kMi][kNj][4], T* to,
                                           int64_t stride, int rows, int size, bool aligned) {
  const int lane = lane_id();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int j = 0; j < kNj; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t place = tile + Tile::element(tile_row + 16 * i + 8 * h + lane / 4, 8 * j + lane % 4 * 2);
        if constexpr (sizeof(T) == 4)
          store_shared(place, make_float2(c[i][j][2 * h], c[i][j][2 * h + 1]));
        else
          store_shared(place, pack<T>(c[i][j][2 * h], c[i][j][2 * h + 1]));
      }
  __syncwarp();
  const int chunks = (size + Tile::kPack - 1) / Tile::kPack;
#pragma unroll 1
  for (int i = lane; i < 16 * kMi * chunks; i += 32) {
    const int row = i / chunks, chunk = i % chunks;
    if (row >= rows) break;
    union {
      uint4 whole;
      T part[Tile::kPack];
    };
    whole = load_shared_chunk(tile + Tile::offset(tile_row + row, chunk));
    T* const at = to + row * stride + chunk * Tile::kPack;
    const int count = size - chunk * Tile::kPack;
    if (aligned && count >= Tile::kPack) {
      *reinterpret_cast<uint4*>(at) = whole;
    } else {
#pragma unroll
      for (int e = 0; e < Tile::kPack; ++e)
        if (e < count) at[e] = part[e];
    }
  }
}

// Copies [kLines, kD] of a head, from row `first` of its `rows`; zeros beyond.
template <class Tile, int kThreads, class T = typename Tile::Element>
__device__ __forceinline__ void copy_rows(uint32_t to, const AttentionHeads& h, const T* head, int first, int rows,
                                          int size) {
  copy_tile<Tile, kThreads>(to, head + first * h.time, h.time, rows - first, size, h.aligned);
}

// Largest of, and sum over, the four lanes that share a row.
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// f(integral size): the smallest of the kernels' head sizes that holds `size` features.
template <int kD>
struct HeadSize {
  static constexpr int value = kD;
};
template <class F>
cudaError_t dispatch_head_size(int size, const F& f) {
  return size <= 64 ? f(HeadSize<64>{}) : size <= 128 ? f(HeadSize<128>{}) : f(HeadSize<256>{});
}

template <class Kernel, class Args>
cudaError_t launch_tiles(Kernel kernel, int64_t blocks, int threads, int shared, const Args& args,
                         cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(blocks), threads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pyfast
