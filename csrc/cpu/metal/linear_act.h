#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// A weight [N, K] with one of its strides 1: rows as nn.Linear keeps them, or the transpose of a [K, N] matrix.
struct WeightView {
  const void* data;
  int64_t out_stride, in_stride;
};

struct LinearActArgs {
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void* x;   // [m, k], unit stride in k
  int64_t x_stride;
  WeightView weight;
  const void* bias;      // [n] or null
  void *out, *preact;    // [m, n]; preact may be null
};

// Gradients that are null are not computed. grad_weight is [n, k], or [k, n] if `transposed`.
struct LinearActBackwardArgs {
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void *grad_out, *saved;   // [m, n]; saved is null where the gradient needs nothing
  const void* x;
  int64_t x_stride;
  WeightView weight;
  void *grad_x, *grad_weight, *grad_bias;
  bool transposed;
};

template <Isa kIsa> void linear_act(const LinearActArgs&);
template <Isa kIsa> void linear_act_backward(const LinearActBackwardArgs&);

}  // namespace pyfast
