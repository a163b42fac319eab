// What the launchers of linear_cross_entropy take: for the room and the kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// x [rows, depth] and weight [classes, depth] with stride 1 in the depth; other strides in elements. Null means absent.
struct LinearLossOperands {
  int capability;   // the GPU's, major
  DType dtype;
  int64_t rows, classes, depth;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;            // [classes]
  const int64_t* target;       // [rows]
  const float* class_weight;   // [classes]
  int64_t ignore_index;
  float label_smoothing;
  bool mean;
};

// lse as of cross_entropy. Both launchers may be given the same workspace, one after the other.
struct LinearCrossEntropyCudaArgs {
  LinearLossOperands in;
  float *loss, *lse;   // [rows], [rows, 2]
  float* total;        // [1]: the losses added up, divided by the weights of the rows if `mean`; null: not wanted
  void* workspace;     // linear_cross_entropy_workspace bytes, at a multiple of 16
};

// Gradients that are null are not computed; they are contiguous.
struct LinearCrossEntropyBackwardCudaArgs {
  LinearLossOperands in;
  const float* grad_loss;     // null: 1
  int64_t grad_loss_stride;   // 0: one number for all rows
  const float* lse;
  bool gathered;              // the forward has just left its rows in the workspace
  void *grad_x, *grad_weight, *grad_bias;
  void* workspace;            // linear_cross_entropy_backward_workspace bytes, at a multiple of 16
};

int64_t linear_cross_entropy_workspace(const LinearCrossEntropyCudaArgs&);
int64_t linear_cross_entropy_backward_workspace(const LinearCrossEntropyBackwardCudaArgs&);

// There is at least one class; of no rows there are no gradients to launch for.
cudaError_t launch_linear_cross_entropy(const LinearCrossEntropyCudaArgs&, cudaStream_t);
cudaError_t launch_linear_cross_entropy_backward(const LinearCrossEntropyBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
