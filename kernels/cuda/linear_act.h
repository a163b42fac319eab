// What the launchers of linear_act take: for the room and the kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// x [m, k] with stride 1 in k; weight [n, k] with one of its strides 1 (that of n: `transposed`), weight_stride the
// other. Strides in elements; null means absent.
struct LinearActCudaArgs {
  int capability;   // the GPU's, major
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  bool transposed;
  const void* bias;      // [n]
  void *out, *preact;    // [m, n]
};

// Gradients that are null are not computed. grad_weight is [n, k], or [k, n] if `transposed`.
struct LinearActBackwardCudaArgs {
  int capability;
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void *grad_out, *saved;   // [m, n], contiguous; nothing is saved for Act::none
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  bool transposed;
  void *grad_x, *grad_weight, *grad_bias;
  void* workspace;   // linear_act_backward_workspace bytes, at a multiple of 16
  void* dpre = nullptr;   // [m, n]: where the gradient of the pre-activation is wanted, too; not for Act::none
};

int64_t linear_act_backward_workspace(const LinearActBackwardCudaArgs&);

// Sizes of outputs are positive; k may be 0 where no gradient but that of the bias is wanted.
cudaError_t launch_linear_act(const LinearActCudaArgs&, cudaStream_t);
cudaError_t launch_linear_act_backward(const LinearActBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
