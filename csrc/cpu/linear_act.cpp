#include "metal/linear_act.h"

#include <cstring>

#include "../checks.h"
#include "linear_operands.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_act";

std::tuple<Tensor, Tensor> linear_act_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                          StringHandle act, bool save) {
  const Act activation = parse_act(kOp, taken(act));
  const auto [m, n, k] = linear_sizes(kOp, x, weight);
  const DType dtype = dtype_of(kOp, "x", x);
  const Tensor in = unit_stride_rows(x), w = unit_stride_either(weight);
  bias = expect_vector(kOp, "bias", bias, n, x);
  Tensor out = empty({m, n}, x.scalar_type());
  const bool keep = save && grad_from_input(activation);
  Tensor preact = keep ? empty({m, n}, x.scalar_type()) : none_like(x);
  if (m > 0 && n > 0) {
    const LinearActArgs args{dtype, activation, m, n, k, in.const_data_ptr(), row_stride(in), weight_view(w),
                             pointer(bias), out.mutable_data_ptr(), keep ? preact.mutable_data_ptr() : nullptr};
    dispatch_matmul_isa(dtype, [&](auto isa) { linear_act<decltype(isa)::value>(args); });
  }
  return {out, preact};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cpu(const Tensor& grad_out, const Tensor& x,
                                                           const Tensor& weight, std::optional<Tensor> saved,
                                                           StringHandle act, bool need_x, bool need_weight,
                                                           bool need_bias) {
  const Act activation = parse_act(kOp, taken(act));
  const auto [m, n, k] = linear_sizes(kOp, x, weight);
  const DType dtype = dtype_of(kOp, "x", x);
  expect_sizes(kOp, "grad_out", grad_out, {m, n});
  expect_same_dtype(kOp, "grad_out", grad_out, x);
  PYFAST_EXPECT(saved || activation == Act::none, kOp, ": saved must be given for an activation; got none");
  if (saved) {
    expect_sizes(kOp, "saved", *saved, {m, n});
    expect_same_dtype(kOp, "saved", *saved, x);
    saved = as_contiguous(*saved);
  }
  const Tensor dy = as_contiguous(grad_out), in = unit_stride_rows(x), w = unit_stride_either(weight);
  const bool transposed = is_transposed(weight);
  Tensor dx = need_x ? empty({m, k}, x.scalar_type()) : none_like(x);
  Tensor dweight = need_weight ? empty(transposed ? Sizes{k, n} : Sizes{n, k}, x.scalar_type()) : none_like(x);
  Tensor dbias = need_bias ? empty({n}, x.scalar_type()) : none_like(x);
  if (m == 0 || n == 0) {
    for (Tensor* t : {&dx, &dweight, &dbias}) torch::stable::zero_(*t);
  } else {
    const LinearActBackwardArgs args{dtype, activation, m, n, k, dy.const_data_ptr(), pointer(saved),
                                     in.const_data_ptr(), row_stride(in), weight_view(w),
                                     need_x ? dx.mutable_data_ptr() : nullptr,
                                     need_weight ? dweight.mutable_data_ptr() : nullptr,
                                     need_bias ? dbias.mutable_data_ptr() : nullptr, transposed};
    dispatch_matmul_isa(dtype, [&](auto isa) { linear_act_backward<decltype(isa)::value>(args); });
  }
  return {dx, need_weight && transposed ? torch::stable::transpose(dweight, 0, 1) : dweight, dbias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&pyfast::linear_act_cpu));
  m.impl("linear_act_backward", TORCH_BOX(&pyfast::linear_act_backward_cpu));
}
