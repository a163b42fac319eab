#include "../../kernels/cuda/linear_cross_entropy.h"

#include "../reduction.h"
#include "linear.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats(const std::optional<Tensor>& t) { return static_cast<const float*>(pointer(t)); }

// The checked operands of both directions; of a transposed weight the kernels take a copy. Whether a target is a class
// the host cannot know without waiting: of one that is none the loss and the gradients are nan.
struct Operands {
  Gpu gpu;
  LinearLossOperands in;
  Tensor x, weight, target;
  std::optional<Tensor> bias, class_weight;

  Operands(const Tensor& input, const Tensor& matrix, const std::optional<Tensor>& biases, const Tensor& targets,
           const std::optional<Tensor>& weights, int64_t ignore_index, double smoothing, Reduction mode)
      : gpu(kOp, "x", input), in{gpu.capability(), gpu.dtype_of("x", input), rows_of(kOp, "x", input)} {
    in.classes = rows_of(kOp, "weight", matrix), in.depth = input.size(1);
    expect_matrix(gpu, kOp, "weight", matrix, {in.classes, in.depth}, input);
    bias = gpu.operand("bias", biases, {in.classes}, input.scalar_type());
    target = gpu.operand("target", targets, {in.rows}, ScalarType::Long);
    class_weight = gpu.operand("class_weight", weights, {in.classes}, ScalarType::Float);
    x = unit_stride_rows(input), weight = unit_stride_rows(matrix);
    in.x = x.const_data_ptr(), in.x_stride = row_stride(x);
    in.weight = weight.const_data_ptr(), in.weight_stride = row_stride(weight);
    in.bias = pointer(bias), in.class_weight = const_floats(class_weight);
    in.target = static_cast<const int64_t*>(target.const_data_ptr());
    in.ignore_index = ignore_index, in.label_smoothing = float(smoothing), in.mean = mode == Reduction::mean;
  }

  bool nothing() const { return in.rows == 0 || in.classes == 0; }
};

struct Needed {
  bool x, weight, bias;
};

// Room for what is needed of the gradients, and where the launcher shall put them.
struct Gradients {
  Tensor x, weight, bias;

  Gradients(const Operands& o, Needed need, LinearCrossEntropyBackwardCudaArgs& args)
      : x(o.gpu.empty(need.x ? Sizes{o.in.rows, o.in.depth} : Sizes{0}, o.x.scalar_type())),
        weight(o.gpu.empty(need.weight ? Sizes{o.in.classes, o.in.depth} : Sizes{0}, o.x.scalar_type())),
        bias(o.gpu.empty({need.bias ? o.in.classes : 0}, o.x.scalar_type())) {
    if (o.nothing())
      for (Tensor* t : {&x, &weight, &bias}) torch::stable::zero_(*t);
    const auto to = [](const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
    args.grad_x = to(x), args.grad_weight = to(weight), args.grad_bias = to(bias);
  }
};

bool any_wanted(const LinearCrossEntropyBackwardCudaArgs& a) { return a.grad_x || a.grad_weight || a.grad_bias; }

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors linear_cross_entropy_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                      const Tensor& target, std::optional<Tensor> class_weight, int64_t ignore_index,
                                      double label_smoothing, StringHandle reduction, bool need_x, bool need_weight,
                                      bool need_bias) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Operands o(x, weight, bias, target, class_weight, ignore_index, label_smoothing, mode);
  const bool each = mode == Reduction::none, now = !each && x.scalar_type() == ScalarType::Float;
  Tensor loss = o.gpu.empty({o.in.rows}, ScalarType::Float), lse = o.gpu.empty({o.in.rows, 2}, ScalarType::Float);
  const Tensor total = o.gpu.empty(each ? Sizes{0} : Sizes{}, ScalarType::Float);
  LinearCrossEntropyCudaArgs args{o.in, floats(loss), floats(lse), each ? nullptr : floats(total), nullptr};
  LinearCrossEntropyBackwardCudaArgs after{o.in, nullptr, 0, floats(lse), true};
  const Gradients grads(o, {need_x && now, need_weight && now, need_bias && bias && now}, after);
  const bool gradients = !o.nothing() && any_wanted(after);
  if (o.in.classes == 0)
    for (Tensor* t : {&loss, &lse}) torch::stable::zero_(*t);
  if (o.nothing()) args.in.rows = 0;   // nothing but the sum is left to do
  const int64_t bytes = o.nothing() ? 0 : linear_cross_entropy_workspace(args);
  const int64_t later = gradients ? linear_cross_entropy_backward_workspace(after) : 0;
  const Tensor workspace = o.gpu.empty({bytes > later ? bytes : later}, ScalarType::Byte);
  args.workspace = after.workspace = workspace.mutable_data_ptr();
  o.gpu.launched(launch_linear_cross_entropy(args, o.gpu.stream()));
  if (gradients) o.gpu.launched(launch_linear_cross_entropy_backward(after, o.gpu.stream()));
  return {each ? loss : total, lse, grads.x, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cuda(
    const Tensor& grad_loss, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& target,
    std::optional<Tensor> class_weight, const Tensor& lse, int64_t ignore_index, double label_smoothing,
    StringHandle reduction, bool need_x, bool need_weight, bool need_bias) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Operands o(x, weight, bias, target, class_weight, ignore_index, label_smoothing, mode);
  const bool each = mode == Reduction::none;
  o.gpu.expect_here("grad_loss", grad_loss);
  expect_shape(kOp, "grad_loss", grad_loss, each ? Sizes{o.in.rows} : Sizes{});
  expect_scalar_type(kOp, "grad_loss", grad_loss, ScalarType::Float);
  const Tensor sums = o.gpu.operand("lse", lse, {o.in.rows, 2}, ScalarType::Float);
  LinearCrossEntropyBackwardCudaArgs args{o.in, static_cast<const float*>(grad_loss.const_data_ptr()),
                                          each ? grad_loss.stride(0) : 0,
                                          static_cast<const float*>(sums.const_data_ptr()), false};
  const Gradients grads(o, {need_x, need_weight, need_bias && bias}, args);
  if (!o.nothing() && any_wanted(args)) {
    const Tensor workspace = o.gpu.empty({linear_cross_entropy_backward_workspace(args)}, ScalarType::Byte);
    args.workspace = workspace.mutable_data_ptr();
    o.gpu.launched(launch_linear_cross_entropy_backward(args, o.gpu.stream()));
  }
  return {grads.x, grads.weight, grads.bias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&pyfast::linear_cross_entropy_cuda));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&pyfast::linear_cross_entropy_backward_cuda));
}
