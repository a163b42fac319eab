#include "metal/adamw.h"

#include <algorithm>
#include <limits>

#include "../checks.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "adamw_step_";

using Tensors = std::vector<Tensor>;

std::string entry(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

// Memory of one tensor, for the search for overlaps.
struct Span {
  uintptr_t begin, end;
  bool written;
  std::string name;
};

// Elements from the lowest to the highest address. A tensor that is written must not hold an element twice.
int64_t extent(const std::string& name, const Tensor& t, bool written) {
  std::vector<std::pair<int64_t, int64_t>> dims;   // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t elements = 1;
  for (const auto& [stride, size] : dims) {
    STD_TORCH_CHECK(!written || stride >= elements, kOp, ": ", name, " must not overlap itself");
    elements += (size - 1) * stride;
  }
  return elements;
}

void expect_apart(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *furthest = nullptr, *furthest_written = nullptr;
  for (const Span& span : spans) {
    const Span* other = span.written ? furthest : furthest_written;   // gradients may share memory with each other
    STD_TORCH_CHECK(!other || other->end <= span.begin, kOp, ": ", span.name, " must not share memory with ",
                    other ? other->name : "");
    if (!furthest || span.end > furthest->end) furthest = &span;
    if (span.written && (!furthest_written || span.end > furthest_written->end)) furthest_written = &span;
  }
}

// The arguments after their checks, as contiguous tensors: those that were not are copies, written back at the end.
class Step {
 public:
  Step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
       const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& hyper) {
    const size_t count = params.size();
    const auto expect_count = [&](const char* name, const Tensors& list, bool optional) {
      STD_TORCH_CHECK(list.size() == count || (optional && list.empty()), kOp, ": ", name,
                      " must have one entry per parameter (", count, "); got ", list.size());
    };
    expect_count("grads", grads, false);
    expect_count("exp_avgs", exp_avgs, false);
    expect_count("exp_avg_sqs", exp_avg_sqs, false);
    expect_count("max_exp_avg_sqs", max_exp_avg_sqs, true);
    expect_count("masters", masters, true);
    expect_sizes(kOp, "hyper", hyper, {int64_t(count), 6});
    expect_scalar_type(kOp, "hyper", hyper, ScalarType::Double);
    const Tensor rows = as_contiguous(hyper);
    const double* h = static_cast<const double*>(rows.const_data_ptr());
    const auto of = [](const Tensors& list, size_t i) { return list.empty() ? nullptr : &list[i]; };
    for (size_t i = 0; i < count; ++i, h += 6)
      check(i, params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], of(max_exp_avg_sqs, i), of(masters, i));
    expect_apart(spans_);
    h = static_cast<const double*>(rows.const_data_ptr());
    for (size_t i = 0; i < count; ++i, h += 6)
      add(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], of(max_exp_avg_sqs, i), of(masters, i), h);
  }

  double run(bool decoupled, bool maximize, double grad_scale, double max_norm) {
    std::vector<double> partial(ceil_div(first_.back(), kAdamWChunk));
    const AdamWArgs args{tensors_.data(), first_.data(), int64_t(tensors_.size()), decoupled, maximize, grad_scale,
                         max_norm, partial.data()};
    double norm = 0;
    dispatch_isa([&](auto isa) { norm = adamw_step<decltype(isa)::value>(args); });
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
    return norm;
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static bool absent(const Tensor* t) { return !t || t->numel() == 0; }

  void check(size_t i, const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
             const Tensor* peak, const Tensor* master) {
    const std::string name = entry("params", i);
    expect_cpu(kOp, name.c_str(), param);
    const Sizes sizes = sizes_of(param);
    const bool narrow = size_of(dtype_of(kOp, name.c_str(), param)) == 2;
    const auto expect = [&](const char* list, const Tensor& t, bool written, ScalarType type) {
      const std::string own = entry(list, i);
      expect_sizes(kOp, own.c_str(), t, sizes);
      if (!narrow || t.scalar_type() != ScalarType::Float) expect_scalar_type(kOp, own.c_str(), t, type);
      span(own, t, written);
    };
    span(name, param, true);
    expect("grads", grad, false, param.scalar_type());
    expect("exp_avgs", exp_avg, true, param.scalar_type());
    expect("exp_avg_sqs", exp_avg_sq, true, exp_avg.scalar_type());
    expect_same_dtype(kOp, entry("exp_avg_sqs", i).c_str(), exp_avg_sq, exp_avg);
    if (peak) {
      expect("max_exp_avg_sqs", *peak, true, exp_avg.scalar_type());
      expect_same_dtype(kOp, entry("max_exp_avg_sqs", i).c_str(), *peak, exp_avg);
    }
    if (absent(master)) return;
    STD_TORCH_CHECK(narrow, kOp, ": ", entry("masters", i), " must be empty, as the parameter is not 16-bit");
    expect("masters", *master, true, ScalarType::Float);
    expect_scalar_type(kOp, entry("masters", i).c_str(), *master, ScalarType::Float);
  }

  void span(const std::string& name, const Tensor& t, bool written) {
    if (t.numel() == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const int64_t bytes = extent(name, t, written) * size_of(dtype_of(kOp, name.c_str(), t));
    spans_.push_back({begin, begin + uintptr_t(bytes), written, name});
  }

  void add(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const Tensor* peak, const Tensor* master, const double* h) {
    const auto dtype = [](const Tensor& t) { return dtype_of(kOp, "params", t); };
    kept_.push_back(as_contiguous(grad));
    tensors_.push_back({param.numel(), dtype(param), dtype(grad), dtype(exp_avg), written(param),
                        kept_.back().const_data_ptr(), written(exp_avg), written(exp_avg_sq),
                        peak ? written(*peak) : nullptr, absent(master) ? nullptr : written(*master), h[0], h[1], h[2],
                        h[3], h[4], h[5]});
    first_.push_back(first_.back() + ceil_div(param.numel(), kAdamWAlignment) * kAdamWAlignment);
  }

  void* written(const Tensor& t) {
    if (t.is_contiguous()) return t.mutable_data_ptr();
    // An alias that autograd does not know, to be written back to.
    const Tensor alias =
        torch::stable::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), t.device(), t.scalar_type());
    copies_.emplace_back(alias, torch::stable::contiguous(alias));
    return copies_.back().second.mutable_data_ptr();
  }

  std::vector<Span> spans_;
  Tensors kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<AdamWTensor> tensors_;
  std::vector<int64_t> first_{0};
};

Tensor adamw_step_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                      const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& hyper, bool decoupled,
                      bool maximize, double grad_scale, double max_norm) {
  Step step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, hyper);
  Tensor norm = empty({}, ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = float(step.run(decoupled, maximize, grad_scale, max_norm));
  return norm;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&pyfast::adamw_step_cpu));
}
