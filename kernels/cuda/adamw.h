// What the launcher of adamw_step_ takes: for the room and the kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../../csrc/dispatch.h"

namespace pyfast {

// The numbers of the formula that stay the same over a parameter.
struct AdamWNumbers {
  double grad_factor, keep, l2, rate1, beta2, rate2, step_size, root_scale, eps;
};

// One parameter: contiguous arrays of `count` elements. Null peak (max_exp_avg_sq) or master: absent. Gradient and
// moments are of the parameter's dtype or, beside a 16-bit parameter, float32; a master is float32.
struct AdamWCudaTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *peak, *master;
  int64_t count;
  int32_t first_chunk;   // set by the launcher
  uint8_t dtype, grad_dtype, moment_dtype, aligned;   // DType; all arrays at multiples of 16 bytes
  AdamWNumbers numbers;
};

constexpr int64_t kAdamWCudaChunk = 16384;   // elements of a block: a launch is even however unequal the tensors are

struct AdamWCudaArgs {
  std::vector<AdamWCudaTensor> tensors;
  const double* hyper;     // on the GPU: [tensors, 6]: lr, beta1, beta2, eps, weight_decay, step; null: see `numbers`
  AdamWNumbers* numbers;   // [tensors] on the GPU, made from hyper
  bool decoupled, maximize;
  double grad_scale, max_norm;   // max_norm infinity: no clipping
  double *partial, *clip;        // [adamw_chunks], [1]
  float* norm;
  const float* found_inf;        // on the GPU, [1]: not 0: no step; null: step
};

int64_t adamw_chunks(const std::vector<AdamWCudaTensor>& tensors);
AdamWNumbers adamw_numbers(const double* hyper, bool decoupled, bool maximize, double grad_scale);
cudaError_t launch_adamw_step(const AdamWCudaArgs&, cudaStream_t);

}  // namespace pyfast
