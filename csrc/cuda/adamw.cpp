#include "../../kernels/cuda/adamw.h"

#include "../adamw_lists.h"
#include "gpu.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "adamw_step_";

// The arguments after their checks, as contiguous tensors: those that were not are copies, written back at the end.
class Step {
 public:
  Step(const Gpu& gpu, const std::vector<AdamWParameter>& parameters) : gpu_(gpu) {
    for (const AdamWParameter& p : parameters) add(p);
  }

  // hyper is on the CPU, or, to be captured into a CUDA graph, on the GPU.
  Tensor run(const Tensor& hyper, bool decoupled, bool maximize, double grad_scale, double max_norm,
             const std::optional<Tensor>& found_inf) {
    if (found_inf) {
      gpu_.expect_here("found_inf", *found_inf);
      expect_flag(kOp, *found_inf);
      args_.found_inf = static_cast<const float*>(found_inf->const_data_ptr());
    }
    const int64_t count = int64_t(args_.tensors.size());
    const Tensor rows = as_contiguous(hyper);
    const double* h = static_cast<const double*>(rows.const_data_ptr());
    const bool here = !hyper.is_cpu();
    const int64_t chunks = adamw_chunks(args_.tensors);
    const Tensor numbers = gpu_.empty({here ? count : 0, 9}, ScalarType::Double);
    const Tensor partial = gpu_.empty({chunks}, ScalarType::Double), clip = gpu_.empty({}, ScalarType::Double);
    const Tensor norm = gpu_.empty({}, ScalarType::Float);
    if (here) gpu_.expect_here("hyper", hyper);
    for (int64_t i = 0; i < count && !here; ++i)
      args_.tensors[i].numbers = adamw_numbers(h + 6 * i, decoupled, maximize, grad_scale);
    args_.hyper = here ? h : nullptr;
    args_.numbers = static_cast<AdamWNumbers*>(numbers.mutable_data_ptr());
    args_.decoupled = decoupled;
    args_.maximize = maximize;
    args_.grad_scale = grad_scale;
    args_.max_norm = max_norm;
    args_.partial = static_cast<double*>(partial.mutable_data_ptr());
    args_.clip = static_cast<double*>(clip.mutable_data_ptr());
    args_.norm = static_cast<float*>(norm.mutable_data_ptr());
    gpu_.launched(launch_adamw_step(args_, gpu_.stream()));
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
    return norm;
  }

 private:
  void add(const AdamWParameter& p) {
    const auto code = [](const Tensor& t) { return uint8_t(dtype_of(kOp, "params", t)); };
    const auto written = [&](const Tensor& t) { return adamw_memory(t, copies_); };
    kept_.push_back(as_contiguous(*p.grad));
    AdamWCudaTensor t{};
    t.param = written(*p.param);
    t.grad = kept_.back().const_data_ptr();
    t.exp_avg = written(*p.exp_avg);
    t.exp_avg_sq = written(*p.exp_avg_sq);
    t.peak = p.peak ? written(*p.peak) : nullptr;
    t.master = p.master ? written(*p.master) : nullptr;
    t.count = p.param->numel();
    t.dtype = code(*p.param);
    t.grad_dtype = code(*p.grad);
    t.moment_dtype = code(*p.exp_avg);
    t.aligned = true;
    for (const void* array : {static_cast<const void*>(t.param), t.grad, static_cast<const void*>(t.exp_avg),
                              static_cast<const void*>(t.exp_avg_sq), static_cast<const void*>(t.peak),
                              static_cast<const void*>(t.master)})
      if (reinterpret_cast<uintptr_t>(array) % kGpuAlignment != 0) t.aligned = false;
    args_.tensors.push_back(t);
  }

  const Gpu& gpu_;
  Tensors kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  AdamWCudaArgs args_{};
};

Tensor adamw_step_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                       const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& masters,
                       const Tensor& hyper, bool decoupled, bool maximize, double grad_scale, double max_norm,
                       std::optional<Tensor> found_inf) {
  expect_shape(kOp, "hyper", hyper, {int64_t(params.size()), 6});
  expect_scalar_type(kOp, "hyper", hyper, ScalarType::Double);
  const Gpu gpu(kOp, params.empty() ? "hyper" : "params[0]", params.empty() ? hyper : params[0]);
  const auto on_gpu = [&](const char* name, const Tensor& t) { gpu.expect_here(name, t); };
  const AdamWLists lists(kOp, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, on_gpu);
  return Step(gpu, lists.parameters()).run(hyper, decoupled, maximize, grad_scale, max_norm, found_inf);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("adamw_step_", TORCH_BOX(&pyfast::adamw_step_cuda)); }
