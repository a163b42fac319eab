// What adamw_step_ asks of its lists of tensors, on every device.
#pragma once

#include <algorithm>

#include "checks.h"

namespace pyfast {

using Tensors = std::vector<Tensor>;

// What belongs to one parameter; null: absent.
struct AdamWParameter {
  const Tensor *param, *grad, *exp_avg, *exp_avg_sq, *peak, *master;
};

// Memory of one tensor, for the search for overlaps.
struct AdamWSpan {
  uintptr_t begin, end;
  bool written;
  std::string name;
};

// The checked entries of the lists. expect_device(name, tensor) raises unless the tensor is where the kernels run.
template <class ExpectDevice>
class AdamWLists {
 public:
  AdamWLists(const char* op, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
             const Tensors& exp_avg_sqs, const Tensors& peaks, const Tensors& masters,
             const ExpectDevice& expect_device)
      : op_(op), expect_device_(expect_device) {
    const size_t count = params.size();
    const auto expect_count = [&](const char* name, const Tensors& list, bool optional) {
      PYFAST_EXPECT(list.size() == count || (optional && list.empty()), op, ": ", name,
                    " must have one entry per parameter (", count, "); got ", list.size());
    };
    expect_count("grads", grads, false);
    expect_count("exp_avgs", exp_avgs, false);
    expect_count("exp_avg_sqs", exp_avg_sqs, false);
    expect_count("max_exp_avg_sqs", peaks, true);
    expect_count("masters", masters, true);
    for (size_t i = 0; i < count; ++i) {
      const Tensor* master = masters.empty() || masters[i].numel() == 0 ? nullptr : &masters[i];
      parameters_.push_back(
          {&params[i], &grads[i], &exp_avgs[i], &exp_avg_sqs[i], peaks.empty() ? nullptr : &peaks[i], master});
      check(i, parameters_.back());
    }
    expect_apart();
  }

  const std::vector<AdamWParameter>& parameters() const { return parameters_; }

 private:
  static std::string entry(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

  void check(size_t i, const AdamWParameter& p) {
    const std::string name = entry("params", i);
    expect_device_(name.c_str(), *p.param);
    const Sizes sizes = sizes_of(*p.param);
    const bool narrow = size_of(dtype_of(op_, name.c_str(), *p.param)) == 2;
    const auto expect = [&](const char* list, const Tensor& t, bool written, ScalarType type) {
      const std::string own = entry(list, i);
      expect_device_(own.c_str(), t);
      expect_shape(op_, own.c_str(), t, sizes);
      if (!narrow || t.scalar_type() != ScalarType::Float) expect_scalar_type(op_, own.c_str(), t, type);
      add_span(own, t, written);
    };
    add_span(name, *p.param, true);
    expect("grads", *p.grad, false, p.param->scalar_type());
    expect("exp_avgs", *p.exp_avg, true, p.param->scalar_type());
    expect("exp_avg_sqs", *p.exp_avg_sq, true, p.exp_avg->scalar_type());
    expect_same_dtype(op_, entry("exp_avg_sqs", i).c_str(), *p.exp_avg_sq, *p.exp_avg);
    if (p.peak) {
      expect("max_exp_avg_sqs", *p.peak, true, p.exp_avg->scalar_type());
      expect_same_dtype(op_, entry("max_exp_avg_sqs", i).c_str(), *p.peak, *p.exp_avg);
    }
    if (!p.master) return;
    PYFAST_EXPECT(narrow, op_, ": ", entry("masters", i), " must be empty, as the parameter is not 16-bit");
    expect("masters", *p.master, true, ScalarType::Float);
    expect_scalar_type(op_, entry("masters", i).c_str(), *p.master, ScalarType::Float);
  }

  void add_span(const std::string& name, const Tensor& t, bool written) {
    if (t.numel() == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const int64_t bytes = extent(name, t, written) * size_of(dtype_of(op_, name.c_str(), t));
    spans_.push_back({begin, begin + uintptr_t(bytes), written, name});
  }

  // Elements from the lowest to the highest address. A tensor that is written must not hold an element twice.
  int64_t extent(const std::string& name, const Tensor& t, bool written) const {
    std::vector<std::pair<int64_t, int64_t>> dims;   // stride, size
    for (int64_t d = 0; d < t.dim(); ++d)
      if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
    std::sort(dims.begin(), dims.end());
    int64_t elements = 1;
    for (const auto& [stride, size] : dims) {
      PYFAST_EXPECT(!written || stride >= elements, op_, ": ", name, " must not overlap itself");
      elements += (size - 1) * stride;
    }
    return elements;
  }

  void expect_apart() {
    std::sort(spans_.begin(), spans_.end(),
              [](const AdamWSpan& a, const AdamWSpan& b) { return a.begin < b.begin; });
    const AdamWSpan *furthest = nullptr, *furthest_written = nullptr;
    for (const AdamWSpan& span : spans_) {
      const AdamWSpan* other = span.written ? furthest : furthest_written;   // gradients may share memory
      PYFAST_EXPECT(!other || other->end <= span.begin, op_, ": ", span.name, " must not share memory with ",
                    other ? other->name : "");
      if (!furthest || span.end > furthest->end) furthest = &span;
      if (span.written && (!furthest_written || span.end > furthest_written->end)) furthest_written = &span;
    }
  }

  const char* op_;
  const ExpectDevice& expect_device_;
  std::vector<AdamWParameter> parameters_;
  std::vector<AdamWSpan> spans_;
};

inline void expect_flag(const char* op, const Tensor& found_inf) {
  expect_scalar_type(op, "found_inf", found_inf, ScalarType::Float);
  PYFAST_EXPECT(found_inf.numel() == 1, op, ": found_inf must have one element; got ", found_inf.numel());
}

// The tensor's own memory where it is contiguous, else a copy, to be written back to the alias beside it: one that
// autograd does not know.
inline void* adamw_memory(const Tensor& t, std::vector<std::pair<Tensor, Tensor>>& copies) {
  if (t.is_contiguous()) return t.mutable_data_ptr();
  const Tensor alias =
      torch::stable::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), t.device(), t.scalar_type());
  copies.emplace_back(alias, torch::stable::contiguous(alias));
  return copies.back().second.mutable_data_ptr();
}

}  // namespace pyfast
