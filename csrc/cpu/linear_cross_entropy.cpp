#include "metal/linear_cross_entropy.h"

#include <cstring>

#include "targets.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

struct Needed {
  bool x, weight, bias;
};

struct Gradients {
  Tensor x, weight, bias;   // of no elements where not needed
};

// Rows whose target counts: the others are left out of every product.
std::vector<int64_t> counted_rows(const Targets& targets) {
  const int64_t* target = targets.data();
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < targets.rows; ++i)
    if (target[i] != targets.ignore_index) rows.push_back(i);
  return rows;
}

void fill_zero(Tensor& t) {
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());   // no memory: null
}

Tensor gradient_like(const Tensor& t, const Sizes& sizes, bool needed) {
  return needed ? empty(sizes, t.scalar_type()) : none_like(t);
}

void* data_or_null(Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; }

// The operands of the logits, checked.
struct Linear {
  Tensor x, weight;
  std::optional<Tensor> bias;
  int64_t rows, classes, depth;
};

Linear checked_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  expect_rank(kOp, "x", x, 2);
  expect_rank(kOp, "weight", weight, 2);
  dtype_of(kOp, "x", x);
  expect_sizes(kOp, "weight", weight, {weight.size(0), x.size(1)});
  expect_same_dtype(kOp, "weight", weight, x);
  if (bias) {
    expect_sizes(kOp, "bias", *bias, {weight.size(0)});
    expect_same_dtype(kOp, "bias", *bias, x);
    bias = as_contiguous(*bias);
  }
  const bool side_by_side = x.size(1) <= 1 || x.stride(1) == 1;
  return {side_by_side ? x : torch::stable::contiguous(x), weight, bias, x.size(0), weight.size(0), x.size(1)};
}

// Of a scalar loss the gradients are made in the same pass and only scaled later. Those of many logits of 16 bits wait
// for grad_loss: see the kernel. Those of float16 always do: a loss scale must reach them before the rounding.
bool gradients_with_loss(const Linear& in, Reduction mode) {
  if (mode == Reduction::none || in.x.scalar_type() == ScalarType::Half) return false;
  return in.x.scalar_type() != ScalarType::BFloat16 || keeps_whole_logits(in.rows, in.classes);
}

// Runs the kernel: loss and lse unless lse_known, and what is needed of the gradients.
Gradients run(const Linear& in, const Targets& targets, double label_smoothing, Needed need, LinearCrossEntropyArgs a) {
  const std::vector<int64_t> rows = counted_rows(targets);
  Gradients g{gradient_like(in.x, {in.rows, in.depth}, need.x),
              gradient_like(in.weight, {in.classes, in.depth}, need.weight),
              gradient_like(in.weight, {in.classes}, need.bias)};
  if (int64_t(rows.size()) < in.rows) fill_zero(g.x);
  if (rows.empty()) {
    fill_zero(g.weight);
    fill_zero(g.bias);
    return g;
  }
  a.dtype = dtype_of(kOp, "x", in.x);
  a.rows = int64_t(rows.size()), a.classes = in.classes, a.depth = in.depth;
  a.row_index = rows.data();
  a.x = in.x.const_data_ptr(), a.x_row_stride = in.x.stride(0);
  a.weight = in.weight.const_data_ptr();
  a.weight_row_stride = in.weight.stride(0), a.weight_col_stride = in.weight.stride(1);
  a.bias = pointer(in.bias);
  a.target = targets.data();
  a.class_weight = pointer(targets.weight);
  a.label_smoothing = label_smoothing;
  a.dx = data_or_null(g.x, need.x);
  a.dweight = data_or_null(g.weight, need.weight);
  a.dbias = data_or_null(g.bias, need.bias);
  dispatch_matmul_isa(a.dtype, [&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    Tensor workspace = empty({linear_cross_entropy_workspace<kIsa>(a)}, ScalarType::Byte);
    a.workspace = workspace.mutable_data_ptr();
    linear_cross_entropy<kIsa>(a);
  });
  return g;
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors linear_cross_entropy_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                     const Tensor& target, std::optional<Tensor> class_weight, int64_t ignore_index,
                                     double label_smoothing, StringHandle reduction, bool need_x, bool need_weight,
                                     bool need_bias) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Linear in = checked_linear(x, weight, bias);
  const ScalarType wide = accumulator_type(x);
  const Targets targets = checked_targets(kOp, target, class_weight, in.rows, in.classes, ignore_index, wide);
  const bool now = gradients_with_loss(in, mode);
  Tensor loss = empty({in.rows}, wide), lse = empty({in.rows, 2}, wide);
  fill_zero(loss);
  fill_zero(lse);
  LinearCrossEntropyArgs args{};
  args.loss = loss.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.grad_scale = mode == Reduction::mean ? 1 / targets.total_weight : 1;
  const Needed need{need_x && now, need_weight && now, need_bias && bias && now};
  const Gradients g = run(in, targets, label_smoothing, need, args);
  return {reduced(loss, targets, mode), lse, g.x, g.weight, g.bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_loss, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& target,
    std::optional<Tensor> class_weight, const Tensor& lse, int64_t ignore_index, double label_smoothing,
    StringHandle reduction, bool need_x, bool need_weight, bool need_bias) {
  const Reduction mode = parse_reduction(kOp, taken(reduction));
  const Linear in = checked_linear(x, weight, bias);
  const ScalarType wide = accumulator_type(x);
  const Targets targets = checked_targets(kOp, target, class_weight, in.rows, in.classes, ignore_index, wide);
  const bool each = mode == Reduction::none;
  expect_sizes(kOp, "grad_loss", grad_loss, each ? Sizes{in.rows} : Sizes{});
  expect_scalar_type(kOp, "grad_loss", grad_loss, wide);
  expect_sizes(kOp, "lse", lse, {in.rows, 2});
  expect_scalar_type(kOp, "lse", lse, wide);
  const Tensor sums = as_contiguous(lse);
  LinearCrossEntropyArgs args{};
  args.lse_known = true;
  args.lse = const_cast<void*>(sums.const_data_ptr());   // only read
  args.grad_loss = grad_loss.const_data_ptr();
  args.grad_loss_stride = each ? grad_loss.stride(0) : 0;
  args.grad_scale = mode == Reduction::mean ? 1 / targets.total_weight : 1;
  const Gradients g = run(in, targets, label_smoothing, {need_x, need_weight, need_bias && bias}, args);
  return {g.x, g.weight, g.bias};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&pyfast::linear_cross_entropy_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&pyfast::linear_cross_entropy_backward_cpu));
}
