#include "norm.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, std::optional<Tensor> residual,
                                                           std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                           double eps) {
  const auto [out, sum, mean, rstd] = norm_forward(kOp, x, residual, weight, bias, eps, true, launch_layer_norm);
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& grad_out, std::optional<Tensor> grad_sum,
                                                            const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                                            std::optional<Tensor> weight, bool need_weight,
                                                            bool need_bias) {
  const auto [grad_x, grad_weight, grad_bias] = norm_gradients(kOp, grad_out, grad_sum, x, mean, rstd, weight,
                                                               need_weight, need_bias, launch_layer_norm_backward);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&pyfast::layer_norm_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&pyfast::layer_norm_backward_cuda));
}
