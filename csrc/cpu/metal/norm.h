// What the metal of layer_norm and rms_norm takes: contiguous [rows, cols], null means absent.
#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

struct NormArgs {
  DType dtype, affine_dtype;   // of x, and of weight and bias: the same or float32
  int64_t rows, cols;
  double eps;
  const void *x, *residual, *weight, *bias;
  void *out, *sum;
  void *mean, *rstd;   // [rows] of the accumulator type; no mean in rms_norm
  bool streams;        // out and sum go past the caches; their rows begin at multiples of 64 bytes
};

struct NormBackwardArgs {
  DType dtype, affine_dtype;
  int64_t rows, cols;
  const void *grad_out, *grad_sum, *x, *mean, *rstd, *weight;
  void *grad_x, *grad_weight, *grad_bias;
  void* partial;   // [norm_partials(rows), 2, cols] of the accumulator type, if weight or bias gradients are wanted
  bool streams;    // grad_x, as above
};

// Blocks of rows whose column sums are kept apart: enough for the threads of a workstation, few enough to add up.
constexpr int64_t norm_partials(int64_t rows) { return rows < 64 ? 1 : rows < 1024 ? 8 : 32; }

}  // namespace pyfast
