// What the two cross entropies share on the floor of tensors: targets, class weights, reduction.
#pragma once

#include <stdexcept>

#include "../reduction.h"

namespace pyfast {

// Class indices [rows] and class weights [classes], checked: every index is a class or ignore_index.
struct Targets {
  Tensor indices;
  std::optional<Tensor> weight;   // of the accumulator type
  int64_t rows, classes, ignore_index;
  double total_weight = 0;        // over the rows that count

  const int64_t* data() const { return static_cast<const int64_t*>(indices.const_data_ptr()); }

  template <class A>
  double add_weights(const A* weights) const {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (data()[i] != ignore_index) total += weights ? double(weights[data()[i]]) : 1.0;
    return total;
  }
};

// std::invalid_argument reaches Python as ValueError.
inline Targets checked_targets(const char* op, const Tensor& target, std::optional<Tensor> weight, int64_t rows,
                               int64_t classes, int64_t ignore_index, ScalarType wide) {
  expect_sizes(op, "target", target, {rows});
  expect_scalar_type(op, "target", target, ScalarType::Long);
  if (weight) {
    expect_sizes(op, "weight", *weight, {classes});
    expect_scalar_type(op, "weight", *weight, wide);
    weight = as_contiguous(*weight);
  }
  Targets t{as_contiguous(target), weight, rows, classes, ignore_index};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t c = t.data()[i];
    if ((c >= 0 && c < classes) || c == ignore_index) continue;
    throw std::invalid_argument(std::string(op) + ": target must be in [0, V=" + std::to_string(classes) +
                                ") or ignore_index=" + std::to_string(ignore_index) + "; got " + std::to_string(c) +
                                " in row " + std::to_string(i));
  }
  t.total_weight = wide == ScalarType::Double ? t.add_weights(static_cast<const double*>(pointer(weight)))
                                              : t.add_weights(static_cast<const float*>(pointer(weight)));
  return t;
}

template <class A>
void reduce_into(Tensor& scalar, const Tensor& loss, double divisor) {
  double total = 0;   // in the order of the rows
  const A* each = static_cast<const A*>(loss.const_data_ptr());
  for (int64_t i = 0; i < loss.size(0); ++i) total += double(each[i]);
  *static_cast<A*>(scalar.mutable_data_ptr()) = A(total / divisor);
}

// The loss of each row, or their sum or weighted mean.
inline Tensor reduced(const Tensor& loss, const Targets& targets, Reduction reduction) {
  if (reduction == Reduction::none) return loss;
  const double divisor = reduction == Reduction::mean ? targets.total_weight : 1;
  Tensor scalar = empty({}, loss.scalar_type());
  if (loss.scalar_type() == ScalarType::Double) reduce_into<double>(scalar, loss, divisor);
  else reduce_into<float>(scalar, loss, divisor);
  return scalar;
}

}  // namespace pyfast
