#include "metal/layer_norm.h"

#include "../checks.h"

namespace pyfast {

int64_t layer_norm_partials(int64_t rows) {
  return rows < 64 ? 1 : rows < 1024 ? 8 : 32;   // enough for the threads of a workstation, few enough to add up
}

namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, std::optional<Tensor> residual,
                                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                          double eps) {
  expect_rank(kOp, "x", x, 2);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType dtype = dtype_of(kOp, "x", x);
  const auto prepare = [&](const char* name, std::optional<Tensor>& t, const Sizes& sizes) {
    if (!t) return;
    expect_sizes(kOp, name, *t, sizes);
    expect_same_dtype(kOp, name, *t, x);
    t = as_contiguous(*t);
  };
  prepare("residual", residual, {rows, cols});
  prepare("weight", weight, {cols});
  prepare("bias", bias, {cols});
  const Tensor in = as_contiguous(x);
  Tensor out = empty({rows, cols}, x.scalar_type());
  Tensor sum = residual ? empty({rows, cols}, x.scalar_type()) : none_like(x);
  Tensor mean = empty({rows}, accumulator_type(x)), rstd = empty({rows}, accumulator_type(x));
  const LayerNormArgs args{dtype, rows, cols, eps, in.const_data_ptr(), pointer(residual), pointer(weight), pointer(bias),
                           out.mutable_data_ptr(), sum.mutable_data_ptr(), mean.mutable_data_ptr(),
                           rstd.mutable_data_ptr()};
  if (rows > 0 && cols > 0) dispatch_isa([&](auto isa) { layer_norm<decltype(isa)::value>(args); });
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad_out, std::optional<Tensor> grad_sum,
                                                           const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                                           std::optional<Tensor> weight, bool need_weight,
                                                           bool need_bias) {
  expect_rank(kOp, "x", x, 2);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType dtype = dtype_of(kOp, "x", x);
  const ScalarType wide = accumulator_type(x);
  const auto checked = [&](const char* name, const Tensor& t, const Sizes& sizes, ScalarType type) {
    expect_sizes(kOp, name, t, sizes);
    expect_scalar_type(kOp, name, t, type);
    return as_contiguous(t);
  };
  const Tensor dy = checked("grad_out", grad_out, {rows, cols}, x.scalar_type()), in = as_contiguous(x);
  const Tensor mu = checked("mean", mean, {rows}, wide), scale = checked("rstd", rstd, {rows}, wide);
  if (grad_sum) grad_sum = checked("grad_sum", *grad_sum, {rows, cols}, x.scalar_type());
  if (weight) weight = checked("weight", *weight, {cols}, x.scalar_type());
  Tensor dx = empty({rows, cols}, x.scalar_type());
  Tensor dweight = need_weight ? empty({cols}, x.scalar_type()) : none_like(x);
  Tensor dbias = need_bias ? empty({cols}, x.scalar_type()) : none_like(x);
  Tensor partial = need_weight || need_bias ? empty({layer_norm_partials(rows), 2, cols}, wide) : empty({0}, wide);
  const LayerNormBackwardArgs args{dtype, rows, cols, dy.const_data_ptr(), pointer(grad_sum), in.const_data_ptr(),
                                   mu.const_data_ptr(), scale.const_data_ptr(), pointer(weight), dx.mutable_data_ptr(),
                                   need_weight ? dweight.mutable_data_ptr() : nullptr,
                                   need_bias ? dbias.mutable_data_ptr() : nullptr,
                                   need_weight || need_bias ? partial.mutable_data_ptr() : nullptr};
  if (cols > 0) dispatch_isa([&](auto isa) { layer_norm_backward<decltype(isa)::value>(args); });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&pyfast::layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&pyfast::layer_norm_backward_cpu));
}
