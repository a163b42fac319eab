// The room of layer_norm and rms_norm on a GPU: what they check and allocate is the same.
#pragma once

#include "../../kernels/cuda/norm.h"
#include "gpu.h"

namespace pyfast {

struct NormOutputs {
  Tensor out, sum, mean, rstd;
};

struct NormGradients {
  Tensor grad_x, grad_weight, grad_bias;
};

// The dtype of weight and bias: that of x, or float32 beside a 16-bit x, as under autocast.
inline ScalarType norm_affine(const Tensor& x, const std::optional<Tensor>& weight) {
  return weight && weight->scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type();
}

using NormLauncher = cudaError_t (*)(const NormCudaArgs&, cudaStream_t);
using NormBackwardLauncher = cudaError_t (*)(const NormBackwardCudaArgs&, cudaStream_t);

inline DType norm_dtype(const char* op, const Gpu& gpu, const Tensor& x) {
  PYFAST_EXPECT(x.dim() == 2, op, ": x must have 2 dimensions; got ", text(sizes_of(x)));
  expect_columns(op, "x", x.size(1));
  return gpu.dtype_of("x", x);
}

// `centred` asks for the mean too.
inline NormOutputs norm_forward(const char* op, const Tensor& x, std::optional<Tensor> residual,
                                std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, bool centred,
                                NormLauncher launch) {
  const Gpu gpu(op, "x", x);
  const DType dtype = norm_dtype(op, gpu, x);
  const int64_t rows = x.size(0), cols = x.size(1);
  const ScalarType type = x.scalar_type(), affine = norm_affine(x, weight);
  residual = gpu.operand("residual", residual, {rows, cols}, type);
  weight = gpu.operand("weight", weight, {cols}, affine);
  bias = gpu.operand("bias", bias, {cols}, affine);
  const Tensor in = gpu.packed(x);
  NormOutputs made{gpu.empty({rows, cols}, type), gpu.empty(residual ? Sizes{rows, cols} : Sizes{0}, type),
                   gpu.empty({centred ? rows : 0}, ScalarType::Float), gpu.empty({rows}, ScalarType::Float)};
  if (rows == 0 || cols == 0) return made;
  const int strips = norm_plan(rows, cols, size_of(dtype), gpu.processors(), false).strips;
  const Tensor scratch = gpu.empty({strips > 1 ? 2 : 0, strips, rows}, ScalarType::Float);
  const NormCudaArgs args{dtype, affine == type ? dtype : DType::float32, rows, int(cols), float(eps),
                          in.const_data_ptr(), pointer(residual), pointer(weight), pointer(bias),
                          made.out.mutable_data_ptr(), made.sum.mutable_data_ptr(),
                          static_cast<float*>(made.mean.mutable_data_ptr()),
                          static_cast<float*>(made.rstd.mutable_data_ptr()),
                          static_cast<float*>(scratch.mutable_data_ptr()), gpu.processors()};
  gpu.launched(launch(args, gpu.stream()));
  return made;
}

// Without `mean`: rms_norm.
inline NormGradients norm_gradients(const char* op, const Tensor& grad_out, std::optional<Tensor> grad_sum,
                                    const Tensor& x, std::optional<Tensor> mean, const Tensor& rstd,
                                    std::optional<Tensor> weight, bool need_weight, bool need_bias,
                                    NormBackwardLauncher launch) {
  const Gpu gpu(op, "x", x);
  const DType dtype = norm_dtype(op, gpu, x);
  const int64_t rows = x.size(0), cols = x.size(1);
  const ScalarType type = x.scalar_type(), affine = norm_affine(x, weight);
  const Tensor dy = gpu.operand("grad_out", grad_out, {rows, cols}, type), in = gpu.packed(x);
  const Tensor scale = gpu.operand("rstd", rstd, {rows}, ScalarType::Float);
  mean = gpu.operand("mean", mean, {rows}, ScalarType::Float);
  grad_sum = gpu.operand("grad_sum", grad_sum, {rows, cols}, type);
  weight = gpu.operand("weight", weight, {cols}, affine);
  const auto made_for = [&](bool need) {
    const Tensor grad = gpu.empty({need ? cols : 0}, affine);
    return need && rows == 0 ? torch::stable::zero_(const_cast<Tensor&>(grad)) : grad;
  };
  NormGradients made{gpu.empty({rows, cols}, type), made_for(need_weight), made_for(need_bias)};
  if (rows == 0 || cols == 0) return made;
  const int processors = gpu.processors();
  const int64_t planes = int(need_weight) + int(need_bias);
  const NormPlan plan = norm_plan(rows, cols, size_of(dtype), processors, true);
  const Tensor partial = gpu.empty({planes, planes ? plan.partials : 0, norm_padded(cols)}, ScalarType::Float);
  const Tensor scratch = gpu.empty({plan.strips > 1 ? 2 : 0, plan.strips, rows}, ScalarType::Float);
  const NormBackwardCudaArgs args{dtype, affine == type ? dtype : DType::float32, rows, int(cols),
                                  dy.const_data_ptr(), pointer(grad_sum), in.const_data_ptr(), pointer(weight),
                                  static_cast<const float*>(pointer(mean)),
                                  static_cast<const float*>(scale.const_data_ptr()),
                                  made.grad_x.mutable_data_ptr(),
                                  need_weight ? made.grad_weight.mutable_data_ptr() : nullptr,
                                  need_bias ? made.grad_bias.mutable_data_ptr() : nullptr,
                                  planes ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
                                  static_cast<float*>(scratch.mutable_data_ptr()), processors};
  gpu.launched(launch(args, gpu.stream()));
  return made;
}

}  // namespace pyfast
