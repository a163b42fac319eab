// C [M, N] = A [M, K] B [N, K]^T on mma.sync, or wgmma on sm_90a, for any layout of the operands and any sizes.
//
// Bound: a 128 x 128 x 32 step of a block is 2^20 FMA, 1024 clocks of an A100's tensor cores for two resident blocks;
// its warps read 64 KB of fragments (512 clocks of shared memory) and cp.async brings 16 KB from L2, which is why a
// warp takes 64 x 64: half the width in one direction would make shared memory the bound. On an H100 mma.sync reaches
// little more than half of the tensor cores; wgmma reads its operands from shared memory itself: 32 KB for 2^20 FMA,
// 512 clocks of tensor cores and 256 of shared memory.
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
  for (int pass = 0; pass < 16 * Tile::kMi / Tile::kPassRows; ++pass) {
    if (!mutant(105)) __syncwarp();
#pragma unroll
    for (int i = 0; i < Tile::kPassRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kNj; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto& c = acc[Tile::kPassRows / 16 * pass + i][j];
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

// The block copies the rows from `row` on of an operand, of `depth` left from k on: [kRows, X::kDepth], in tiles X.
template <class X, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_operand(uint32_t to, const GemmOperand<T>& o, int row, int rows, int k,
                                             int depth) {
  constexpr bool kByDepth = X::kMajor == Major::depth;
#pragma unroll
  for (int r = 0; r < kRows; r += X::kRows) {
    const T* const from = kByDepth ? o.data + (row + r) * o.stride + k : o.data + k * o.stride + row + r;
    const int there = rows - row - r;
    copy_tile<X, kThreads>(to + r / X::kRows * X::kBytes, from, o.stride, kByDepth ? there : depth,
                           kByDepth ? depth : there, o.aligned);
  }
}

// Runs multiply(a, b) for every step of the depth, on stages of tiles X of A, then Y of B, that fill ahead of it.
template <class Tile, class X, class Y, class T, class Multiply>
__device__ __forceinline__ void run_stages(const GemmArgs<T>& g, int2 origin, uint32_t stages,
                                           const Multiply& multiply) {
  constexpr int kBytesA = X::kBytes * (Tile::kM / X::kRows), kStageBytes = kBytesA + Y::kBytes * (Tile::kN / Y::kRows);
  const int first = blockIdx.y * g.split_k, depth = min(g.k - first, g.split_k);
  const int steps = (depth + Tile::kK - 1) / Tile::kK;
  const auto load = [&](int step, uint32_t to) {
    const int k = step * Tile::kK;
    copy_operand<X, Tile::kM, Tile::kThreads>(to, g.a, origin.x, g.m, first + k, depth - k);
    copy_operand<Y, Tile::kN, Tile::kThreads>(to + kBytesA, g.b, origin.y, g.n, first + k, depth - k);
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load(step, stages + step * kStageBytes);
    cp_async_commit();
  }
  uint32_t a = stages, free = stages + (Tile::kStages - 1) * kStageBytes;   // the stage to read, and the one to fill
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2 + mutant(102)>();   // this step has arrived ...
    if (kWarpgroups<Tile> && !mutant(111)) fence_async_proxy();
    if (!mutant(101)) __syncthreads();   // ... for all threads, and nobody reads the stage before it any more
    if (step + Tile::kStages - 1 < steps) load(step + Tile::kStages - 1, free);
    cp_async_commit();
    multiply(a, a + kBytesA);
    free = a, a = a + kStageBytes == stages + Tile::kStages * kStageBytes ? stages : a + kStageBytes;
  }
  __syncthreads();   // the stages become room for the epilogue
}

// wgmma: a warpgroup makes 64 rows of the tile. Operands lie in blocks of 64 rows and 64 of depth, 128-byte lines.
template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
__device__ __forceinline__ void wgmma_tile(const GemmArgs<T>& g, int2 origin, uint32_t stages,
                                           const Epilogue& epilogue) {
  using A = SharedTile<T, kA, 64, 64>;
  using B = SharedTile<T, kB, 64, 64>;
  constexpr bool kRowsA = kA == Major::rows, kRowsB = kB == Major::rows;
  constexpr int kStepA = kRowsA ? 2048 : 32, kStepB = kRowsB ? 2048 : 32;   // bytes from 16 of depth to the next
  const int warp = threadIdx.x / 32, group = warp / 4, row = warp % 4 * 16;
  float acc[1][16][4] = {}, sums[1][4] = {};
  const bool sum_here = kSums && g.sums && origin.y == 0;
  run_stages<Tile, A, B>(g, origin, stages, [&](uint32_t a, uint32_t b) {
    const uint32_t own = a + group * A::kBytes;
    const uint64_t left = wgmma_matrix(own, A::kBytes, 1024), right = wgmma_matrix(b, B::kBytes, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, kRowsA, kRowsB>(acc[0], left + k * kStepA / 16, right + k * kStepB / 16);
    wgmma_commit();
    if (sum_here) add_rows<A>(sums, own, row);
    if (!mutant(112)) wgmma_wait<0>();   // before the barrier after which the stage is filled again
  });
  using Warp = GemmTile<128, 128, 64, 16, 128, 1>;   // as the epilogue sees it
  const int first = origin.x + 64 * group + row;
  if (sum_here) store_sums<T>(g.sums + blockIdx.y * g.sums_stride, sums, first, g.m);
  store_tile<Warp>(acc, stages + warp * 16 * 128 * 4, first, origin.y, g.m, g.n, epilogue);
}

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads < 256 || kWarpgroups<Tile> ? 2 : 1)
    gemm_kernel(GemmArgs<T> g, Epilogue epilogue) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t stages = shared_address(memory);
  const int2 origin = tile_origin<Tile>(g.m, g.n);
  if constexpr (kWarpgroups<Tile>) {
    wgmma_tile<T, Tile, kA, kB, kSums>(g, origin, stages, epilogue);
  } else {
    using A = SharedTile<T, kA, Tile::kM, Tile::kK>;
    using B = SharedTile<T, kB, Tile::kN, Tile::kK>;
    const int warp = threadIdx.x / 32;
    const int row = warp / Tile::kWarpsN * Tile::kRowsOfWarp, col = warp % Tile::kWarpsN * Tile::kColsOfWarp;
    float acc[Tile::kMi][Tile::kNj][4] = {}, sums[Tile::kMi][4] = {};
    const bool sum_here = kSums && g.sums && origin.y == 0 && col == 0;
    run_stages<Tile, A, B>(g, origin, stages, [&](uint32_t a, uint32_t b) {
      multiply<A, B>(acc, a, row, b, col);
      if (sum_here) add_rows<A>(sums, a, row);
    });
    if (sum_here) store_sums<T>(g.sums + blockIdx.y * g.sums_stride, sums, origin.x + row, g.m);
    const uint32_t staging = stages + warp * Tile::kPassRows * Tile::kColsOfWarp * 4;
    store_tile<Tile>(acc, staging, origin.x + row, origin.y + col, g.m, g.n, epilogue);
  }
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
  if (kShared > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, Tile::kThreads, kShared, stream>>>(g, epilogue);
  return cudaGetLastError();
}

}  // namespace pyfast
