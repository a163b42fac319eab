// act(x weight^T + bias) and its gradients: how they are cut into products and passes, and their launchers.
//
// The derivative of the activation is taken in one elementwise pass that leaves the bias gradient on its way: it moves
// 6 m n bytes. Products that took it on their operands would read 2 m n bytes more for every column of their tiles and
// make it again there: of 1024 x 256 -> 256 with relu, forward and backward, 9.11 MB go through L2 this way and 9.57 MB
// the other (tests/cuda_budgets.json, tests/budgets.json), and more with every 128 of k. Without an activation there is
// no pass: the product of the weight gradient adds up the rows of its left operand.
#pragma once

#include "act_backward.cuh"
#include "linear_act.h"
#include "products.cuh"
#include "weight_gradient.h"

namespace pyfast {

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

// The parts of the workspace, in bytes: dpre, then what is needed for one launch after the other.
template <class T>
struct LinearActBackwardPlan {
  bool pass, sums_in_product;   // whether there is an elementwise pass; who makes the bias gradient
  ProductPlan dx;
  WeightGradientArgs dweight;   // its operands are set when they are there
  int64_t dpre, scratch;

  explicit LinearActBackwardPlan(const LinearActBackwardCudaArgs& l) {
    const bool products = l.grad_x || l.grad_weight || l.dpre;
    sums_in_product = l.grad_bias && l.act == Act::none && l.grad_weight && !l.transposed;
    pass = (l.act != Act::none && products) || (l.grad_bias && !sums_in_product);
    dx = plan_product<T>(l.capability, l.m, l.k, l.n);
    dweight = {l.capability, l.dtype, l.transposed ? l.k : l.n, l.transposed ? l.n : l.k, l.m};
    dweight.out = l.grad_weight;
    dweight.sums = sums_in_product ? l.grad_bias : nullptr;   // not of a transposed weight
    dpre = l.act != Act::none && products && !l.dpre ? ceil_div(l.m * l.n * int64_t(sizeof(T)), 256) * 256 : 0;
    const int64_t floats[] = {pass && l.grad_bias ? act_backward_blocks<T>(l.m, l.n) * padded(l.n) : 0,
                              l.grad_x ? dx.parts() : 0,
                              l.grad_weight ? weight_gradient_floats(dweight) : 0};
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
  LinearActBackwardPlan<T> plan(l);
  T* const dpre = static_cast<T*>(plan.dpre ? l.workspace : l.dpre);
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
  T *const dx = static_cast<T*>(l.grad_x), *const none = nullptr;
  if (status == cudaSuccess && dx)
    status = l.transposed ? launch_product<kDepth, kDepth, false>(plan.dx, d, w, l.n, dx, none, scratch, stream)
                          : launch_product<kDepth, kRows, false>(plan.dx, d, w, l.n, dx, none, scratch, stream);
  if (status == cudaSuccess && l.grad_weight) {
    const auto &left = l.transposed ? x : d, &right = l.transposed ? d : x;
    plan.dweight.a = left.data, plan.dweight.a_stride = left.stride;
    plan.dweight.b = right.data, plan.dweight.b_stride = right.stride;
    plan.dweight.workspace = scratch;
    status = launch_weight_gradient(plan.dweight, stream);
  }
  return status;
}

cudaError_t launch_linear_act_backward(const LinearActBackwardCudaArgs& l, cudaStream_t stream) {
  return dispatch_element(l.dtype,
                          [&](auto e) { return launch_linear_act_backward_of<typename decltype(e)::type>(l, stream); });
}

}  // namespace pyfast
