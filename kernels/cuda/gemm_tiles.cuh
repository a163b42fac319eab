// What every GEMM is made of: its tiles, operands and the order of its tiles, the sums of A's rows, and the way of the
// accumulators to the epilogue.
#pragma once

#include "mma.cuh"

namespace pyfast {

// The block's tile [kM, kN], its step along the depth, the tile of one warp, and how many steps are in flight.
template <int kBlockM, int kBlockN, int kBlockK, int kWarpM, int kWarpN, int kStageCount>
struct GemmTile {
  static constexpr int kM = kBlockM, kN = kBlockN, kK = kBlockK, kStages = kStageCount;
  static constexpr int kMi = kWarpM / 16, kNj = kWarpN / 8, kRowsOfWarp = kWarpM, kColsOfWarp = kWarpN;
  static constexpr int kWarpsN = kN / kWarpN, kWarps = kM / kWarpM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kPassRows = kMi > 1 ? 32 : 16;   // of a warp, through shared memory at once in the epilogue
  static constexpr int kStagingBytes = kWarps * kPassRows * kWarpN * 4;
};

using LargeTile = GemmTile<128, 128, 32, 64, 64, 3>;   // 48 KB: two blocks on every multiprocessor since sm_80
using SmallTile = GemmTile<64, 64, 64, 32, 32, 3>;     // where there are few of the large ones
using HopperTile = GemmTile<128, 128, 64, 64, 32, 3>;  // capability 9.0: two warpgroups, two blocks of 96 KB
using WideTile = GemmTile<128, 256, 64, 64, 64, 4>;    // there, by TMA only: three quarters of the bytes through L2
using FloatTile = GemmTile<64, 64, 32, 64, 32, 3>;     // float32: 8 x 8 FMA for 8 + 8 loads

// Whether the block multiplies by wgmma: in code for sm_90a. In any other that a GPU of capability 9.0 may have to
// take, the same block uses mma.sync.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class Tile>
constexpr bool kWarpgroups = Tile::kThreads == 256;
#else
template <class Tile>
constexpr bool kWarpgroups = false;
#endif

// An operand [rows, depth]: `stride` elements lie from one step of its slow index to the next. `aligned`: the data and
// the stride are multiples of 16 bytes.
template <class T>
struct GemmOperand {
  const T* data;
  int64_t stride;
  bool aligned;
};

// The right operand may be of another type that copy_operand takes: two matrices in one.
template <class T, class Right = GemmOperand<T>>
struct GemmArgs {
  GemmOperand<T> a;
  Right b;
  int m, n, k;
  int split_k;   // depth of one slice; blockIdx.y is the slice, and its result a matrix of its own
  float* sums;   // [slices, sums_stride] or null: the sums of A's rows over the slice
  int64_t sums_stride;
  // Null, or where the device knows that there are fewer rows of A, or less depth: of what is past it, whole boxes may
  // be read, and past the depth, up to a multiple of 64, there must be zeros.
  const int *rows_there = nullptr, *depth_there = nullptr;

  __device__ __forceinline__ void take_counts() {
    if (rows_there) m = *rows_there;
    if (depth_there) k = *depth_there;
  }
};

constexpr int kGroupTiles = 8;

template <class Tile>
__device__ __forceinline__ unsigned tile_count(int m, int n) {
  return unsigned((m + Tile::kM - 1) / Tile::kM) * unsigned((n + Tile::kN - 1) / Tile::kN);
}

// Where a tile begins: down groups of eight rows of tiles, so that neighbours share what L2 holds.
template <class Tile>
__device__ __forceinline__ int2 tile_origin(int m, int n, int tile) {
  const int rows = (m + Tile::kM - 1) / Tile::kM, cols = (n + Tile::kN - 1) / Tile::kN;
  const int group = tile / (kGroupTiles * cols), within = tile % (kGroupTiles * cols);
  const int height = min(rows - group * kGroupTiles, kGroupTiles);
  return {(group * kGroupTiles + within % height) * Tile::kM, within / height * Tile::kN};
}

// sums[i][h] += row i * 16 + h * 8 + lane / 4 of the tile over its depth; for float32 a fourth of it in each lane.
template <class A, int kMi>
__device__ __forceinline__ void add_rows(float (&sums)[kMi][4], uint32_t a, int row) {
  using T = typename A::Element;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < A::kDepth; k += 16)
#pragma unroll
      for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v[4];
          load_depth<A>(v, a, row + 16 * i + 8 * h + lane_id() / 4, k + lane_id() % 4 * 4);
          sums[i][2 * h] += (v[0] + v[1]) + (v[2] + v[3]);
        }
  } else {
    const uint32_t ones = pack<T>(1.0f, 1.0f);   // A times a matrix of ones: its row sums in every column
#pragma unroll
    for (int k = 0; k < A::kDepth; k += 16)
#pragma unroll
      for (int i = 0; i < kMi; ++i) {
        uint32_t left[4];
        load_fragment<A, true>(left, a, row + 16 * i, k);
        mma<T>(sums[i], left, ones, ones);
      }
  }
}

template <class T, int kMi>
__device__ __forceinline__ void store_sums(float* to, float (&sums)[kMi][4], int row, int m) {
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sums[i][2 * h];
      if constexpr (sizeof(T) == 4) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
      }
      const int at = row + 16 * i + 8 * h + lane_id() / 4;
      if (lane_id() % 4 == 0 && (at < m || mutant(107))) to[at] = sum;
    }
}

// ---- the way of the accumulators to the epilogue, through shared memory of the warp's own, so that neighbouring lanes
// ---- store neighbouring columns: [rows, kCols] of float32 in pieces of four

// Pairs of pieces are XORed with the row: the four rows that half a warp writes at once lie in different banks.
template <int kCols>
__device__ __forceinline__ uint32_t staged(uint32_t staging, int row, int piece) {
  return staging + (row * (kCols / 4) + (piece ^ row % 4 * 2)) * 16;
}

// c(i, j): the registers of the warp's tile [16, 8] at (16 i, 8 j).
template <int kRows, int kCols, class Registers>
__device__ __forceinline__ void stage_rows(uint32_t staging, const Registers& c) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(staged<kCols>(staging, 16 * i + 8 * h + lane / 4, 2 * j + lane % 4 / 2) + lane % 2 * 8,
                     make_float2(c(i, j)[2 * h], c(i, j)[2 * h + 1]));
}

// column(row, four values) for each of `rows` staged rows, the first of which is row `first` of the result.
template <int kCols, class Column>
__device__ __forceinline__ void drain_rows(uint32_t staging, int first, int rows, const Column& column) {
  constexpr int kPieces = kCols / 4, kRowsAtOnce = 32 / kPieces;
#pragma unroll 1
  for (int r = lane_id() / kPieces; r < rows; r += kRowsAtOnce) {
    float v[4];
    load_shared(v, staged<kCols>(staging, r, lane_id() % kPieces));
    column(first + r, v);
  }
}

// Hands the warp's accumulators to the epilogue in rows: epilogue.column(col) once, then column(row, four values).
template <class Tile, class Epilogue>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kMi][Tile::kNj][4], uint32_t staging, int row,
                                           int col, int m, int n, const Epilogue& epilogue) {
  constexpr int kRows = Tile::kPassRows, kCols = Tile::kColsOfWarp;
  const int from = col + lane_id() % (kCols / 4) * 4;
  const auto column = epilogue.column(from, min(n - from, 4));
#pragma unroll
  for (int pass = 0; pass < Tile::kRowsOfWarp / kRows; ++pass) {
    if (!mutant(105)) __syncwarp();
    stage_rows<kRows, kCols>(staging, [&](int i, int j) -> const float(&)[4] { return acc[kRows / 16 * pass + i][j]; });
    __syncwarp();
    const int first = row + pass * kRows;
    if (from < n) drain_rows<kCols>(staging, first, min(m - first, kRows), column);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Tile>
int64_t gemm_tiles(int64_t m, int64_t n) {
  return ceil_div(m, Tile::kM) * ceil_div(n, Tile::kN);
}

}  // namespace pyfast
