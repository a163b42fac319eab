#include "metal/cross_entropy.h"

#include "targets.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "cross_entropy";

// Logits as the kernels read them: columns side by side, rows anywhere.
Tensor with_adjacent_columns(const Tensor& logits) {
  return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
                                             int64_t ignore_index, double label_smoothing, StringHandle reduction) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  expect_rank(kOp, "logits", logits, 2);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const DType dtype = dtype_of(kOp, "logits", logits);
  const ScalarType wide = accumulator_type(logits);
  const Targets targets = checked_targets(kOp, target, weight, rows, cols, ignore_index, wide);
  const Tensor in = with_adjacent_columns(logits);
  Tensor loss = empty({rows}, wide), lse = empty({rows, 2}, wide);
  const CrossEntropyArgs args{dtype, rows, cols, in.stride(0), in.const_data_ptr(), targets.data(),
                              pointer(targets.weight), ignore_index, label_smoothing, loss.mutable_data_ptr(),
                              lse.mutable_data_ptr()};
  dispatch_isa(dtype, [&](auto isa) { cross_entropy<decltype(isa)::value>(args); });
  return {reduced(loss, targets, mode), lse};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                  std::optional<Tensor> weight, const Tensor& lse, int64_t ignore_index,
                                  double label_smoothing, StringHandle reduction) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  expect_rank(kOp, "logits", logits, 2);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const DType dtype = dtype_of(kOp, "logits", logits);
  const ScalarType wide = accumulator_type(logits);
  const Targets targets = checked_targets(kOp, target, weight, rows, cols, ignore_index, wide);
  const bool each = mode == Reduction::none;
  expect_sizes(kOp, "grad_loss", grad_loss, each ? Sizes{rows} : Sizes{});
  expect_scalar_type(kOp, "grad_loss", grad_loss, wide);
  expect_sizes(kOp, "lse", lse, {rows, 2});
  expect_scalar_type(kOp, "lse", lse, wide);
  const Tensor sums = as_contiguous(lse), in = with_adjacent_columns(logits);
  Tensor dx = empty({rows, cols}, logits.scalar_type());
  const CrossEntropyBackwardArgs args{dtype, rows, cols, in.stride(0), in.const_data_ptr(), targets.data(),
                                      pointer(targets.weight), ignore_index, label_smoothing,
                                      grad_loss.const_data_ptr(), each ? grad_loss.stride(0) : 0,
                                      mode == Reduction::mean ? 1 / targets.total_weight : 1,
                                      sums.const_data_ptr(), dx.mutable_data_ptr()};
  dispatch_isa(dtype, [&](auto isa) { cross_entropy_backward<decltype(isa)::value>(args); });
  return dx;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&pyfast::cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyfast::cross_entropy_backward_cpu));
}
