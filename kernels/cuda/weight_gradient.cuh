// Weight gradients dY^T X, with the bias gradients on their way: the sums of the left operand's rows.
#pragma once

#include "products.cuh"
#include "weight_gradient.h"

namespace pyfast {

int64_t weight_gradient_floats(const WeightGradientArgs& w) {
  return dispatch_element(w.dtype, [&](auto e) {
    const auto plan = plan_product<typename decltype(e)::type>(w.capability, w.m, w.n, w.k);
    return plan.parts() + (w.sums ? plan.sums() : 0);
  });
}

cudaError_t launch_weight_gradient(const WeightGradientArgs& w, cudaStream_t stream) {
  return dispatch_element(w.dtype, [&](auto e) {
    using T = typename decltype(e)::type;
    const auto plan = plan_product<T>(w.capability, w.m, w.n, w.k);
    const auto a = operand<T>(w.a, w.a_stride), b = operand<T>(w.b, w.b_stride);
    return launch_product<Major::rows, Major::rows, true>(plan, a, b, w.k, static_cast<T*>(w.out),
                                                          static_cast<T*>(w.sums), w.workspace, stream, w.depth_there);
  });
}

}  // namespace pyfast
