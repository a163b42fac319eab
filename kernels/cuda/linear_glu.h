// What the launchers of linear_glu take: for the room and the kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// x [m, k] and both weights [n, k], all with stride 1 in k; other strides in elements. Null means absent.
struct LinearGluCudaArgs {
  int capability;   // the GPU's, major
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void* x;
  int64_t x_stride;
  const void *gate_weight, *up_weight;
  int64_t gate_stride, up_stride;
  const void *gate_bias, *up_bias;   // [n]
  void *out, *gate, *up;             // [m, n]; the last two are what the backward wants, or both null
};

// Gradients that are null are not computed. Those of the weights are [n, k], or both [k, n] if `transposed`.
struct LinearGluBackwardCudaArgs {
  int capability;
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void *grad_out, *gate, *up;   // [m, n], contiguous
  const void* x;
  int64_t x_stride;
  const void *gate_weight, *up_weight;
  int64_t gate_stride, up_stride;
  bool transposed;
  void *grad_x, *grad_gate_weight, *grad_up_weight, *grad_gate_bias, *grad_up_bias;
  void* workspace;   // linear_glu_backward_workspace bytes, at a multiple of 16
};

int64_t linear_glu_backward_workspace(const LinearGluBackwardCudaArgs&);

// Sizes of outputs are positive; k may be 0 where no gradient but those of the biases is wanted.
cudaError_t launch_linear_glu(const LinearGluCudaArgs&, cudaStream_t);
cudaError_t launch_linear_glu_backward(const LinearGluBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
