// The arithmetic of the cross entropies on one row of logits: log(sum(exp(x))) in one read by a running maximum
// and the sum of exp(x - maximum) in every lane (Milakov & Gimelshein, 2018), and the gradient.
#pragma once

#include "vecmath.h"

namespace pyfast {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr double kHuge = 1e30;   // logits beyond it are masks, from which differences would overflow
template <class A> constexpr int64_t kLogitBlock = 32 * kLanes<A>;   // read twice, from L1; one rescaling each

// f(values) for all of x in no order that matters; lanes past the end are -infinity.
template <class A, class T, class F>
inline __attribute__((always_inline)) void each_value(const T* x, int64_t n, const F& f) {
  int64_t i = 0;
  if constexpr (__is_same(T, bf16)) {   // as the halves of 32-bit words they cost two instructions instead of four
    for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>) {
      const VecU words = load_bits<VecU>(x + i);
      f((VecF)(words << 16));
      f((VecF)(words & 0xffff0000u));
    }
  }
  sweep<A>(n - i, [&](auto lanes, int64_t j) { f(lanes.keep(lanes.load(x + i + j), A(-kInfinity))); });
}

// The maximum starts at the lowest finite number, so that a lane of nothing but -infinity adds 0 and not NaN.
template <class A>
struct LogSumExp {
  Vec<A> peak = splat(sizeof(A) == 8 ? A(-__DBL_MAX__) : A(-__FLT_MAX__)), total{};

  template <class T>
  void add(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLogitBlock<A>) add_block(x + i, min_of(kLogitBlock<A>, n - i));
  }

  template <class T>
  void add_block(const T* x, int64_t n) {
    Vec<A> top = peak, sum{};
    each_value<A>(x, n, [&](Vec<A> v) { top = max_of(v, top); });
    each_value<A>(x, n, [&](Vec<A> v) { sum += exp_to_one(v - top); });
    total = total * exp(peak - top) + sum;
    peak = top;
  }

  void result(A& top, A& sum) const {
    top = max_lanes(peak);
    sum = sum_lanes(total * exp(peak - top));
  }
};

// Sum of weight * (x - origin); without weights, of x - origin.
template <class T, class A = acc_t<T>>
Vec<A> weighted_sum(const T* x, const A* weight, A origin, int64_t n) {
  Vec<A> sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> d = lanes.load(x + i) - origin;
    if (weight) d *= lanes.load(weight + i);
    sum += lanes.keep(d, 0);
  });
  return sum;
}

// The sum of the class weights; without weights, the number of classes.
template <class A>
A class_total(const A* weight, int64_t n) {
  if (!weight) return A(n);
  Vec<A> sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) { sum += lanes.load(weight + i); });
  return sum_lanes(sum);
}

// The gradient g of a row's loss carried to its logits. With e the smoothing, w the class weights, t the target:
// g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t.
template <class A>
struct LogitGradient {
  A top, log_total, scale, uniform, picked;
  const A* weight;
  int64_t target;

  LogitGradient(A g, const A* lse, const A* class_weight, A weight_sum, double smoothing, int64_t classes, int64_t t)
      : top(lse[0]), log_total(lse[1]), uniform(g * A(smoothing / double(classes))),
        picked(g * (A(1 - smoothing) * (class_weight ? class_weight[t] : A(1)))), weight(class_weight), target(t) {
    scale = picked + uniform * weight_sum;
  }

  Vec<A> softmax(Vec<A> x) const { return scale * exp_to_one((x - top) - log_total); }
  Vec<A> exact(Vec<A> x) const { return scale * exp((x - top) - log_total); }   // where `picked` cancels digits

  // For the classes [first, first + n), whose logits are x; dx may be x.
  template <class T>
  void write(T* dx, const T* x, int64_t first, int64_t n) const {
    const bool hit = target >= first && target < first + n;
    A at_target = 0;
    if (hit) {
      const A spread = uniform * (weight ? weight[target] : A(1));
      at_target = (exact(splat(A(load_one(x + target - first))))[0] - picked) - spread;
    }
    if (uniform == 0)
      sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(dx + i, softmax(lanes.load(x + i))); });
    else if (!weight)
      sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(dx + i, softmax(lanes.load(x + i)) - uniform); });
    else
      sweep<A>(n, [&](auto lanes, int64_t i) {
        lanes.store(dx + i, softmax(lanes.load(x + i)) - uniform * lanes.load(weight + first + i));
      });
    if (hit) store_one(dx + target - first, at_target);
  }
};

}  // namespace
}  // namespace pyfast
