// act(x weight^T + bias) and its gradients: how they are cut into products and passes, and their launchers.
//
// The derivative of the activation is taken in one elementwise pass that leaves the bias gradient on its way: it moves
// 6 m n bytes. Products that took it on their operands would read 2 m n bytes more for every column of their tiles and
// make it again there: of 1024 x 256 -> 256 with relu, forward and backward, 9.11 MB go through L2 this way and 9.57 MB
// the other (tests/cuda_budgets.json, tests/budgets.json), and more with every 128 of k. Without an activation there is
// no pass: the product of the weight gradient adds up the rows of its left operand.
#pragma once

#include <algorithm>

#include "act_backward.cuh"
#include "gemm.cuh"
#include "linear_act.h"

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

template <class T>
cudaError_t launch_linear_act_of(const LinearActCudaArgs& l, cudaStream_t stream) {
  const GemmArgs<T> g{operand<T>(l.x, l.x_stride), operand<T>(l.weight, l.weight_stride), int(l.m), int(l.n), int(l.k),
                      int(l.k), nullptr, 0};
  const LinearEpilogue<T> epilogue{static_cast<T*>(l.out), static_cast<T*>(l.preact), static_cast<const T*>(l.bias),
                                   l.n, l.act, l.n % 4 == 0};
  return dispatch_tile<T>(l.capability, l.m, l.n, [&](auto tile) {
    using Tile = decltype(tile);
    constexpr auto kRows = Major::rows, kDepth = Major::depth;
    return l.transposed ? launch_gemm<T, Tile, kDepth, kRows, false>(g, 1, epilogue, stream)
                        : launch_gemm<T, Tile, kDepth, kDepth, false>(g, 1, epilogue, stream);
  });
}

cudaError_t launch_linear_act(const LinearActCudaArgs& l, cudaStream_t stream) {
  return dispatch_element(l.dtype, [&](auto e) { return launch_linear_act_of<typename decltype(e)::type>(l, stream); });
}

// ---- backward ----

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
template <Major kA, Major kB, bool kSums, class T>
cudaError_t launch_product(const ProductPlan& plan, const GemmOperand<T>& a, const GemmOperand<T>& b, int64_t k, T* out,
                           T* sums, float* workspace, cudaStream_t stream) {
  float* const parts = plan.slices > 1 ? workspace : nullptr;
  float* const part_sums = sums ? workspace + plan.parts() : nullptr;
  const GemmArgs<T> g{a, b, int(plan.m), int(plan.n), int(k), plan.split_k, part_sums, padded(plan.m)};
  const StoreEpilogue<T> epilogue{out, parts, plan.n, padded(plan.m * plan.n), plan.n % 4 == 0};
  cudaError_t status = dispatch_tile<T>(plan.capability, plan.m, plan.n, [&](auto tile) {
    return launch_gemm<T, decltype(tile), kA, kB, kSums>(g, plan.slices, epilogue, stream);
  });
  if (status == cudaSuccess && parts) status = launch_column_sums(out, parts, plan.m * plan.n, plan.slices, stream);
  if (status == cudaSuccess && sums) status = launch_column_sums(sums, part_sums, plan.m, plan.slices, stream);
  return status;
}

// The parts of the workspace, in bytes: dpre, then what is needed for one launch after the other.
template <class T>
struct LinearActBackwardPlan {
  bool pass, sums_in_product;   // whether there is an elementwise pass; who makes the bias gradient
  ProductPlan dx, dweight;
  int64_t dpre, scratch;

  explicit LinearActBackwardPlan(const LinearActBackwardCudaArgs& l) {
    const bool products = l.grad_x || l.grad_weight;
    sums_in_product = l.grad_bias && l.act == Act::none && l.grad_weight && !l.transposed;
    pass = (l.act != Act::none && products) || (l.grad_bias && !sums_in_product);
    dx = plan_product<T>(l.capability, l.m, l.k, l.n);
    dweight = plan_product<T>(l.capability, l.transposed ? l.k : l.n, l.transposed ? l.n : l.k, l.m);
    dpre = l.act != Act::none && products ? ceil_div(l.m * l.n * int64_t(sizeof(T)), 256) * 256 : 0;
    const int64_t floats[] = {pass && l.grad_bias ? act_backward_blocks<T>(l.m, l.n) * padded(l.n) : 0,
                              l.grad_x ? dx.parts() : 0,
                              l.grad_weight ? dweight.parts() + (sums_in_product ? dweight.sums() : 0) : 0};
    scratch = std::max({floats[0], floats[1], floats[2]}) * int64_t(sizeof(float));
  }
};

int64_t linear_act_backward_workspace(const LinearActBackwardCudaArgs& l) {
  return dispatch_element(l.dtype, [&](auto e) {
    const LinearActBackwardPlan<typename decltype(e)::type> plan(l);
    return plan.dpre + plan.scratch;
  });
}

template <class T>
cudaError_t launch_linear_act_backward_of(const LinearActBackwardCudaArgs& l, cudaStream_t stream) {
  const LinearActBackwardPlan<T> plan(l);
  T* const dpre = plan.dpre ? static_cast<T*>(l.workspace) : nullptr;
  float* const scratch = reinterpret_cast<float*>(static_cast<char*>(l.workspace) + plan.dpre);
  const auto dy = operand<T>(l.grad_out, l.n), saved = operand<T>(l.saved, l.n);
  cudaError_t status = cudaSuccess;
  if (plan.pass) {
    float* const partial = l.grad_bias ? scratch : nullptr;
    status = launch_act_backward<T>({dy.data, saved.data, dpre, partial, l.m, int(l.n), l.act,
                                     dy.aligned && saved.aligned}, stream);
    if (status == cudaSuccess && partial)
      status = launch_column_sums(static_cast<T*>(l.grad_bias), partial, l.n, act_backward_blocks<T>(l.m, l.n), stream);
  }
  constexpr auto kRows = Major::rows, kDepth = Major::depth;
  const auto d = dpre ? operand<T>(dpre, l.n) : dy, x = operand<T>(l.x, l.x_stride);
  const auto w = operand<T>(l.weight, l.weight_stride);
  T *const dx = static_cast<T*>(l.grad_x), *const dweight = static_cast<T*>(l.grad_weight), *const none = nullptr;
  if (status == cudaSuccess && dx)
    status = l.transposed ? launch_product<kDepth, kDepth, false>(plan.dx, d, w, l.n, dx, none, scratch, stream)
                          : launch_product<kDepth, kRows, false>(plan.dx, d, w, l.n, dx, none, scratch, stream);
  if (status == cudaSuccess && dweight) {
    T* const sums = plan.sums_in_product ? static_cast<T*>(l.grad_bias) : none;   // not of a transposed weight
    status = launch_product<kRows, kRows, true>(plan.dweight, l.transposed ? x : d, l.transposed ? d : x, l.m, dweight,
                                                sums, scratch, stream);
  }
  return status;
}

cudaError_t launch_linear_act_backward(const LinearActBackwardCudaArgs& l, cudaStream_t stream) {
  return dispatch_element(l.dtype,
                          [&](auto e) { return launch_linear_act_backward_of<typename decltype(e)::type>(l, stream); });
}

}  // namespace pyfast
