// act(x Wg^T + bg) * (x Wu^T + bu) and its gradients: which products and passes they are, and their launchers.
//
// Forward: one product over the rows of both weights by turns, whose epilogue has the gate and its factor in the same
// thread. Backward: one pass makes the gradients of both, [M, N] each, side by side; dX is one product over the depth
// of both, in one accumulator, and each weight has one product over the rows of x.
#pragma once

#include "glu_backward.cuh"
#include "linear_glu.h"
#include "paired_gemm.cuh"
#include "products.cuh"
#include "weight_gradient.h"

namespace pyfast {

template <class T>
cudaError_t launch_linear_glu_of(const LinearGluCudaArgs& l, cudaStream_t stream) {
  const auto x = operand<T>(l.x, l.x_stride);
  const auto gate = operand<T>(l.gate_weight, l.gate_stride), up = operand<T>(l.up_weight, l.up_stride);
  const PairedRows<T> both{gate.data, up.data, gate.stride, up.stride, int(l.n), gate.aligned && up.aligned};
  const int m = int(l.m), n = PairedRows<T>::paired(int(l.n)), k = int(l.k);
  const GemmArgs<T, PairedRows<T>> g{x, both, m, n, k, k, nullptr, 0};
  const GluEpilogue<T> epilogue{static_cast<T*>(l.out), static_cast<T*>(l.gate), static_cast<T*>(l.up),
                                static_cast<const T*>(l.gate_bias), static_cast<const T*>(l.up_bias), int(l.n), l.act,
                                l.n % 4 == 0};
  return dispatch_tile<T>(l.capability, m, n, [&](auto tile) {
    return launch_gemm<T, decltype(tile), Major::depth, Major::depth, false>(g, 1, epilogue, stream);
  });
}

cudaError_t launch_linear_glu(const LinearGluCudaArgs& l, cudaStream_t stream) {
  return dispatch_element(l.dtype, [&](auto e) { return launch_linear_glu_of<typename decltype(e)::type>(l, stream); });
}

// ---- backward ----

// The parts of the workspace: the pair of gradients, then what is needed for one launch after the other.
template <class T>
struct LinearGluBackwardPlan {
  bool products;
  int begin;               // of dup beside dgate
  int blocks;              // of rows, of the pass
  ProductPlan dx;
  WeightGradientArgs dweight;
  int64_t pair, scratch;   // bytes

  explicit LinearGluBackwardPlan(const LinearGluBackwardCudaArgs& l) {
    products = l.grad_x || l.grad_gate_weight;
    begin = int(ceil_div(l.n, kDepthStep) * kDepthStep);
    blocks = act_backward_blocks<T>(l.m, l.n);
    dx = plan_product<T>(l.capability, l.m, l.k, begin + l.n);
    dweight = {l.capability, l.dtype, l.transposed ? l.k : l.n, l.transposed ? l.n : l.k, l.m};
    pair = products ? l.m * 2 * begin * int64_t(sizeof(T)) : 0;
    const int64_t floats[] = {l.grad_gate_bias ? 2 * blocks * padded(l.n) : 0, l.grad_x ? dx.parts() : 0,
                              l.grad_gate_weight ? weight_gradient_floats(dweight) : 0};
    scratch = std::max({floats[0], floats[1], floats[2]}) * int64_t(sizeof(float));
  }
};

int64_t linear_glu_backward_workspace(const LinearGluBackwardCudaArgs& l) {
  return dispatch_element(l.dtype, [&](auto e) {
    const LinearGluBackwardPlan<typename decltype(e)::type> plan(l);
    return plan.pair + plan.scratch;
  });
}

// The pass, and the bias gradients from what it leaves.
template <class T>
cudaError_t launch_glu_pair(const LinearGluBackwardCudaArgs& l, const LinearGluBackwardPlan<T>& plan, T* pair,
                            float* scratch, cudaStream_t stream) {
  const auto dy = operand<T>(l.grad_out, l.n), gate = operand<T>(l.gate, l.n), up = operand<T>(l.up, l.n);
  float* const partial[] = {l.grad_gate_bias ? scratch : nullptr,
                            l.grad_gate_bias ? scratch + plan.blocks * padded(l.n) : nullptr};
  cudaError_t status = launch_glu_pass<T>({dy.data, gate.data, up.data, pair, partial[0], partial[1], l.m, int(l.n),
                                           plan.begin, l.act, dy.aligned && gate.aligned && up.aligned}, stream);
  void* const sums[] = {l.grad_gate_bias, l.grad_up_bias};
  for (int i = 0; i < 2; ++i)
    if (status == cudaSuccess && sums[i])
      status = launch_column_sums(static_cast<T*>(sums[i]), partial[i], l.n, plan.blocks, stream);
  return status;
}

template <class T>
cudaError_t launch_linear_glu_backward_of(const LinearGluBackwardCudaArgs& l, cudaStream_t stream) {
  LinearGluBackwardPlan<T> plan(l);
  T* const pair = plan.products ? static_cast<T*>(l.workspace) : nullptr;
  float* const scratch = reinterpret_cast<float*>(static_cast<char*>(l.workspace) + plan.pair);
  cudaError_t status = launch_glu_pair(l, plan, pair, scratch, stream);
  const int64_t pitch = 2 * int64_t(plan.begin);
  if (status == cudaSuccess && l.grad_x) {
    const auto gate = operand<T>(l.gate_weight, l.gate_stride), up = operand<T>(l.up_weight, l.up_stride);
    const PairedDepth<T> weights{gate.data, up.data, gate.stride, up.stride, int(l.n), plan.begin,
                                 gate.aligned && up.aligned};
    T *const dx = static_cast<T*>(l.grad_x), *const none = nullptr;
    status = launch_product<Major::depth, Major::rows, false>(plan.dx, operand<T>(pair, pitch), weights,
                                                              plan.begin + l.n, dx, none, scratch, stream);
  }
  void* const grads[] = {l.grad_gate_weight, l.grad_up_weight};
  for (int i = 0; i < 2; ++i) {
    if (status != cudaSuccess || !grads[i]) break;
    const void* const half = pair + i * plan.begin;
    plan.dweight.a = l.transposed ? l.x : half, plan.dweight.a_stride = l.transposed ? l.x_stride : pitch;
    plan.dweight.b = l.transposed ? half : l.x, plan.dweight.b_stride = l.transposed ? pitch : l.x_stride;
    plan.dweight.out = grads[i], plan.dweight.workspace = scratch;
    status = launch_weight_gradient(plan.dweight, stream);
  }
  return status;
}

cudaError_t launch_linear_glu_backward(const LinearGluBackwardCudaArgs& l, cudaStream_t stream) {
  return dispatch_element(l.dtype,
                          [&](auto e) { return launch_linear_glu_backward_of<typename decltype(e)::type>(l, stream); });
}

}  // namespace pyfast
