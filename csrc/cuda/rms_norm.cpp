#include "norm.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "rms_norm";

std::tuple<Tensor, Tensor, Tensor> rms_norm_cuda(const Tensor& x, std::optional<Tensor> residual,
                                                 std::optional<Tensor> weight, double eps) {
  const auto made = norm_forward(kOp, x, residual, weight, std::nullopt, eps, false, launch_rms_norm);
  return {made.out, made.sum, made.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad_out, std::optional<Tensor> grad_sum,
                                                  const Tensor& x, const Tensor& rstd, std::optional<Tensor> weight,
                                                  bool need_weight) {
  const auto made = norm_gradients(kOp, grad_out, grad_sum, x, std::nullopt, rstd, weight, need_weight, false,
                                   launch_rms_norm_backward);
  return {made.grad_x, made.grad_weight};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&pyfast::rms_norm_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&pyfast::rms_norm_backward_cuda));
}
