// C [M, N] = A [M, K] B [N, K]^T on mma.sync, or wgmma on sm_90a, for any layout of the operands and any sizes. Here
// are the blocks that bring their operands by cp.async; where tensor maps can read them, gemm_tma.cuh does.
//
// Bound: a 128 x 128 x 32 step of a block is 2^20 FMA, 1024 clocks of an A100's tensor cores for two resident blocks;
// its warps read 64 KB of fragments (512 clocks of shared memory) and cp.async brings 16 KB from L2, which is why a
// warp takes 64 x 64: half the width in one direction would make shared memory the bound. On an H100 mma.sync reaches
// little more than half of the tensor cores; wgmma reads its operands from shared memory itself: 32 KB for 2^20 FMA,
// 512 clocks of tensor cores and 256 of shared memory.
#pragma once

#include "gemm_tma.cuh"

namespace pyfast {

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

// multiply(a, b) for every step of the depth, on stages of tiles X of A, then Y of B, that fill ahead of it.
template <class Tile, class X, class Y, class Args, class Multiply>
__device__ __forceinline__ void run_steps(const Args& g, int2 origin, uint32_t stages, const Multiply& multiply) {
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

// Whether an operand as a whole can say that it is aligned.
template <class X, class = void>
constexpr bool kTellsAlignment = false;
template <class X>
constexpr bool kTellsAlignment<X, std::void_t<decltype(X::aligned)>> = true;

// The same, in a loop of its own where all is aligned: addresses and tests of single elements stay out of it.
template <class Tile, class X, class Y, class Args, class Multiply>
__device__ __forceinline__ void run_stages(const Args& g, int2 origin, uint32_t stages, const Multiply& multiply) {
  if constexpr (kTellsAlignment<decltype(Args::b)>) {
    if (g.a.aligned && g.b.aligned) {
      Args aligned = g;
      aligned.a.aligned = aligned.b.aligned = true;   // known to the compiler
      return run_steps<Tile, X, Y>(aligned, origin, stages, multiply);
    }
  }
  run_steps<Tile, X, Y>(g, origin, stages, multiply);
}

// wgmma: a warpgroup makes 64 rows of the tile. Operands lie in blocks of 64 rows and 64 of depth, 128-byte lines.
template <class T, class Tile, Major kA, Major kB, bool kSums, class Right, class Epilogue>
__device__ __forceinline__ void wgmma_tile(const GemmArgs<T, Right>& g, int2 origin, uint32_t stages,
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

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue, class Right = GemmOperand<T>>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads < 256 || kWarpgroups<Tile> ? 2 : 1)
    gemm_kernel(GemmArgs<T, Right> g, Epilogue epilogue) {
  g.take_counts();
  if (g.rows_there && blockIdx.x >= tile_count<Tile>(g.m, g.n)) return;   // the grid is that of all rows
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t stages = shared_address(memory);
  const int2 origin = tile_origin<Tile>(g.m, g.n, int(blockIdx.x));
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

template <class T, class Tile, Major kA, Major kB, bool kSums, class Right, class Epilogue>
cudaError_t launch_gemm_async(const GemmArgs<T, Right>& g, int slices, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int kStageBytes = (Tile::kM + Tile::kN) * Tile::kK * int(sizeof(T)) * Tile::kStages;
  constexpr int kShared = kStageBytes > Tile::kStagingBytes ? kStageBytes : Tile::kStagingBytes;
  const auto kernel = gemm_kernel<T, Tile, kA, kB, kSums, Epilogue, Right>;
  const dim3 grid(unsigned(gemm_tiles<Tile>(g.m, g.n)), unsigned(slices));
  if (kShared > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, Tile::kThreads, kShared, stream>>>(g, epilogue);
  return cudaGetLastError();
}

// By tensor maps where the tile is one of capability 9.0 and the operands can be read so.
template <class T, class Tile, Major kA, Major kB, bool kSums, class Right, class Epilogue>
cudaError_t launch_gemm(const GemmArgs<T, Right>& g, int slices, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr bool kWide = std::is_same_v<Tile, WideTile>, kOne = std::is_same_v<Right, GemmOperand<T>>;
  if constexpr (kOne && (kWide || std::is_same_v<Tile, HopperTile>)) {
    cudaError_t status = cudaSuccess;
    if (launch_gemm_tma<T, TmaTile<Tile::kN>, kA, kB, kSums>(&status, g, slices, epilogue, stream)) return status;
  }
  using Plain = std::conditional_t<kWide, HopperTile, Tile>;
  return launch_gemm_async<T, Plain, kA, kB, kSums>(g, slices, epilogue, stream);
}

}  // namespace pyfast
