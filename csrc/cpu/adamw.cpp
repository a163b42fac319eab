#include "metal/adamw.h"

#include "../adamw_lists.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "adamw_step_";

// The arguments after their checks, as contiguous tensors: those that were not are copies, written back at the end.
class Step {
 public:
  Step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
       const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& hyper) {
    const auto on_cpu = [](const char* name, const Tensor& t) { expect_cpu(kOp, name, t); };
    const AdamWLists lists(kOp, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, on_cpu);
    expect_sizes(kOp, "hyper", hyper, {int64_t(params.size()), 6});
    expect_scalar_type(kOp, "hyper", hyper, ScalarType::Double);
    const Tensor rows = as_contiguous(hyper);
    const double* h = static_cast<const double*>(rows.const_data_ptr());
    for (const AdamWParameter& parameter : lists.parameters()) {
      add(parameter, h);
      h += 6;
    }
  }

  double run(bool decoupled, bool maximize, double grad_scale, double max_norm, bool skips) {
    std::vector<double> partial(ceil_div(first_.back(), kAdamWChunk));
    const AdamWArgs args{tensors_.data(), first_.data(), int64_t(tensors_.size()), decoupled, maximize, grad_scale,
                         max_norm, partial.data(), skips};
    double norm = 0;
    dispatch_isa(DType::bfloat16, [&](auto isa) { norm = adamw_step<decltype(isa)::value>(args); });
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
    return norm;
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  void add(const AdamWParameter& p, const double* h) {
    const auto dtype = [](const Tensor& t) { return dtype_of(kOp, "params", t); };
    const auto written = [&](const Tensor& t) { return adamw_memory(t, copies_); };
    kept_.push_back(as_contiguous(*p.grad));
    tensors_.push_back({p.param->numel(), dtype(*p.param), dtype(*p.grad), dtype(*p.exp_avg), written(*p.param),
                        kept_.back().const_data_ptr(), written(*p.exp_avg), written(*p.exp_avg_sq),
                        p.peak ? written(*p.peak) : nullptr, p.master ? written(*p.master) : nullptr, h[0], h[1], h[2],
                        h[3], h[4], h[5]});
    first_.push_back(first_.back() + ceil_div(p.param->numel(), kAdamWAlignment) * kAdamWAlignment);
  }

  Tensors kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<AdamWTensor> tensors_;
  std::vector<int64_t> first_{0};
};

Tensor adamw_step_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                      const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& hyper, bool decoupled,
                      bool maximize, double grad_scale, double max_norm, std::optional<Tensor> found_inf) {
  bool skips = false;
  if (found_inf) {
    expect_cpu(kOp, "found_inf", *found_inf);
    expect_flag(kOp, *found_inf);
    skips = *static_cast<const float*>(found_inf->const_data_ptr()) != 0;
  }
  Step step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, hyper);
  Tensor norm = empty({}, ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = float(step.run(decoupled, maximize, grad_scale, max_norm, skips));
  return norm;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&pyfast::adamw_step_cpu));
}
