// The GEMM by tensor maps where the right operand is two matrices: as gemm_tma.cuh, with one more map.
//
// Of PairedRows a tile has half its columns of each, one half after the other: a thread then holds both halves of its
// columns, and no line of shared memory is of two matrices. Of PairedDepth a step is of one matrix or the other.
#pragma once

#include "glu_epilogue.cuh"
#include "paired_operands.cuh"

namespace pyfast {

// Where the second matrix goes on: beside the first, or behind it.
enum class Pairing { rows, depth };

// The maps of a product, and the depth at which the second matrix begins.
struct PairedMaps {
  CUtensorMap a, first, second;
  int begin;
};

// One thread. The boxes of B in a stage, from (row, k) on.
template <class Tile, Pairing kPairing, Major kB>
__device__ __forceinline__ void copy_pair(uint32_t to, const PairedMaps& maps, int row, int k, uint32_t barrier) {
  if constexpr (kPairing == Pairing::rows) {
    copy_boxes<kB, Tile::kN / 2>(to, maps.first, row / 2, k, barrier);
    copy_boxes<kB, Tile::kN / 2>(to + Tile::kN / 2 * 128, mutant(125) ? maps.first : maps.second, row / 2, k, barrier);
  } else if (k < maps.begin) {
    copy_boxes<kB, Tile::kN>(to, maps.first, row, k, barrier);
  } else {
    copy_boxes<kB, Tile::kN>(to, maps.second, row, mutant(126) ? k : k - maps.begin, barrier);
  }
}

template <class Tile, Pairing kPairing, Major kB, class T>
__device__ __forceinline__ void copy_paired_tiles(const PairedMaps& maps, const GemmArgs<T>& g, int first, int steps,
                                                  Ring<Tile> ring) {
  prefetch_map(&maps.a);
  prefetch_map(&maps.first);
  prefetch_map(&maps.second);
  each_tile<Tile>(g, [&](int2 origin) {
    for (int step = 0; step < steps; ++step, ring.step()) {
      if (!mutant(127)) mbarrier_wait(ring.empty(), ring.parity ^ 1);
      mbarrier_arrive_expect(ring.full(), Tile::kStageBytes);
      const int k = first + step * Tile::kK;
      copy_boxes<Major::depth, Tile::kM>(ring.data(), maps.a, origin.x, k, ring.full());
      copy_pair<Tile, kPairing, kB>(ring.data() + Tile::kBytesA, maps, origin.y, k, ring.full());
    }
  });
}

// As of any epilogue; `col` is the first of the result's columns. Half of what is staged are gates, then their ups.
template <class Tile, class T>
__device__ __forceinline__ void store_columns(const float (&acc)[Tile::kN / 8][4], uint32_t staging, int row, int col,
                                              int m, int, const GluEpilogue<T>& epilogue) {
  constexpr int kCols = Tile::kStaged / 2, kParts = Tile::kN / Tile::kStaged, kPieces = kCols / 4;
  const int lane = lane_id(), piece = lane % kPieces;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    __syncwarp();
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      if (p == part)
        stage_rows<16, Tile::kStaged>(staging, [&](int, int j) -> const float(&)[4] {
          return acc[j < kCols / 8 ? p * kCols / 8 + j : Tile::kN / 16 + (p - 1) * kCols / 8 + j];
        });
    __syncwarp();
    const int from = col / 2 + part * kCols + piece * 4, count = min(epilogue.n - from, 4);
    if (count <= 0) continue;
    float gate_bias[4], up_bias[4];
    epilogue.load(gate_bias, epilogue.gate_bias, from, count);
    epilogue.load(up_bias, epilogue.up_bias, from, count);
#pragma unroll 1
    for (int r = lane / kPieces; r < min(m - row, 16); r += 32 / kPieces) {
      float g[4], u[4];
      load_shared(g, staged<Tile::kStaged>(staging, r, piece));
      load_shared(u, staged<Tile::kStaged>(staging, r, kPieces + piece));
      epilogue(row + r, from, count, g, u, gate_bias, up_bias);
    }
  }
}

template <class T, class Tile, Pairing kPairing, Major kB, class Epilogue>
__global__ void __launch_bounds__(kHasWgmma ? Tile::kThreads : 32, 1)
    gemm_tma_pair_kernel(const __grid_constant__ PairedMaps maps, const GemmArgs<T> g, const Epilogue epilogue) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Ring<Tile> ring{shared_address(memory)};
    const int warp = threadIdx.x / 32, first = blockIdx.y * g.split_k;
    const int steps = (min(g.k - first, g.split_k) + Tile::kK - 1) / Tile::kK;
    ring.open();
    if (warp >= Tile::kWarps) {
      give_registers<Tile::kFew>();
      if (threadIdx.x == 32 * Tile::kWarps) copy_paired_tiles<Tile, kPairing, kB>(maps, g, first, steps, ring);
      return;
    }
    take_registers<Tile::kMany>();
    each_tile<Tile>(g, [&](int2 origin) {
      float acc[Tile::kN / 8][4] = {}, none[1][4] = {};
      multiply_steps<T, Tile, Major::depth, kB>(acc, none, false, steps, ring);
      const uint32_t staging = ring.memory + Tile::kStaging + warp * Tile::kStagingBytes;
      store_columns<Tile>(acc, staging, origin.x + warp * 16, origin.y, g.m, g.n, epilogue);
    });
  }
}

// ---- launch ----

template <class Tile, Major kB, class T>
bool encode_pair(PairedMaps* maps, const GemmArgs<T, PairedRows<T>>& g) {
  const PairedRows<T>& o = g.b;
  return encode_operand<T>(&maps->first, {o.first, o.first_stride, o.aligned}, kB, o.rows, g.k, Tile::kN / 2) &&
         encode_operand<T>(&maps->second, {o.second, o.second_stride, o.aligned}, kB, o.rows, g.k, Tile::kN / 2);
}
template <class Tile, Major kB, class T>
bool encode_pair(PairedMaps* maps, const GemmArgs<T, PairedDepth<T>>& g) {
  const PairedDepth<T>& o = g.b;
  maps->begin = o.begin;
  return encode_operand<T>(&maps->first, {o.first, o.first_stride, o.aligned}, kB, g.n, o.depth, Tile::kN) &&
         encode_operand<T>(&maps->second, {o.second, o.second_stride, o.aligned}, kB, g.n, o.depth, Tile::kN);
}

// As launch_gemm_tma.
template <class T, class Tile, Pairing kPairing, Major kB, class Right, class Epilogue>
bool launch_gemm_tma_pair(cudaError_t* status, const GemmArgs<T, Right>& g, int slices, const Epilogue& epilogue,
                          cudaStream_t stream) {
  const auto kernel = gemm_tma_pair_kernel<T, Tile, kPairing, kB, Epilogue>;
  const void* const entry = reinterpret_cast<const void*>(kernel);
  PairedMaps maps{};
  const bool whole_steps = slices == 1 || g.split_k % Tile::kK == 0;
  if (!whole_steps || !encode_operand(&maps.a, g.a, Major::depth, g.m, g.k, Tile::kM) ||
      !encode_pair<Tile, kB>(&maps, g) || !has_warpgroups(entry))
    return false;
  int processors = 0;
  *status = processor_count(&processors);
  if (*status == cudaSuccess)
    *status = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (*status != cudaSuccess) return true;
  const dim3 grid(unsigned(std::min(gemm_tiles<Tile>(g.m, g.n), ceil_div(processors, slices))), unsigned(slices));
  const GemmArgs<T> plain{g.a, {}, g.m, g.n, g.k, g.split_k, nullptr, 0};
  kernel<<<grid, Tile::kThreads, Tile::kShared, stream>>>(maps, plain, epilogue);
  *status = cudaGetLastError();
  return true;
}

template <class T, class Tile, Major kA, Major kB, bool kSums, Pairing kPairing, class Right, class Epilogue>
cudaError_t launch_paired_gemm(const GemmArgs<T, Right>& g, int slices, const Epilogue& epilogue, cudaStream_t stream) {
  static_assert(kA == Major::depth && !kSums);
  constexpr bool kWide = std::is_same_v<Tile, WideTile>;
  if constexpr (kWide || std::is_same_v<Tile, HopperTile>) {
    cudaError_t status = cudaSuccess;
    if (launch_gemm_tma_pair<T, TmaTile<Tile::kN>, kPairing, kB>(&status, g, slices, epilogue, stream)) return status;
  }
  using Plain = std::conditional_t<kWide, HopperTile, Tile>;
  return launch_gemm_async<T, Plain, kA, kB, kSums>(g, slices, epilogue, stream);
}

template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
cudaError_t launch_gemm(const GemmArgs<T, PairedRows<T>>& g, int slices, const Epilogue& epilogue,
                        cudaStream_t stream) {
  return launch_paired_gemm<T, Tile, kA, kB, kSums, Pairing::rows>(g, slices, epilogue, stream);
}
template <class T, class Tile, Major kA, Major kB, bool kSums, class Epilogue>
cudaError_t launch_gemm(const GemmArgs<T, PairedDepth<T>>& g, int slices, const Epilogue& epilogue,
                        cudaStream_t stream) {
  return launch_paired_gemm<T, Tile, kA, kB, kSums, Pairing::depth>(g, slices, epilogue, stream);
}

}  // namespace pyfast
