#include "metal/rms_norm.h"

#include "norm.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "rms_norm";

std::tuple<Tensor, Tensor, Tensor> rms_norm_cpu(const Tensor& x, std::optional<Tensor> residual,
                                                std::optional<Tensor> weight, double eps) {
  const auto kernel = [](auto isa, const NormArgs& args) { rms_norm<decltype(isa)::value>(args); };
  const auto made = norm_forward(kOp, x, residual, weight, std::nullopt, eps, false, kernel);
  return {made.out, made.sum, made.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad_out, std::optional<Tensor> grad_sum,
                                                 const Tensor& x, const Tensor& rstd, std::optional<Tensor> weight,
                                                 bool need_weight) {
  const auto kernel = [](auto isa, const NormBackwardArgs& args) { rms_norm_backward<decltype(isa)::value>(args); };
  const auto made = norm_gradients(kOp, grad_out, grad_sum, x, nullptr, rstd, weight, need_weight, false, kernel);
  return {made.grad_x, made.grad_weight};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&pyfast::rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&pyfast::rms_norm_backward_cpu));
}
