#include "../../kernels/cuda/cross_entropy.h"

#include "../reduction.h"
#include "gpu.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "cross_entropy";

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Logits as the kernels read them: columns side by side, rows anywhere.
Tensor with_adjacent_columns(const Tensor& logits) {
  return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

// The checked operands of both directions. Whether a target is a class the host cannot know without waiting: of one
// that is none the loss and the gradient are nan.
struct Operands {
  Gpu gpu;
  DType dtype;
  int64_t rows, cols;
  Tensor logits, target;
  std::optional<Tensor> weight;

  Operands(const Tensor& x, const Tensor& targets, const std::optional<Tensor>& weights)
      : gpu(kOp, "logits", x),
        dtype(gpu.dtype_of("logits", x)),
        rows((expect_matrix(x), x.size(0))),
        cols(x.size(1)),
        logits(with_adjacent_columns(x)),
        target(gpu.operand("target", targets, {rows}, ScalarType::Long)),
        weight(gpu.operand("weight", weights, {cols}, ScalarType::Float)) {}

  static void expect_matrix(const Tensor& x) {
    PYFAST_EXPECT(x.dim() == 2, kOp, ": logits must have 2 dimensions; got ", text(sizes_of(x)));
    expect_columns(kOp, "logits", x.size(1));
    PYFAST_EXPECT(x.size(0) < kMostColumns, kOp, ": logits must have fewer than 2**31 rows; got ", x.size(0));
  }
};

std::tuple<Tensor, Tensor> cross_entropy_cuda(const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
                                              int64_t ignore_index, double label_smoothing, StringHandle reduction) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Operands o(logits, target, weight);
  const int parts = cross_entropy_parts(o.cols);
  const Tensor loss = o.gpu.empty({o.rows}, ScalarType::Float), lse = o.gpu.empty({o.rows, 2}, ScalarType::Float);
  const Tensor part = o.gpu.empty({parts > 1 ? o.rows : 0, parts, kCrossEntropyPart}, ScalarType::Float);
  const bool each = mode == Reduction::none;
  const Tensor total = o.gpu.empty(each ? Sizes{0} : Sizes{}, ScalarType::Float);
  const CrossEntropyCudaArgs args{o.dtype, o.rows, int(o.cols), o.logits.stride(0), o.logits.const_data_ptr(),
                                  static_cast<const int64_t*>(o.target.const_data_ptr()),
                                  static_cast<const float*>(pointer(o.weight)), ignore_index, float(label_smoothing),
                                  floats(loss), floats(lse), floats(part), each ? nullptr : floats(total),
                                  mode == Reduction::mean};
  o.gpu.launched(launch_cross_entropy(args, o.gpu.stream()));
  return {each ? loss : total, lse};
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                   std::optional<Tensor> weight, const Tensor& lse, int64_t ignore_index,
                                   double label_smoothing, StringHandle reduction) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Operands o(logits, target, weight);
  const bool each = mode == Reduction::none;
  o.gpu.expect_here("grad_loss", grad_loss);
  expect_shape(kOp, "grad_loss", grad_loss, each ? Sizes{o.rows} : Sizes{});
  expect_scalar_type(kOp, "grad_loss", grad_loss, ScalarType::Float);
  const Tensor sums = o.gpu.operand("lse", lse, {o.rows, 2}, ScalarType::Float);
  const Tensor dx = o.gpu.empty({o.rows, o.cols}, logits.scalar_type());
  if (o.rows == 0 || o.cols == 0) return dx;
  const Tensor totals = o.gpu.empty({2}, ScalarType::Float);
  const CrossEntropyBackwardCudaArgs args{o.dtype, o.rows, int(o.cols), o.logits.stride(0), o.logits.const_data_ptr(),
                                          static_cast<const int64_t*>(o.target.const_data_ptr()),
                                          static_cast<const float*>(pointer(o.weight)), ignore_index,
                                          float(label_smoothing),
                                          static_cast<const float*>(grad_loss.const_data_ptr()),
                                          each ? grad_loss.stride(0) : 0, mode == Reduction::mean, floats(totals),
                                          static_cast<const float*>(sums.const_data_ptr()), dx.mutable_data_ptr()};
  o.gpu.launched(launch_cross_entropy_backward(args, o.gpu.stream()));
  return dx;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&pyfast::cross_entropy_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyfast::cross_entropy_backward_cuda));
}
