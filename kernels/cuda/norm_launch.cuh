// Launchers of layer_norm (kCentred) and rms_norm.
#pragma once

#include "column_sums.cuh"
#include "norm.cuh"
#include "norm_wide.cuh"

namespace pyfast {

template <class T, class A>
struct NormTypes {
  using Element = T;
  using Affine = A;
};

// f(NormTypes<T, A>): weight and bias are of x's dtype, or float32.
template <class F>
cudaError_t dispatch_norm(DType dtype, DType affine, const F& f) {
  if (dtype == DType::float32) return f(NormTypes<float, float>{});
  if (dtype == DType::bfloat16)
    return affine == dtype ? f(NormTypes<bfloat16, bfloat16>{}) : f(NormTypes<bfloat16, float>{});
  return affine == dtype ? f(NormTypes<float16, float16>{}) : f(NormTypes<float16, float>{});
}

template <bool kCentred>
cudaError_t launch_norm(const NormCudaArgs& a, cudaStream_t stream) {
  const NormPlan plan = norm_plan(a.rows, a.cols, size_of(a.dtype), a.processors);
  const unsigned grid = unsigned(plan.blocks), block = unsigned(32 * plan.warps);
  const size_t stage = staged_floats(a.cols) * sizeof(float);
  return dispatch_norm(a.dtype, a.affine_dtype, [&](auto types) {
    using T = typename decltype(types)::Element;
    using A = typename decltype(types)::Affine;
    if (plan.wide) wide_norm_forward_kernel<T, A, kCentred><<<grid, block, 0, stream>>>(a);
    else if (plan.elements == 8) norm_forward_kernel<T, A, 8, kCentred><<<grid, block, stage, stream>>>(a);
    else norm_forward_kernel<T, A, 16, kCentred><<<grid, block, stage, stream>>>(a);
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
cudaError_t launch_norm_backward(const NormBackwardCudaArgs& a, cudaStream_t stream) {
  const NormPlan plan = norm_plan(a.rows, a.cols, size_of(a.dtype), a.processors);
  const unsigned grid = unsigned(plan.blocks), block = unsigned(32 * plan.warps);
  const dim3 strips(unsigned((a.cols + kNormWideStrip - 1) / kNormWideStrip), unsigned(plan.partials));
  const size_t stage = staged_floats(a.cols) * sizeof(float);
  return dispatch_norm(a.dtype, a.affine_dtype, [&](auto types) {
    using T = typename decltype(types)::Element;
    using A = typename decltype(types)::Affine;
    if (plan.wide) {
      wide_norm_backward_kernel<T, A, kCentred><<<grid, block, 0, stream>>>(a);
      if (a.partial) wide_norm_weight_kernel<T, kCentred><<<strips, kNormWideStrip, 0, stream>>>(a);
    } else if (plan.elements == 8) {
      norm_backward_kernel<T, A, 8, kCentred><<<grid, block, stage, stream>>>(a);
    } else {
      norm_backward_kernel<T, A, 16, kCentred><<<grid, block, stage, stream>>>(a);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess && a.partial ? launch_norm_sums<A>(a, plan, stream) : error;
  });
}

}  // namespace pyfast
