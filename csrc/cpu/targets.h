// Class indices as the cross entropies take them: guards, and the error for one that is no class.
#pragma once

#include <stdexcept>

#include "../checks.h"

namespace pyfast {

inline Tensor checked_targets(const char* op, const Tensor& target, int64_t rows) {
  expect_sizes(op, "target", target, {rows});
  expect_scalar_type(op, "target", target, ScalarType::Long);
  return as_contiguous(target);
}

// Class weights in the accumulator type of the logits.
inline void check_class_weight(const char* op, std::optional<Tensor>& weight, int64_t classes, ScalarType wide) {
  if (!weight) return;
  expect_sizes(op, "weight", *weight, {classes});
  expect_scalar_type(op, "weight", *weight, wide);
  weight = as_contiguous(*weight);
}

// `bad_row` is what the kernel found: the lowest row with a target out of range, or `rows` for none.
// std::invalid_argument reaches Python as ValueError.
inline void expect_targets_in_range(const char* op, const Tensor& target, int64_t rows, int64_t bad_row,
                                    int64_t classes, int64_t ignore_index) {
  if (bad_row >= rows) return;
  const int64_t value = static_cast<const int64_t*>(target.const_data_ptr())[bad_row];
  throw std::invalid_argument(std::string(op) + ": target must be in [0, V=" + std::to_string(classes) +
                              ") or ignore_index=" + std::to_string(ignore_index) + "; got " +
                              std::to_string(value) + " in row " + std::to_string(bad_row));
}

}  // namespace pyfast
