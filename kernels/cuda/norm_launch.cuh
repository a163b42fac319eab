// Launchers of layer_norm (kCentred) and rms_norm.
#pragma once

#include "column_sums.cuh"
#include "norm_backward.cuh"

namespace pyfast {

template <class T>
struct NormType {
  using Element = T;
};

// f(NormType<T>)
template <class F>
cudaError_t dispatch_norm(DType dtype, const F& f) {
  if (dtype == DType::float32) return f(NormType<float>{});
  return dtype == DType::bfloat16 ? f(NormType<bfloat16>{}) : f(NormType<float16>{});
}

// launch(NormPass as a type, grid, block, bytes of shared memory), once or for both passes over strips.
template <class F>
void each_pass(const NormPlan& plan, const F& launch) {
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.strips)), block(unsigned(32 * plan.warps), unsigned(plan.teams));
  const size_t stage = plan.teams * staged_floats(32 * plan.warps * int64_t(plan.elements)) * sizeof(float);
  using Kind = NormPass;
  if (plan.strips == 1) return launch(std::integral_constant<Kind, Kind::kWhole>(), grid, block, stage);
  launch(std::integral_constant<Kind, Kind::kStatistics>(), grid, block, stage);
  launch(std::integral_constant<Kind, Kind::kApply>(), grid, block, stage);
}

template <bool kCentred>
cudaError_t launch_norm(NormCudaArgs a, cudaStream_t stream) {
  const NormPlan plan = norm_plan(a.rows, a.cols, size_of(a.dtype), a.processors, false);
  a.rows_each = plan.rows_each;
  a.period = plan.period;
  return dispatch_norm(a.dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    each_pass(plan, [&](auto pass, dim3 grid, dim3 block, size_t stage) {
      constexpr NormPass kPass = decltype(pass)::value;
      if (plan.elements == 8) {
        norm_forward_kernel<T, 8, kCentred, kPass><<<grid, block, stage, stream>>>(a);
      } else if constexpr (kPass == NormPass::kWhole) {
        norm_forward_kernel<T, 16, kCentred, kPass><<<grid, block, stage, stream>>>(a);
      }
    });
    return cudaGetLastError();
  });
}

// The second step of the gradients of weight and bias: adds up the rows of partial sums.
template <class A>
cudaError_t launch_norm_sums(const NormBackwardCudaArgs& a, const NormPlan& plan, cudaStream_t stream) {
  const float* plane = a.partial;
  for (void* out : {a.grad_weight, a.grad_bias}) {
    if (!out) continue;
    const cudaError_t error =
        launch_column_sums(static_cast<A*>(out), plane, a.cols, int(plan.partials), stream);
    if (error != cudaSuccess) return error;
    plane += plan.partials * norm_padded(a.cols);
  }
  return cudaSuccess;
}

template <bool kCentred>
cudaError_t launch_norm_backward(NormBackwardCudaArgs a, cudaStream_t stream) {
  const NormPlan plan = norm_plan(a.rows, a.cols, size_of(a.dtype), a.processors, true);
  a.rows_each = plan.rows_each;
  a.period = plan.period;
  return dispatch_norm(a.dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    each_pass(plan, [&](auto pass, dim3 grid, dim3 block, size_t stage) {
      constexpr NormPass kPass = decltype(pass)::value;
      if (plan.elements == 8) {
        norm_backward_kernel<T, 8, kCentred, kPass><<<grid, block, stage, stream>>>(a);
      } else if constexpr (kPass == NormPass::kWhole && sizeof(T) == 2) {
        norm_backward_kernel<T, 16, kCentred, kPass><<<grid, block, stage, stream>>>(a);
      }
    });
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || !a.partial) return error;
    return a.affine_dtype == a.dtype ? launch_norm_sums<T>(a, plan, stream)
                                     : launch_norm_sums<float>(a, plan, stream);
  });
}

}  // namespace pyfast
