#include "../../kernels/cuda/linear_glu.h"

#include "linear.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_glu";

// The operands of both directions, checked and brought to strides that the kernels read: of a transposed weight they
// take a copy.
struct Operands {
  Gpu gpu;
  DType dtype;
  int64_t m, n, k;
  Tensor x, gate, up;
  bool transposed;   // of the gradients: both weights are

  Operands(const Tensor& input, const Tensor& gate_weight, const Tensor& up_weight)
      : gpu(kOp, "x", input),
        dtype(gpu.dtype_of("x", input)),
        m(rows_of(kOp, "x", input)),
        n(rows_of(kOp, "gate_weight", gate_weight, kMostSize / 2)),   // both weights are counted at once
        k(input.size(1)) {
    expect_matrix(gpu, kOp, "gate_weight", gate_weight, {n, k}, input);
    expect_matrix(gpu, kOp, "up_weight", up_weight, {n, k}, input);
    x = unit_stride_rows(input), gate = unit_stride_rows(gate_weight), up = unit_stride_rows(up_weight);
    transposed = is_transposed(gate_weight) && is_transposed(up_weight);
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_glu_cuda(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                                                   std::optional<Tensor> gate_bias, std::optional<Tensor> up_bias,
                                                   StringHandle act, bool save) {
  const Act activation = parse_act(kOp, taken(act));
  const Operands o(x, gate_weight, up_weight);
  const ScalarType type = x.scalar_type();
  gate_bias = o.gpu.operand("gate_bias", gate_bias, {o.n}, type);
  up_bias = o.gpu.operand("up_bias", up_bias, {o.n}, type);
  const Sizes kept = save ? Sizes{o.m, o.n} : Sizes{0};
  const Tensor out = o.gpu.empty({o.m, o.n}, type), gate = o.gpu.empty(kept, type), up = o.gpu.empty(kept, type);
  if (o.m == 0 || o.n == 0) return {out, gate, up};
  const LinearGluCudaArgs args{o.gpu.capability(), o.dtype, activation, o.m, o.n, o.k, o.x.const_data_ptr(),
                               row_stride(o.x), o.gate.const_data_ptr(), o.up.const_data_ptr(), row_stride(o.gate),
                               row_stride(o.up), pointer(gate_bias), pointer(up_bias), out.mutable_data_ptr(),
                               save ? gate.mutable_data_ptr() : nullptr, save ? up.mutable_data_ptr() : nullptr};
  o.gpu.launched(launch_linear_glu(args, o.gpu.stream()));
  return {out, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_glu_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight, const Tensor& gate,
    const Tensor& up, StringHandle act, bool need_x, bool need_weight, bool need_bias) {
  const Act activation = parse_act(kOp, taken(act));
  const Operands o(x, gate_weight, up_weight);
  const ScalarType type = x.scalar_type();
  const Sizes all{o.m, o.n}, layout = o.transposed ? Sizes{o.k, o.n} : Sizes{o.n, o.k};
  const Tensor dy = o.gpu.operand("grad_out", grad_out, all, type), zg = o.gpu.operand("gate", gate, all, type);
  const Tensor zu = o.gpu.operand("up", up, all, type);
  const auto wanted = [&](bool need, const Sizes& sizes) { return o.gpu.empty(need ? sizes : Sizes{0}, type); };
  Tensor dx = wanted(need_x, {o.m, o.k}), dwg = wanted(need_weight, layout), dwu = wanted(need_weight, layout);
  Tensor dbg = wanted(need_bias, {o.n}), dbu = wanted(need_bias, {o.n});
  if (o.m == 0 || o.n == 0) {
    for (Tensor* t : {&dx, &dwg, &dwu, &dbg, &dbu}) torch::stable::zero_(*t);
  } else {
    const auto to = [](const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
    LinearGluBackwardCudaArgs args{o.gpu.capability(), o.dtype, activation, o.m, o.n, o.k, dy.const_data_ptr(),
                                   zg.const_data_ptr(), zu.const_data_ptr(), o.x.const_data_ptr(), row_stride(o.x),
                                   o.gate.const_data_ptr(), o.up.const_data_ptr(), row_stride(o.gate), row_stride(o.up),
                                   o.transposed, to(dx), to(dwg), to(dwu), to(dbg), to(dbu), nullptr};
    const Tensor workspace = o.gpu.empty({linear_glu_backward_workspace(args)}, ScalarType::Byte);
    args.workspace = workspace.mutable_data_ptr();
    o.gpu.launched(launch_linear_glu_backward(args, o.gpu.stream()));
  }
  if (need_weight && o.transposed) {
    dwg = torch::stable::transpose(dwg, 0, 1);
    dwu = torch::stable::transpose(dwu, 0, 1);
  }
  return {dx, dwg, dwu, dbg, dbu};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("linear_glu", TORCH_BOX(&pyfast::linear_glu_cuda));
  m.impl("linear_glu_backward", TORCH_BOX(&pyfast::linear_glu_backward_cuda));
}
