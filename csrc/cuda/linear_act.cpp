#include "../../kernels/cuda/linear_act.h"

#include <functional>
#include <vector>

#include "cublaslt.h"
#include "linear.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_act";

// The operands of both directions, checked and brought to strides that the kernels read.
struct Operands {
  Gpu gpu;
  DType dtype;
  int64_t m, n, k;
  Tensor x, weight;
  bool transposed;

  Operands(const Tensor& input, const Tensor& matrix)
      : gpu(kOp, "x", input),
        dtype(gpu.dtype_of("x", input)),
        m(rows_of(kOp, "x", input)),
        n(rows_of(kOp, "weight", matrix)),
        k(input.size(1)) {
    gpu.expect_here("weight", matrix);
    expect_same_dtype(kOp, "weight", matrix, input);
    PYFAST_EXPECT(matrix.size(1) == k, kOp, ": weight must be [N, K=", k, "]; got ", text(sizes_of(matrix)));
    x = unit_stride_rows(input), weight = unit_stride_either(matrix);
    transposed = is_transposed(matrix);
  }

  int64_t weight_stride() const { return weight.stride(transposed ? 1 : 0); }
};

// Workspaces for cuBLASLt, which live as long as this; the next ones on the stream may take their place.
struct Workspaces {
  const Gpu& gpu;
  std::vector<Tensor> held;
  void* operator()(int64_t bytes) {
    held.push_back(gpu.empty({bytes}, ScalarType::Byte));
    return held.back().mutable_data_ptr();
  }
};

void backward_by_kernels(const Operands& o, LinearActBackwardCudaArgs args) {
  const Tensor workspace = o.gpu.empty({linear_act_backward_workspace(args)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  o.gpu.launched(launch_linear_act_backward(args, o.gpu.stream()));
}

// cuBLASLt multiplies where it is chosen and can; the derivative, and what it leaves, are done by our kernels. Its own
// derivatives are no help: they are taken of the result of a product, and here grad_out is given.
void backward(const Operands& o, LinearActBackwardCudaArgs args) {
  if (!cublaslt_chosen() || !(args.grad_x || args.grad_weight)) return backward_by_kernels(o, args);
  std::optional<Tensor> dpre;
  if (args.act != Act::none) {
    dpre = o.gpu.empty({o.m, o.n}, o.x.scalar_type());
    auto derivative = args;
    derivative.grad_x = derivative.grad_weight = nullptr;
    derivative.dpre = dpre->mutable_data_ptr();
    backward_by_kernels(o, derivative);
    args.act = Act::none, args.grad_out = derivative.dpre, args.saved = args.grad_bias = nullptr;
  }
  Workspaces workspaces{o.gpu};
  if (args.grad_x && cublaslt_grad_x(args, std::ref(workspaces), o.gpu.stream())) args.grad_x = nullptr;
  if (args.grad_weight && cublaslt_grad_weight(args, std::ref(workspaces), o.gpu.stream()))
    args.grad_weight = args.grad_bias = nullptr;
  if (args.grad_x || args.grad_weight || args.grad_bias) backward_by_kernels(o, args);
}

std::tuple<Tensor, Tensor> linear_act_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                           StringHandle act, bool save) {
  const Act activation = parse_act(kOp, taken(act));
  const Operands o(x, weight);
  bias = o.gpu.operand("bias", bias, {o.n}, x.scalar_type());
  const bool keep = save && grad_from_input(activation);
  const Tensor out = o.gpu.empty({o.m, o.n}, x.scalar_type());
  const Tensor preact = o.gpu.empty(keep ? Sizes{o.m, o.n} : Sizes{0}, x.scalar_type());
  if (o.m == 0 || o.n == 0) return {out, preact};
  const LinearActCudaArgs args{o.gpu.capability(), o.dtype, activation, o.m, o.n, o.k, o.x.const_data_ptr(),
                               row_stride(o.x), o.weight.const_data_ptr(), o.weight_stride(), o.transposed,
                               pointer(bias), out.mutable_data_ptr(), keep ? preact.mutable_data_ptr() : nullptr};
  Workspaces workspaces{o.gpu};
  if (!cublaslt_chosen() || !cublaslt_linear_act(args, std::ref(workspaces), o.gpu.stream()))
    o.gpu.launched(launch_linear_act(args, o.gpu.stream()));
  return {out, preact};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cuda(const Tensor& grad_out, const Tensor& x,
                                                            const Tensor& weight, std::optional<Tensor> saved,
                                                            StringHandle act, bool need_x, bool need_weight,
                                                            bool need_bias) {
  const Act activation = parse_act(kOp, taken(act));
  const Operands o(x, weight);
  const ScalarType type = x.scalar_type();
  const Tensor dy = o.gpu.operand("grad_out", grad_out, {o.m, o.n}, type);
  PYFAST_EXPECT(saved || activation == Act::none, kOp, ": saved must be given for an activation; got none");
  saved = o.gpu.operand("saved", saved, {o.m, o.n}, type);
  Tensor dx = o.gpu.empty(need_x ? Sizes{o.m, o.k} : Sizes{0}, type);
  const Sizes weight_sizes = o.transposed ? Sizes{o.k, o.n} : Sizes{o.n, o.k};
  Tensor dweight = o.gpu.empty(need_weight ? weight_sizes : Sizes{0}, type);
  Tensor dbias = o.gpu.empty({need_bias ? o.n : 0}, type);
  if (o.m == 0 || o.n == 0) {
    for (Tensor* t : {&dx, &dweight, &dbias}) torch::stable::zero_(*t);
  } else {
    const auto wanted = [](const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
    const LinearActBackwardCudaArgs args{o.gpu.capability(), o.dtype, activation, o.m, o.n, o.k, dy.const_data_ptr(),
                                   activation == Act::none ? nullptr : pointer(saved), o.x.const_data_ptr(),
                                   row_stride(o.x), o.weight.const_data_ptr(), o.weight_stride(), o.transposed,
                                   wanted(dx), wanted(dweight), wanted(dbias), nullptr};
    backward(o, args);
  }
  return {dx, need_weight && o.transposed ? torch::stable::transpose(dweight, 0, 1) : dweight, dbias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("linear_act", TORCH_BOX(&pyfast::linear_act_cuda));
  m.impl("linear_act_backward", TORCH_BOX(&pyfast::linear_act_backward_cuda));
}
