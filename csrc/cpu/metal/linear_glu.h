#pragma once

#include "linear_act.h"

namespace pyfast {

struct LinearGluArgs {
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void* x;   // [m, k], unit stride in k
  int64_t x_stride;
  WeightView weight[2];        // gate, up
  const void* bias[2];         // [n] or null
  void *out, *preact[2];       // [m, n]; preact both or neither null
};

// Gradients that are null are not computed; both weights have one, or neither, and so for the biases.
struct LinearGluBackwardArgs {
  DType dtype;
  Act act;
  int64_t m, n, k;
  const void *grad_out, *preact[2];   // [m, n]
  const void* x;
  int64_t x_stride;
  WeightView weight[2];
  void *grad_x, *grad_weight[2], *grad_bias[2];
  bool transposed;                    // grad_weight is [k, n]
};

template <Isa kIsa> void linear_glu(const LinearGluArgs&);
template <Isa kIsa> void linear_glu_backward(const LinearGluBackwardArgs&);

}  // namespace pyfast
