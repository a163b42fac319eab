// Products of matrices of any size: which tiles they take, and how the depth of those with few tiles is split.
#pragma once

#include <algorithm>

#include "../../csrc/dispatch.h"
#include "column_sums.cuh"
#include "gemm.cuh"

namespace pyfast {

constexpr int kFullGrid = 128;    // tiles; about the multiprocessors of a large GPU
constexpr int kMostSlices = 16;   // of a split product
constexpr int kLeastSteps = 8;    // of a slice, along its depth

template <class T>
struct Element {
  using type = T;
};

// f(Element<T>); there is no float64.
template <class F>
auto dispatch_element(DType dtype, const F& f) {
  if (dtype == DType::float32) return f(Element<float>{});
  if (dtype == DType::bfloat16) return f(Element<bfloat16>{});
  return f(Element<float16>{});
}

template <class T>
GemmOperand<T> operand(const void* data, int64_t stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
  return {static_cast<const T*>(data), stride, aligned};
}

// f(tile): a large one where it fills the GPU; on capability 9.0 a wide one where that fills it, too, and no half of it
// is left empty at the edge.
template <class T, class F>
auto dispatch_tile(int capability, int64_t m, int64_t n, const F& f) {
  if constexpr (sizeof(T) == 4) {
    return f(FloatTile{});
  } else {
    if (gemm_tiles<LargeTile>(m, n) < kFullGrid) return f(SmallTile{});
    if (capability != 9) return f(LargeTile{});
    const bool even = ceil_div(n, HopperTile::kN) % 2 == 0 || n > 8 * WideTile::kN;
    return even && gemm_tiles<WideTile>(m, n) >= kFullGrid ? f(WideTile{}) : f(HopperTile{});
  }
}

// How a gradient product is split along its depth, by its sizes alone, and what it needs of the workspace.
struct ProductPlan {
  int capability;
  int64_t m, n;
  int slices, split_k;
  int64_t parts() const { return slices > 1 ? slices * padded(m * n) : 0; }   // floats
  int64_t sums() const { return slices * padded(m); }                        // floats, where rows are summed
};

template <class T>
ProductPlan plan_product(int capability, int64_t m, int64_t n, int64_t k) {
  return dispatch_tile<T>(capability, m, n, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t steps = ceil_div(k, Tile::kK), tiles = std::max<int64_t>(gemm_tiles<Tile>(m, n), 1);
    const int64_t most = std::min<int64_t>({kFullGrid / tiles, steps / kLeastSteps, kMostSlices});
    const int64_t slice = ceil_div(steps, std::max<int64_t>(most, 1));   // steps of each
    return ProductPlan{capability, m, n, int(ceil_div(steps, slice)), int(slice * Tile::kK)};
  });
}

// out [m, n] = a b^T, summed over the slices in order; with kSums, sums [m] = the sums of a's rows.
template <Major kA, Major kB, bool kSums, class T, class Right>
cudaError_t launch_product(const ProductPlan& plan, const GemmOperand<T>& a, const Right& b, int64_t k, T* out, T* sums,
                           float* workspace, cudaStream_t stream, const int* depth_there = nullptr) {
  float* const parts = plan.slices > 1 ? workspace : nullptr;
  float* const part_sums = sums ? workspace + plan.parts() : nullptr;
  GemmArgs<T, Right> g{a, b, int(plan.m), int(plan.n), int(k), plan.split_k, part_sums, padded(plan.m)};
  g.depth_there = depth_there;
  const StoreEpilogue<T> epilogue{out, parts, plan.n, padded(plan.m * plan.n), plan.n % 4 == 0};
  cudaError_t status = dispatch_tile<T>(plan.capability, plan.m, plan.n, [&](auto tile) {
    return launch_gemm<T, decltype(tile), kA, kB, kSums>(g, plan.slices, epilogue, stream);
  });
  if (status == cudaSuccess && parts) status = launch_column_sums(out, parts, plan.m * plan.n, plan.slices, stream);
  if (status == cudaSuccess && sums) status = launch_column_sums(sums, part_sums, plan.m, plan.slices, stream);
  return status;
}

}  // namespace pyfast
