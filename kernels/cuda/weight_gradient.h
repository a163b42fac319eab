// What the launcher of weight gradients takes: one product for every linear layer, compiled once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// out [m, n] = A^T B of A [k, m] and B [k, n], whose rows lie strides (in elements) apart; sums [m] of A's columns.
// Null means absent.
struct WeightGradientArgs {
  int capability;   // the GPU's, major
  DType dtype;
  int64_t m, n, k;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void *out, *sums;          // contiguous
  const int* depth_there;    // where only the device knows k, which is at most that above
  float* workspace;          // weight_gradient_floats, at a multiple of 16 bytes
};

// By sizes, dtype, capability, and whether there are sums.
int64_t weight_gradient_floats(const WeightGradientArgs&);

cudaError_t launch_weight_gradient(const WeightGradientArgs&, cudaStream_t);

}  // namespace pyfast
