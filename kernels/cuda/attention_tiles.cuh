// What forward and backward of attention share: heads, masks on the scores, and tiles that are stored.
//
// Scores are natural exponents, rounded once, and come to base 2 after the subtraction: one that is its row's peak, or
// all there is to its log-sum-exp, leaves 0 to the bit, however large it is. The forward pass leaves them products as
// long as no mask is added, and scales the differences. Features beyond the head's size are zeros in shared memory;
// products skip most of them, so that one kernel serves all sizes up to its own.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "attention_operands.h"
#include "mma.cuh"
#include "ptx_warpgroup.cuh"

namespace pyfast {

// Whether this code may use wgmma; any other that a GPU of capability 9.0 may have to take uses mma.sync.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// Whether a launcher would run a kernel, in warpgroups or not, as compiled for this architecture: the others are left
// empty, which halves the time of compilation. Code for sm_90a runs on nothing but capability 9.0.
template <class T, bool kGroups>
__host__ __device__ constexpr bool launched_here() {
#ifdef __CUDA_ARCH__
  return kGroups ? __CUDA_ARCH__ == 900 : sizeof(T) == 4 || !kHasWarpgroups;
#else
  return true;
#endif
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// e to the difference of two scores; the unit of exponents is one of base 2.
__device__ __forceinline__ float score_exp(float difference, float unit = kLog2e) {
  return exp2_approx(difference * unit);
}

template <class T>
__device__ __forceinline__ T* head_data(const AttentionHeads& h, int batch, int head) {
  return static_cast<T*>(h.data) + batch * h.batch + head * h.head;
}

// As multiply. Of float32, scores are sums of the sums of kRun features: 256 added one after the other err more than
// torch's do.
constexpr int kRun = 32;

template <class A, class B, int kMi, int kNj>
__device__ __forceinline__ void multiply_features(float (&c)[kMi][kNj][4], uint32_t a, int a_row, uint32_t b, int b_row,
                                                  int depth) {
  if constexpr (sizeof(typename A::Element) == 2) {
    multiply<A, B>(c, a, a_row, b, b_row, depth);
  } else {
#pragma unroll 1
    for (int start = 0; start < depth; start += kRun) {
      float part[kMi][kNj][4] = {};
#pragma unroll 1
      for (int k = start; k < min(start + kRun, depth); k += 4) multiply_four<A, B>(part, a, a_row, b, b_row, k);
#pragma unroll
      for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int j = 0; j < kNj; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) c[i][j][r] += part[i][j][r];
    }
  }
}

// A score with what its mask has there. Rows masked by the lowest float throughout average all keys, as in torch.
__device__ __forceinline__ float masked(float score, bool seen) { return seen ? score : -kInfinity; }
template <class M>
__device__ __forceinline__ float masked(float score, M mask) {
  return score + float(mask);
}

// Applies the mask M of a head to a warp's tile [rows, cols] of its scores, whose steps in the mask are `down` and
// `across`.
template <class M, int kMi, int kNj>
__device__ __forceinline__ void apply_mask(float (&s)[kMi][kNj][4], const void* mask, int64_t start, int64_t down,
                                           int64_t across, int rows, int cols) {
  const M* const first = static_cast<const M*>(mask) + start + lane_id() / 4 * down + lane_id() % 4 * 2 * across;
  rows -= lane_id() / 4, cols -= lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kMi; ++i) {
    const M* at = first + 8 * i * down;
#pragma unroll
    for (int j = 0; j < kNj; ++j, at += 8 * across)
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        float& score = s[i / 2][j][i % 2 * 2 + w];
        if (8 * i < rows && 8 * j + w < cols) score = masked(score, at[w * across]);
      }
  }
}

// Whether products may stand for scores where they are compared: a positive scale changes no order.
__device__ __forceinline__ bool products_suffice(const AttentionCudaArgs& a) {
  return a.mask.kind == ScoreMaskKind::none && a.scale > 0.0f;
}

// Not contracted into a subtraction: the other side of it has been rounded.
template <int kMi, int kNj>
__device__ __forceinline__ void scale_scores(float (&s)[kMi][kNj][4], float scale) {
  each_element(s, 0, 0, [&](float& score, int, int) { score = __fmul_rn(score, scale); });
}

// What a mask adds, and -inf where a key takes no part. kKeysDown: the tile is [keys, queries] and not [queries, keys].
template <class T, bool kKeysDown = false, int kMi, int kNj>
__device__ __forceinline__ void mask_scores(float (&s)[kMi][kNj][4], int row, int col, const AttentionCudaArgs& a,
                                            int batch, int head) {
  const ScoreMask& m = a.mask;
  if (m.kind != ScoreMaskKind::none) {
    const int64_t down = kKeysDown ? m.key : m.query, across = kKeysDown ? m.query : m.key;
    const int64_t start = batch * m.batch + head * m.head + row * down + col * across;
    const int rows = (kKeysDown ? a.keys : a.queries) - row, cols = (kKeysDown ? a.queries : a.keys) - col;
    if (m.kind == ScoreMaskKind::boolean)
      apply_mask<bool>(s, m.data, start, down, across, rows, cols);
    else if (m.kind == ScoreMaskKind::float32)
      apply_mask<float>(s, m.data, start, down, across, rows, cols);
    else
      apply_mask<T>(s, m.data, start, down, across, rows, cols);
  }
  each_element(s, row, col, [&](float& score, int i, int j) {
    const int query = kKeysDown ? j : i, key = kKeysDown ? i : j;
    if ((key >= a.keys && !mutant(152)) || (a.causal && key > query && !mutant(141))) score = -kInfinity;
  });
}

// Products become scores. `edge`: some key may take no part, as everywhere in a mask.
template <class T, bool kKeysDown = false, int kMi, int kNj>
__device__ __forceinline__ void make_scores(float (&s)[kMi][kNj][4], int row, int col, const AttentionCudaArgs& a,
                                            int batch, int head, bool edge) {
  scale_scores(s, a.scale);
  if (edge) mask_scores<T, kKeysDown>(s, row, col, a, batch, head);
}

// Whether queries from `query` on may see some of the keys before `end` otherwise than by their product.
__device__ __forceinline__ bool on_edge(const AttentionCudaArgs& a, int query, int end) {
  return !products_suffice(a) || end > a.keys || (a.causal && end > query + 1);
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
#pragma unroll 1
  for (int i = lane; i < 16 * kMi * Tile::kChunks; i += 32) {   // all of a line, so that no two rows share a bank
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (row >= rows) break;
    if (chunk * Tile::kPack >= size) continue;
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

// The same in warpgroups, whose products are of all features of their kernel: sizes between are kernels of their own.
template <class F>
cudaError_t dispatch_group_size(int size, const F& f) {
  if (size > 64 && size <= 80) return f(HeadSize<80>{});
  if (size > 80 && size <= 96) return f(HeadSize<96>{});
  if (size > 128 && size <= 192) return f(HeadSize<192>{});
  return dispatch_head_size(size, f);
}
// Of the kernels by mma.sync that stand in their place.
__host__ __device__ constexpr int tile_size(int size) { return size <= 64 ? 64 : size <= 128 ? 128 : 256; }

// Whether this build has code for GPUs of capability 9.0. They take that, and no older one.
constexpr bool built_for_groups() {
#ifdef __CUDA_ARCH_LIST__
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
#endif
  return false;
}

// f(integral size, whether in warpgroups): of the kernels for these elements, the one that this GPU takes.
template <class T, class F>
cudaError_t dispatch_heads(const AttentionCudaArgs& a, const F& f) {
  const int size = a.size > a.value_size ? a.size : a.value_size;
  if constexpr (sizeof(T) == 2 && built_for_groups())
    if (a.capability == 9) return dispatch_group_size(size, [&](auto own) { return f(own, std::true_type()); });
  return dispatch_head_size(size, [&](auto own) { return f(own, std::false_type()); });
}

template <class Kernel, class Args>
cudaError_t launch_tiles(Kernel kernel, dim3 blocks, int threads, int shared, const Args& args,
                         cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  kernel<<<blocks, threads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace pyfast
