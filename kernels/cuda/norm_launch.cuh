// Launchers of layer_norm (kCentred) and rms_norm.
#pragma once

#include "column_sums.cuh"
#include "norm_backward.cuh"
#include "norm_long.cuh"
#include "norm_long_backward.cuh"
#include "norm_runs.cuh"

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

// kernel(packs of a thread as a type), launched for rows in runs, `runs` of them in shared memory at once.
template <class T, class Args, class F>
cudaError_t launch_runs(const NormPlan& plan, const Args& a, int runs, cudaStream_t stream, const F& kernel) {
  const int each = plan.elements / kPack<T>;
  const int floats = 2 * plan.teams + (runs > 1 ? norm_run_parked(plan.elements, kPack<T>) : 0);   // 2: statistics
  const size_t shared = 16 * norm_run_packs(each, sizeof(T), runs) + floats * sizeof(float);
  const auto launch = [&](auto packs) {
    void (*const entry)(Args) = kernel(packs);
    const cudaError_t status =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (status != cudaSuccess) return status;
    entry<<<unsigned(plan.blocks), dim3(unsigned(plan.lanes), unsigned(plan.teams)), shared, stream>>>(a);
    return cudaGetLastError();
  };
  if (each == 1) return launch(std::integral_constant<int, 1>());
  return each == 2 ? launch(std::integral_constant<int, 2>()) : launch(std::integral_constant<int, 3>());
}

template <bool kCentred>
cudaError_t launch_norm(NormCudaArgs a, cudaStream_t stream) {
  const NormPlan plan = norm_plan(a.rows, a.cols, size_of(a.dtype), a.processors, false);
  a.rows_each = plan.rows_each;
  a.period = plan.period;
  return dispatch_norm(a.dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    if (plan.lanes) {
      return launch_runs<T>(plan, a, 1, stream,
                            [](auto packs) { return &norm_run_forward_kernel<T, packs.value, kCentred>; });
    }
    cudaError_t status = cudaSuccess;
    if (plan.strips > 1 && launch_long<T, kCentred>(&status, a, stream)) return status;
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
cudaError_t launch_norm_sums(const NormBackwardCudaArgs& a, int64_t partials, cudaStream_t stream) {
  const float* plane = a.partial;
  for (void* out : {a.grad_weight, a.grad_bias}) {
    if (!out) continue;
    const cudaError_t error =
        launch_column_sums(static_cast<A*>(out), plane, a.cols, int(partials), stream);
    if (error != cudaSuccess) return error;
    plane += partials * norm_padded(a.cols);
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
    cudaError_t error = cudaSuccess;
    int64_t partials = plan.blocks;
    if (plan.lanes) {
      error = launch_runs<T>(plan, a, a.grad_sum ? 3 : 2, stream,
                             [](auto packs) { return &norm_run_backward_kernel<T, packs.value, kCentred>; });
    } else if (plan.strips == 1 || !launch_long_backward<T, kCentred>(&error, &partials, a, stream)) {
      each_pass(plan, [&](auto pass, dim3 grid, dim3 block, size_t stage) {
        constexpr NormPass kPass = decltype(pass)::value;
        if (plan.elements == 8) {
          norm_backward_kernel<T, 8, kCentred, kPass><<<grid, block, stage, stream>>>(a);
        } else if constexpr (kPass == NormPass::kWhole && sizeof(T) == 2) {
          norm_backward_kernel<T, 16, kCentred, kPass><<<grid, block, stage, stream>>>(a);
        }
      });
      error = cudaGetLastError();
    }
    if (error != cudaSuccess || !a.partial) return error;
    return a.affine_dtype == a.dtype ? launch_norm_sums<T>(a, partials, stream)
                                     : launch_norm_sums<float>(a, partials, stream);
  });
}

}  // namespace pyfast
