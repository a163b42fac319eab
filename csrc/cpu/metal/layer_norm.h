#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// Contiguous [rows, cols]; null means absent. mean and rstd are of the accumulator type.
struct LayerNormArgs {
  DType dtype;
  int64_t rows, cols;
  double eps;
  const void *x, *residual, *weight, *bias;
  void *out, *sum, *mean, *rstd;
};

struct LayerNormBackwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void *grad_out, *grad_sum, *x, *mean, *rstd, *weight;
  void *grad_x, *grad_weight, *grad_bias;
  void* partial;   // [layer_norm_partials(rows), 2, cols] of the accumulator type, if weight or bias gradients are wanted
};

int64_t layer_norm_partials(int64_t rows);

template <Isa kIsa> void layer_norm(const LayerNormArgs&);
template <Isa kIsa> void layer_norm_backward(const LayerNormBackwardArgs&);

}  // namespace pyfast
