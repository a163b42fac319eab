// What linear layers share before their metal: sizes, guards, and operands brought to strides it can read.
#pragma once

#include <cstring>

#include "../checks.h"
#include "metal/linear_act.h"

namespace pyfast {

struct LinearSizes {
  int64_t m, n, k;
};

inline LinearSizes linear_sizes(const char* op, const Tensor& x, const Tensor& weight) {
  expect_rank(op, "x", x, 2);
  expect_rank(op, "weight", weight, 2);
  expect_same_dtype(op, "weight", weight, x);
  PYFAST_EXPECT(weight.size(1) == x.size(1), op, ": weight must be [N, K=", x.size(1), "]; got ",
                text(sizes_of(weight)));
  return {x.size(0), weight.size(0), x.size(1)};
}

inline Act parse_act(const char* op, const std::string& name) {
  for (int i = 0; i < kActCount; ++i)
    if (name == kActNames[i]) return Act(i);
  PYFAST_EXPECT(false, op, ": act must be a known activation; got ", name);
}

// A vector [n] of the dtype of `like`, contiguous, or none.
inline std::optional<Tensor> expect_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t n,
                                           const Tensor& like) {
  if (!t) return t;
  expect_sizes(op, name, *t, {n});
  expect_same_dtype(op, name, *t, like);
  return as_contiguous(*t);
}

inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

inline Tensor unit_stride_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : as_contiguous(t); }

// The transpose of a row-major matrix: its gradient is wanted in the same layout.
inline bool is_transposed(const Tensor& t) { return t.stride(0) == 1 && t.stride(1) != 1 && t.stride(1) >= t.size(0); }

inline Tensor unit_stride_either(const Tensor& t) {
  return t.stride(1) == 1 || is_transposed(t) ? t : as_contiguous(t);
}

inline WeightView weight_view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

}  // namespace pyfast
