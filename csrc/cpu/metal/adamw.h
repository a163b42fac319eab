#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// One parameter: contiguous arrays of `count` elements. Null max_exp_avg_sq or master means absent. Gradient
// and moments are of the parameter's dtype or, beside a 16-bit parameter, float32; a master is float32.
struct AdamWTensor {
  int64_t count;
  DType dtype, grad_dtype, moment_dtype;
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
  double lr, beta1, beta2, eps, weight_decay, step;
};

// The tensors laid end to end, each beginning at a multiple of kAdamWAlignment, are cut into chunks of
// kAdamWChunk elements: equal work for the threads however unequal the tensors are.
constexpr int64_t kAdamWAlignment = 64, kAdamWChunk = 8192;

struct AdamWArgs {
  const AdamWTensor* tensors;
  const int64_t* first;   // [count + 1] where each tensor begins in that layout, and its end
  int64_t count;
  bool decoupled, maximize;
  double grad_scale, max_norm;   // max_norm infinity: no clipping
  double* partial;               // [chunks] workspace
  bool skips;                    // only the norm is wanted
};

// Updates every tensor; returns the norm of all grad * grad_scale.
template <Isa kIsa> double adamw_step(const AdamWArgs&);

}  // namespace pyfast
