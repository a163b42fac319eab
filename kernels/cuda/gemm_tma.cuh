// The GEMM of capability 9.0, specialised by warp: one thread copies whole boxes of the operands into a ring of stages,
// two warpgroups multiply them by wgmma and store. Blocks are persistent: the copies of the next tile go on while this
// one is stored.
//
// Bound: 64 of depth of a 128 x 256 tile are 2^22 FMA, 1024 clocks of a multiprocessor's tensor cores, for 48 KB from
// L2: 48 bytes a clock. A 128 x 128 tile takes 64 of them; it is for results too small to fill the GPU with wide ones.
#pragma once

#include <type_traits>

#include "gemm_tiles.cuh"
#include "tensor_map.cuh"

namespace pyfast {

template <int kCols>
struct TmaTile {
  static constexpr int kM = 128, kN = kCols, kK = 64, kStages = kCols == 256 ? 4 : 6;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps + 128;   // that multiply; and the warpgroup that copies
  static constexpr int kStaged = 64;                               // columns that a warp stores at once
  static constexpr int kBytesA = kM * kK * 2, kStageBytes = (kM + kN) * kK * 2;
  static constexpr int kStaging = kStages * kStageBytes, kStagingBytes = 16 * kStaged * 4;   // of each warp
  static constexpr int kBarriers = kStaging + kWarps * kStagingBytes, kShared = kBarriers + 16 * kStages;
  static_assert(kShared <= 227 << 10);
  // Of a thread that copies and of one that multiplies; the block is launched with 168 for each.
  static constexpr int kFew = 40, kMany = 232;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// A place in the ring: its barriers `full` (the bytes are there) and `empty` (every warp has read them).
template <class Tile>
struct Ring {
  uint32_t memory;
  int stage = 0;
  uint32_t parity = 0;   // of the phase that the stage is in

  // The whole block, before anybody waits.
  __device__ __forceinline__ void open() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::kStages; ++s) {
        mbarrier_init(full() + s * 8, 1);
        mbarrier_init(empty() + s * 8, Tile::kWarps);
      }
      fence_mbarrier_init();
    }
    if (!mutant(118)) __syncthreads();
  }
  __device__ __forceinline__ uint32_t data() const { return memory + stage * Tile::kStageBytes; }
  __device__ __forceinline__ uint32_t full() const { return memory + Tile::kBarriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return full() + Tile::kStages * 8; }
  __device__ __forceinline__ void step() {
    if (++stage == Tile::kStages) stage = 0, parity ^= 1;
  }
};

// The boxes of one operand in a stage, [kRows, 64] from (row, k) on: one of lines of 64 along the depth, or several of
// 64 rows.
template <Major kMajor, int kRows>
__device__ __forceinline__ void copy_boxes(uint32_t to, const CUtensorMap& map, int row, int k, uint32_t barrier) {
  if constexpr (kMajor == Major::depth) {
    copy_box(to, &map, k, row, barrier);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; r += 64) copy_box(to + r * 128, &map, row + r, k, barrier);
  }
}

// f(the tile's origin) for each tile of the block.
template <class Tile, class T, class F>
__device__ __forceinline__ void each_tile(const GemmArgs<T>& g, const F& f) {
  const int tiles = (g.m + Tile::kM - 1) / Tile::kM * ((g.n + Tile::kN - 1) / Tile::kN);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) f(tile_origin<Tile>(g.m, g.n, tile));
}

// One thread.
template <class Tile, Major kA, Major kB, class T>
__device__ __forceinline__ void copy_tiles(const CUtensorMap& a, const CUtensorMap& b, const GemmArgs<T>& g, int first,
                                           int steps, Ring<Tile> ring) {
  prefetch_map(&a);
  prefetch_map(&b);
  each_tile<Tile>(g, [&](int2 origin) {
    for (int step = 0; step < steps; ++step, ring.step()) {
      if (!mutant(119)) mbarrier_wait(ring.empty(), ring.parity ^ 1);
      mbarrier_arrive_expect(ring.full(), mutant(114) ? Tile::kBytesA : Tile::kStageBytes);
      const int k = first + step * Tile::kK;
      copy_boxes<kA, Tile::kM>(ring.data(), a, origin.x, k, ring.full());
      copy_boxes<kB, Tile::kN>(ring.data() + Tile::kBytesA, b, origin.y, k, ring.full());
    }
  });
}

// A warp is done with a stage; its lanes' wgmma and loads are.
template <class Tile>
__device__ __forceinline__ void release(const Ring<Tile>& ring) {
  __syncwarp();
  if (lane_id() == 0) mbarrier_arrive(ring.empty());
}

// acc [64, kN] = the products of a warpgroup over the steps; with sum_here, sums = those of its rows of A.
template <class T, class Tile, Major kA, Major kB>
__device__ __forceinline__ void multiply_steps(float (&acc)[Tile::kN / 8][4], float (&sums)[1][4], bool sum_here,
                                               int steps, Ring<Tile>& ring) {
  using A = SharedTile<T, kA, 64, 64>;
  constexpr bool kRowsA = kA == Major::rows, kRowsB = kB == Major::rows;
  constexpr int kStepA = kRowsA ? 2048 : 32, kStepB = kRowsB ? 2048 : 32;   // bytes from 16 of depth to the next
  const int warp = threadIdx.x / 32;
  Ring<Tile> before = ring;
  for (int step = 0; step < steps; ++step, ring.step()) {
    mbarrier_wait(ring.full(), ring.parity ^ mutant(113));
    const uint32_t own = ring.data() + warp / 4 * A::kBytes;
    const uint64_t left = wgmma_matrix(own, A::kBytes, 1024);
    const uint64_t right = wgmma_matrix(ring.data() + Tile::kBytesA, A::kBytes, 1024);
    if (!mutant(116)) wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, kRowsA, kRowsB>(acc, left + k * kStepA / 16, right + k * kStepB / 16);
    wgmma_commit();
    if (sum_here) {
      add_rows<A>(sums, own, warp % 4 * 16);
      fence_async_proxy();   // these loads come before the copy that takes their place
    }
    wgmma_wait<1 + mutant(115)>();   // the step before has been read
    if (step > 0) release(before);
    before = ring;
  }
  wgmma_wait<0>();
  if (steps > 0) release(before);
}

// The warp's accumulators [16, kN] to the epilogue; one copy of its code serves all columns.
template <class Tile, class Epilogue>
__device__ __forceinline__ void store_columns(const float (&acc)[Tile::kN / 8][4], uint32_t staging, int row, int col,
                                              int m, int n, const Epilogue& epilogue) {
  constexpr int kCols = Tile::kStaged, kParts = Tile::kN / kCols;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    __syncwarp();
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      if (p == part)
        stage_rows<16, kCols>(staging, [&](int, int j) -> const float(&)[4] { return acc[p * kCols / 8 + j]; });
    __syncwarp();
    const int from = col + part * kCols + lane_id() % (kCols / 4) * 4;
    if (from >= n) continue;
    drain_rows<kCols>(staging, row, min(m - row, 16), epilogue.column(from, min(n - from, 4)));
  }
}

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
__global__ void __launch_bounds__(kHasWgmma ? Tile::kThreads : 32, 1)
    gemm_tma_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, GemmArgs<T> g,
                    const Epilogue epilogue) {
  if constexpr (kHasWgmma) {
    g.take_counts();
    extern __shared__ __align__(1024) unsigned char memory[];
    Ring<Tile> ring{shared_address(memory)};
    const int warp = threadIdx.x / 32, first = blockIdx.y * g.split_k;
    const int steps = (min(g.k - first, g.split_k) + Tile::kK - 1) / Tile::kK;
    ring.open();
    if (warp >= Tile::kWarps) {
      give_registers<Tile::kFew>();
      if (threadIdx.x == 32 * Tile::kWarps) copy_tiles<Tile, kA, kB>(a, b, g, first, steps, ring);
      return;
    }
    take_registers<Tile::kMany>();
    each_tile<Tile>(g, [&](int2 origin) {
      float acc[Tile::kN / 8][4] = {}, sums[1][4] = {};
      const int row = origin.x + warp * 16;
      const bool sum_here = kSums && g.sums && origin.y == 0;
      multiply_steps<T, Tile, kA, kB>(acc, sums, sum_here, steps, ring);
      if (sum_here) store_sums<T>(g.sums + blockIdx.y * g.sums_stride, sums, row, g.m);
      const uint32_t staging = ring.memory + Tile::kStaging + warp * Tile::kStagingBytes;
      store_columns<Tile>(acc, staging, row, origin.y, g.m, g.n, epilogue);
    });
  }
}

// ---- launch ----

template <class T>
bool encode_operand(CUtensorMap* map, const GemmOperand<T>& o, Major major, int rows, int depth, int tile_rows) {
  const bool by_depth = major == Major::depth;
  constexpr bool kBfloat = std::is_same_v<T, bfloat16>;
  constexpr auto kType = kBfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return o.aligned && encode_tensor_map(map, kType, o.data, by_depth ? depth : rows, by_depth ? rows : depth, o.stride,
                                        by_depth ? tile_rows : 64);
}

// Whether the GPU has taken code for sm_90a of this kernel. Any other, which a GPU of capability 9.0 may have to take,
// is empty and says so: it may have no more than 32 threads.
inline bool has_warpgroups(const void* kernel) {
  cudaFuncAttributes told;
  if (cudaFuncGetAttributes(&told, kernel) == cudaSuccess) return told.maxThreadsPerBlock > 32;
  cudaGetLastError();
  return false;
}

inline cudaError_t processor_count(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : status;
}

// False: the operands, or the GPU, are none for this kernel, and nothing has been launched.
template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
bool launch_gemm_tma(cudaError_t* status, const GemmArgs<T>& g, int slices, const Epilogue& epilogue,
                     cudaStream_t stream) {
  const auto kernel = gemm_tma_kernel<T, Tile, kA, kB, kSums, Epilogue>;
  const void* const entry = reinterpret_cast<const void*>(kernel);
  CUtensorMap a, b;
  const bool whole_steps = slices == 1 || g.split_k % Tile::kK == 0;
  if (!whole_steps || !encode_operand(&a, g.a, kA, g.m, g.k, Tile::kM) ||
      !encode_operand(&b, g.b, kB, g.n, g.k, Tile::kN) || !has_warpgroups(entry))
    return false;
  int processors = 0;
  *status = processor_count(&processors);
  if (*status == cudaSuccess)
    *status = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (*status != cudaSuccess) return true;
  const int64_t tiles = ceil_div(g.m, Tile::kM) * ceil_div(g.n, Tile::kN);
  const int64_t room = ceil_div(processors, slices);
  const dim3 grid(unsigned(tiles < room ? tiles : room), unsigned(slices));
  kernel<<<grid, Tile::kThreads, Tile::kShared, stream>>>(a, b, g, epilogue);
  *status = cudaGetLastError();
  return true;
}

}  // namespace pyfast
