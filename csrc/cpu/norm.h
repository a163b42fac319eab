// The room of layer_norm and rms_norm: what they check and allocate is the same.
#pragma once

#include "../checks.h"
#include "metal/norm.h"

namespace pyfast {

struct NormOutputs {
  Tensor out, sum, mean, rstd;
};

struct NormGradients {
  Tensor grad_x, grad_weight, grad_bias;
};

// The dtype of weight and bias: that of x, or float32 beside a 16-bit x, as under autocast.
inline ScalarType affine_type(const char* op, const Tensor& x, const std::optional<Tensor>& weight) {
  if (!weight || (weight->scalar_type() == ScalarType::Float && accumulator_type(x) == ScalarType::Float))
    return weight ? ScalarType::Float : x.scalar_type();
  expect_same_dtype(op, "weight", *weight, x);
  return x.scalar_type();
}

// Bytes of operands and results beyond which the large results go past the caches: what two cores of a shared machine
// get of its last cache, whose size says little, while other tensors want it too. There it took 0.4 to 0.9 of the time;
// who reads the results finds them in memory.
constexpr int64_t kCachedBytes = int64_t(8) << 20;

// `arrays` of the size of `out` are read and written, of which `out` and `sum` by such stores.
inline bool streams(const Tensor& out, const Tensor* sum, int64_t arrays) {
  constexpr int64_t kVector = 64;
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVector == 0; };
  const int64_t row = out.size(1) * int64_t(out.element_size()), bytes = out.size(0) * row * arrays;
  return bytes > kCachedBytes && row % kVector == 0 && aligned(out) && (!sum || aligned(*sum));
}

// kernel(isa, args) calls the metal; `centred` asks for the mean too.
template <class Kernel>
NormOutputs norm_forward(const char* op, const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                         std::optional<Tensor> bias, double eps, bool centred, const Kernel& kernel) {
  expect_rank(op, "x", x, 2);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType dtype = dtype_of(op, "x", x);
  const ScalarType type = x.scalar_type(), wide = accumulator_type(x), affine = affine_type(op, x, weight);
  const auto prepare = [&](const char* name, std::optional<Tensor>& t, const Sizes& sizes, ScalarType expected) {
    if (!t) return;
    expect_sizes(op, name, *t, sizes);
    expect_scalar_type(op, name, *t, expected);
    t = as_contiguous(*t);
  };
  prepare("residual", residual, {rows, cols}, type);
  prepare("weight", weight, {cols}, affine);
  prepare("bias", bias, {cols}, affine);
  const Tensor in = as_contiguous(x);
  NormOutputs made{empty({rows, cols}, type), residual ? empty({rows, cols}, type) : none_like(x),
                   empty({centred ? rows : 0}, wide), empty({rows}, wide)};
  const DType affine_dtype = affine == type ? dtype : DType::float32;
  const NormArgs args{dtype, affine_dtype, rows, cols, eps, in.const_data_ptr(), pointer(residual), pointer(weight),
                      pointer(bias), made.out.mutable_data_ptr(), made.sum.mutable_data_ptr(),
                      made.mean.mutable_data_ptr(), made.rstd.mutable_data_ptr(),
                      streams(made.out, residual ? &made.sum : nullptr, residual ? 4 : 2)};
  if (rows > 0 && cols > 0) dispatch_isa(dtype, [&](auto isa) { kernel(isa, args); });
  return made;
}

template <class Kernel>
NormGradients norm_gradients(const char* op, const Tensor& grad_out, std::optional<Tensor> grad_sum, const Tensor& x,
                             const Tensor* mean, const Tensor& rstd, std::optional<Tensor> weight, bool need_weight,
                             bool need_bias, const Kernel& kernel) {
  expect_rank(op, "x", x, 2);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType dtype = dtype_of(op, "x", x);
  const ScalarType type = x.scalar_type(), wide = accumulator_type(x), affine = affine_type(op, x, weight);
  const auto checked = [&](const char* name, const Tensor& t, const Sizes& sizes, ScalarType expected) {
    expect_sizes(op, name, t, sizes);
    expect_scalar_type(op, name, t, expected);
    return as_contiguous(t);
  };
  const Tensor dy = checked("grad_out", grad_out, {rows, cols}, type), in = as_contiguous(x);
  const Tensor scale = checked("rstd", rstd, {rows}, wide), mu = mean ? checked("mean", *mean, {rows}, wide) : scale;
  if (grad_sum) grad_sum = checked("grad_sum", *grad_sum, {rows, cols}, type);
  if (weight) weight = checked("weight", *weight, {cols}, affine);
  const bool partials = need_weight || need_bias;
  Tensor partial = partials ? empty({norm_partials(rows), 2, cols}, wide) : empty({0}, wide);
  NormGradients made{empty({rows, cols}, type), empty({need_weight ? cols : 0}, affine),
                     empty({need_bias ? cols : 0}, affine)};
  const DType affine_dtype = affine == type ? dtype : DType::float32;
  const NormBackwardArgs args{dtype, affine_dtype, rows, cols, dy.const_data_ptr(), pointer(grad_sum),
                              in.const_data_ptr(), mu.const_data_ptr(), scale.const_data_ptr(), pointer(weight),
                              made.grad_x.mutable_data_ptr(),
                              need_weight ? made.grad_weight.mutable_data_ptr() : nullptr,
                              need_bias ? made.grad_bias.mutable_data_ptr() : nullptr,
                              partials ? partial.mutable_data_ptr() : nullptr,
                              streams(made.grad_x, nullptr, grad_sum ? 4 : 3)};
  if (cols > 0) dispatch_isa(dtype, [&](auto isa) { kernel(isa, args); });
  return made;
}

}  // namespace pyfast
