#include "metal/linear_glu.h"

#include "../checks.h"
#include "linear_operands.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_glu";

LinearSizes glu_sizes(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight) {
  const LinearSizes sizes = linear_sizes(kOp, x, gate_weight);
  expect_sizes(kOp, "up_weight", up_weight, {sizes.n, sizes.k});
  expect_same_dtype(kOp, "up_weight", up_weight, x);
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> linear_glu_cpu(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                                                  std::optional<Tensor> gate_bias, std::optional<Tensor> up_bias,
                                                  StringHandle act, bool save) {
  const Act activation = parse_act(kOp, taken(act));
  const auto [m, n, k] = glu_sizes(x, gate_weight, up_weight);
  const DType dtype = dtype_of(kOp, "x", x);
  const Tensor in = unit_stride_rows(x), wg = unit_stride_either(gate_weight), wu = unit_stride_either(up_weight);
  gate_bias = expect_vector(kOp, "gate_bias", gate_bias, n, x);
  up_bias = expect_vector(kOp, "up_bias", up_bias, n, x);
  Tensor out = empty({m, n}, x.scalar_type());
  Tensor gate = save ? empty({m, n}, x.scalar_type()) : none_like(x);
  Tensor up = save ? empty({m, n}, x.scalar_type()) : none_like(x);
  if (m > 0 && n > 0) {
    const LinearGluArgs args{dtype, activation, m, n, k, in.const_data_ptr(), row_stride(in),
                             {weight_view(wg), weight_view(wu)}, {pointer(gate_bias), pointer(up_bias)},
                             out.mutable_data_ptr(),
                             {save ? gate.mutable_data_ptr() : nullptr, save ? up.mutable_data_ptr() : nullptr}};
    dispatch_matmul_isa(dtype, [&](auto isa) { linear_glu<decltype(isa)::value>(args); });
  }
  return {out, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_glu_backward_cpu(
    const Tensor& grad_out, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight, const Tensor& gate,
    const Tensor& up, StringHandle act, bool need_x, bool need_weight, bool need_bias) {
  const Act activation = parse_act(kOp, taken(act));
  const auto [m, n, k] = glu_sizes(x, gate_weight, up_weight);
  const DType dtype = dtype_of(kOp, "x", x);
  const auto checked = [&, m = m, n = n](const char* name, const Tensor& t) {
    expect_sizes(kOp, name, t, {m, n});
    expect_same_dtype(kOp, name, t, x);
    return as_contiguous(t);
  };
  const Tensor dy = checked("grad_out", grad_out), zg = checked("gate", gate), zu = checked("up", up);
  const Tensor in = unit_stride_rows(x), wg = unit_stride_either(gate_weight), wu = unit_stride_either(up_weight);
  const bool transposed = is_transposed(gate_weight) && is_transposed(up_weight);
  const Sizes layout = transposed ? Sizes{k, n} : Sizes{n, k};
  const auto wanted = [&](bool need, const Sizes& sizes) {
    return need ? empty(sizes, x.scalar_type()) : none_like(x);
  };
  Tensor dx = wanted(need_x, {m, k}), dwg = wanted(need_weight, layout), dwu = wanted(need_weight, layout);
  Tensor dbg = wanted(need_bias, {n}), dbu = wanted(need_bias, {n});
  if (m == 0 || n == 0) {
    for (Tensor* t : {&dx, &dwg, &dwu, &dbg, &dbu}) torch::stable::zero_(*t);
  } else {
    const auto to = [](bool need, const Tensor& t) { return need ? t.mutable_data_ptr() : nullptr; };
    const LinearGluBackwardArgs args{dtype, activation, m, n, k, dy.const_data_ptr(),
                                     {zg.const_data_ptr(), zu.const_data_ptr()}, in.const_data_ptr(), row_stride(in),
                                     {weight_view(wg), weight_view(wu)}, to(need_x, dx),
                                     {to(need_weight, dwg), to(need_weight, dwu)},
                                     {to(need_bias, dbg), to(need_bias, dbu)}, transposed};
    dispatch_matmul_isa(dtype, [&](auto isa) { linear_glu_backward<decltype(isa)::value>(args); });
  }
  if (need_weight && transposed) {
    dwg = torch::stable::transpose(dwg, 0, 1);
    dwu = torch::stable::transpose(dwu, 0, 1);
  }
  return {dx, dwg, dwu, dbg, dbu};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("linear_glu", TORCH_BOX(&pyfast::linear_glu_cpu));
  m.impl("linear_glu_backward", TORCH_BOX(&pyfast::linear_glu_backward_cpu));
}
