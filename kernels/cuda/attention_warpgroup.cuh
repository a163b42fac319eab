// What forward and backward of attention share on sm_90a, where warpgroups of four warps multiply by wgmma.
//
// Heads lie in shared memory as panels of 64 features; of the last one 16 or 32 may be all there is. A product by depth
// reads lines as they are; one over rows (keys of values, queries of their gradients) reads the same panels across.
#pragma once

#include "attention_tiles.cuh"

namespace pyfast {

constexpr int kGroupRows = 64;   // of a product that one warpgroup makes

// Handed round, so that the compiler sees that whole warps take a branch together: else it lets no wgmma overlap.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, int(threadIdx.x / 128), 0); }

// [kRowCount, kD] of a head: kRowCount / kLines blocks of panels.
template <class T, int kRowCount, int kD, int kLines = kRowCount < kGroupRows ? kRowCount : kGroupRows>
struct Panels {
  using Element = T;
  using Panel = SharedTile<T, Major::depth, kLines, 64>;
  static constexpr int kSize = kD, kRows = kRowCount, kCount = (kD + 63) / 64, kBlockBytes = kCount * Panel::kBytes;
  static constexpr int kBytes = kRows / kLines * kBlockBytes;
  using Whole = SharedTile<T, Major::depth, kRows, 64 * kCount>;   // the same bytes, where results are stored
  static constexpr int kLeading = mutant(153) ? Panel::kBytes / 2 : Panel::kBytes, kStride = mutant(154) ? 512 : 1024;

  // Copies from row `first` of the head's `rows`; zeros beyond them and beyond `size`. What no asynchronous copy can
  // take goes chunk by chunk in one loop for all panels: a loop for each would double the code around the products.
  template <int kThreads>
  static __device__ __forceinline__ void copy(uint32_t to, const AttentionHeads& h, const T* head, int first, int rows,
                                              int size) {
    if (kCount == 1 || h.aligned) {
#pragma unroll
      for (int row = 0; row < kRows; row += kLines)
#pragma unroll
        for (int panel = 0; panel < kCount; ++panel)
          copy_tile<Panel, kThreads>(to + row / kLines * kBlockBytes + panel * Panel::kBytes,
                                     head + (first + row) * h.time + 64 * panel, h.time, rows - first - row,
                                     size - 64 * panel, kCount > 1 || h.aligned);
    } else {
      constexpr int kChunks = Panel::kChunks, kAcross = kCount * kChunks;
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kAcross; i += kThreads) {
        const int row = i / kAcross, chunk = i % kAcross;
        const int bytes = first + row < rows ? size * int(sizeof(T)) - chunk * 16 : 0;
        store_shared(to + row / kLines * kBlockBytes + chunk / kChunks * Panel::kBytes +
                         Panel::offset(row % kLines, chunk % kChunks),
                     gather(head + (first + row) * h.time + chunk * Panel::kPack, bytes));
      }
    }
  }

  // One panel as an operand by depth; two neighbouring ones as an operand over rows, from row `row` on.
  static __device__ __forceinline__ uint64_t by_depth(uint32_t at, int panel) {
    return wgmma_matrix(at + panel * Panel::kBytes, 16, kStride) ^ (mutant(157) ? uint64_t(3) << 62 : 0);
  }
  static __device__ __forceinline__ uint64_t over_rows(uint32_t at, int panel, int row) {
    return wgmma_matrix(at + panel * Panel::kBytes + row * 128, kLeading, kStride);
  }
};

// c = A B^T over the features of a block of 64 rows of A and of B's rows; the caller fences, commits and waits.
template <class A, class B, class T, int kTiles>
__device__ __forceinline__ void group_multiply(float (&c)[kTiles][4], uint32_t a, uint32_t b) {
  constexpr int kWhole = A::kSize / 64, kRest = A::kSize % 64 / 16;
  wgmma_panel<T, false, 4>(c, A::by_depth(a, 0), B::by_depth(b, 0));
#pragma unroll
  for (int panel = 1; panel < kWhole; ++panel)
    wgmma_panel<T, true, 4>(c, A::by_depth(a, panel), B::by_depth(b, panel));
  if constexpr (kRest > 0) wgmma_panel<T, true, kRest>(c, A::by_depth(a, kWhole), B::by_depth(b, kWhole));
}

// c += P B over B's rows; P is what pack_held has made.
template <class B, class T, int kNj, int kSteps>
__device__ __forceinline__ void group_multiply_held(float (&c)[kNj][4], const uint32_t (&p)[kSteps][4], uint32_t b) {
  constexpr int kTiles = kNj < 16 ? kNj : 16, kRest = kNj % kTiles;   // 192 features: 128 and 64
  const auto row = [&](int first, int step) { return B::over_rows(b, first / 8, 16 * step); };
#pragma unroll
  for (int first = 0; first + kTiles <= kNj; first += kTiles)
#pragma unroll
    for (int step = 0; step < kSteps; step += 2)
      wgmma_held<T, kTiles>(c + first, p[step], p[step + 1], row(first, step));
  if constexpr (kRest > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2)
      wgmma_held<T, kRest>(c + kNj - kRest, p[step], p[step + 1], row(kNj - kRest, step));
  }
}

// Rounds [64, 16 kSteps] of a warpgroup to T, as the left operand of the next product.
template <class T, int kTiles, int kSteps>
__device__ __forceinline__ void pack_held(uint32_t (&p)[kSteps][4], const float (&s)[kTiles][4]) {
  static_assert(kTiles == 2 * kSteps, "two tiles of [16, 8] are one left fragment [16, 16]");
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      p[k][r] = pack<T>(s[2 * k + r / 2][r % 2 * 2], s[2 * k + r / 2][r % 2 * 2 + 1]);
}

}  // namespace pyfast
