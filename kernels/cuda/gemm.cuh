// C [M, N] = A [M, K] B [N, K]^T on mma.sync, for any layout of the operands and any sizes.
//
// Bound: a 128 x 128 x 32 step of a block is 2^20 FMA, 1024 clocks of an A100's tensor cores for two resident blocks;
// its warps read 64 KB of fragments (512 clocks of shared memory) and cp.async brings 16 KB from L2, which is why a
// warp takes 64 x 64: half the width in one direction would make shared memory the bound.
#pragma once

#include "mma.cuh"

namespace pyfast {

// The block's tile [kM, kN], its step along the depth, the tile of one warp, and how many steps are in flight.
template <int kBlockM, int kBlockN, int kBlockK, int kWarpM, int kWarpN, int kStageCount>
struct GemmTile {
  static constexpr int kM = kBlockM, kN = kBlockN, kK = kBlockK, kStages = kStageCount;
  static constexpr int kMi = kWarpM / 16, kNj = kWarpN / 8, kRowsOfWarp = kWarpM, kColsOfWarp = kWarpN;
  static constexpr int kWarpsN = kN / kWarpN, kWarps = kM / kWarpM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kPassRows = 32;   // of a warp, that go through shared memory at once in the epilogue
  static constexpr int kStagingBytes = kWarps * kPassRows * kWarpN * 4;
};

using LargeTile = GemmTile<128, 128, 32, 64, 64, 3>;   // 48 KB: two blocks on every multiprocessor since sm_80
using SmallTile = GemmTile<64, 64, 64, 32, 32, 3>;     // where there are few of the large ones
using FloatTile = GemmTile<64, 64, 32, 64, 32, 3>;     // float32: 8 x 8 FMA for 8 + 8 loads

// An operand [rows, depth]: `stride` elements lie from one step of its slow index to the next. `aligned`: the data and
// the stride are multiples of 16 bytes.
template <class T>
struct GemmOperand {
  const T* data;
  int64_t stride;
  bool aligned;
};

template <class T>
struct GemmArgs {
  GemmOperand<T> a, b;
  int m, n, k;
  int split_k;   // depth of one slice; blockIdx.y is the slice, and its result a matrix of its own
  float* sums;   // [slices, sums_stride] or null: the sums of A's rows over the slice
  int64_t sums_stride;
};

constexpr int kGroupTiles = 8;

// The tile of a block: down groups of eight rows of tiles, so that neighbours share what L2 holds.
template <class Tile>
__device__ __forceinline__ int2 tile_origin(int m, int n) {
  const int rows = (m + Tile::kM - 1) / Tile::kM, cols = (n + Tile::kN - 1) / Tile::kN;
  const int group = blockIdx.x / (kGroupTiles * cols), within = blockIdx.x % (kGroupTiles * cols);
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

// Hands the warp's accumulators to the epilogue in rows: epilogue.column(col) once, then column(row, four values).
// They pass through shared memory of the warp's own, so that neighbouring lanes store neighbouring columns.
template <class Tile, class Epilogue>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kMi][Tile::kNj][4], uint32_t staging, int row,
                                           int col, int m, int n, const Epilogue& epilogue) {
  constexpr int kPieces = Tile::kColsOfWarp / 4, kRowsAtOnce = 32 / kPieces;
  // Pairs of pieces are XORed with the row: the four rows that half a warp writes at once lie in different banks.
  const auto place = [&](int r, int piece) { return staging + (r * kPieces + (piece ^ r % 4 * 2)) * 16; };
  const int lane = lane_id(), piece = lane % kPieces, from = col + piece * 4;
  const auto column = epilogue.column(from, min(n - from, 4));
#pragma unroll
  for (int pass = 0; pass < Tile::kMi / 2; ++pass) {
    if (!mutant(105)) __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kNj; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto& c = acc[2 * pass + i][j];
          store_shared(place(16 * i + 8 * h + lane / 4, 2 * j + lane % 4 / 2) + lane % 2 * 8,
                       make_float2(c[2 * h], c[2 * h + 1]));
        }
    __syncwarp();
    const int rows = min(m - row - pass * Tile::kPassRows, Tile::kPassRows);
    if (from >= n) continue;
#pragma unroll 1
    for (int r = lane / kPieces; r < rows; r += kRowsAtOnce) {
      float v[4];
      load_shared(v, place(r, piece));
      column(row + pass * Tile::kPassRows + r, v);
    }
  }
}

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads) gemm_kernel(GemmArgs<T> g, Epilogue epilogue) {
  using A = SharedTile<T, kA, Tile::kM, Tile::kK>;
  using B = SharedTile<T, kB, Tile::kN, Tile::kK>;
  constexpr int kStageBytes = A::kBytes + B::kBytes;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t stages = shared_address(memory);
  const int2 origin = tile_origin<Tile>(g.m, g.n);
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsN * Tile::kRowsOfWarp, warp_col = warp % Tile::kWarpsN * Tile::kColsOfWarp;
  const int first = blockIdx.y * g.split_k, depth = min(g.k - first, g.split_k);
  const int steps = (depth + Tile::kK - 1) / Tile::kK;

  const auto load = [&](int step, uint32_t to) {
    const int k = step * Tile::kK;
    const auto copy = [&](auto tile, uint32_t place, const GemmOperand<T>& o, int row, int rows) {
      using X = decltype(tile);
      constexpr bool kByDepth = X::kMajor == Major::depth;
      const T* at = kByDepth ? o.data + row * o.stride + first + k : o.data + (first + k) * o.stride + row;
      copy_tile<X, Tile::kThreads>(place, at, o.stride, kByDepth ? rows - row : depth - k,
                                   kByDepth ? depth - k : rows - row, o.aligned);
    };
    copy(A{}, to, g.a, origin.x, g.m);
    copy(B{}, to + A::kBytes, g.b, origin.y, g.n);
  };

  float acc[Tile::kMi][Tile::kNj][4] = {}, sums[Tile::kMi][4] = {};
  const bool sum_here = kSums && g.sums && origin.y == 0 && warp_col == 0;
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load(step, stages + step * kStageBytes);
    cp_async_commit();
  }
  uint32_t a = stages, free = stages + (Tile::kStages - 1) * kStageBytes;   // the stage to read, and the one to fill
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2 + mutant(102)>();   // this step has arrived ...
    if (!mutant(101)) __syncthreads();   // ... for all threads, and nobody reads the stage before it any more
    if (step + Tile::kStages - 1 < steps) load(step + Tile::kStages - 1, free);
    cp_async_commit();
    multiply<A, B>(acc, a, warp_row, a + A::kBytes, warp_col);
    if (sum_here) add_rows<A>(sums, a, warp_row);
    free = a, a = a + kStageBytes == stages + Tile::kStages * kStageBytes ? stages : a + kStageBytes;
  }
  __syncthreads();   // the stages become room for the epilogue
  if (sum_here) store_sums<T>(g.sums + blockIdx.y * g.sums_stride, sums, origin.x + warp_row, g.m);
  const uint32_t staging = stages + warp * Tile::kPassRows * Tile::kColsOfWarp * 4;
  store_tile<Tile>(acc, staging, origin.x + warp_row, origin.y + warp_col, g.m, g.n, epilogue);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Tile>
int64_t gemm_tiles(int64_t m, int64_t n) {
  return ceil_div(m, Tile::kM) * ceil_div(n, Tile::kN);
}

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
cudaError_t launch_gemm(const GemmArgs<T>& g, int slices, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int kStageBytes = (Tile::kM + Tile::kN) * Tile::kK * int(sizeof(T)) * Tile::kStages;
  constexpr int kShared = kStageBytes > Tile::kStagingBytes ? kStageBytes : Tile::kStagingBytes;
  const auto kernel = gemm_kernel<T, Tile, kA, kB, kSums, Epilogue>;
  const dim3 grid(unsigned(gemm_tiles<Tile>(g.m, g.n)), unsigned(slices));
  kernel<<<grid, Tile::kThreads, kShared, stream>>>(g, epilogue);
  return cudaGetLastError();
}

}  // namespace pyfast
