// What the two cross entropies share on the floor of tensors: targets, class weights, reduction.
#pragma once

#include <stdexcept>

#include "../reduction.h"

namespace pyfast {

// The sum of f(i), i < n, in an order that n alone decides.
template <class F>
double sum_in_chains(int64_t n, const F& f) {
  constexpr int kChains = 8;   // an addition waits for the one before: 4 cycles each
  double sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains)
    for (int k = 0; k < kChains; ++k) sums[k] += f(i + k);
  for (; i < n; ++i) sums[0] += f(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Class indices [rows] and class weights [classes], checked: every index is a class or ignore_index.
struct Targets {
  Tensor indices;
  std::optional<Tensor> weight;   // of the accumulator type
  int64_t rows, classes, ignore_index;
  double total_weight = 0;        // over the rows that count

  const int64_t* data() const { return static_cast<const int64_t*>(indices.const_data_ptr()); }

  template <class A>
  double add_weights(const A* weights) const {
    const int64_t* t = data();
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; ++i) counted += t[i] != ignore_index;
    if (!weights) return double(counted);
    return sum_in_chains(rows, [=, ignored = ignore_index](int64_t i) {
      return t[i] == ignored ? 0.0 : double(weights[t[i]]);
    });
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
  const int64_t* indices = t.data();   // asking for it is a call through torch's C interface
  const auto fits = [=](int64_t c) { return (uint64_t(c) < uint64_t(classes)) | (c == ignore_index); };
  bool all_fit = true;
  for (int64_t i = 0; i < rows; ++i) all_fit &= fits(indices[i]);
  for (int64_t i = 0; !all_fit; ++i) {
    const int64_t c = indices[i];
    if (fits(c)) continue;
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
  const A* each = static_cast<const A*>(loss.const_data_ptr());
  const double total = sum_in_chains(loss.size(0), [=](int64_t i) { return double(each[i]); });
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
