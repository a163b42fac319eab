// The activations on rows of accumulators in cache: a function for each, chosen once per call.
#pragma once

#include "vecmath.h"
// after the functions it uses
#include "../../activation.h"

namespace pyfast {
namespace {

template <class A> using ActivateRow = void (*)(A* row, int64_t n);                    // row = act(row)
template <class A> using GradRow = void (*)(A* grad, const A* saved, int64_t n);       // grad *= act'(saved)

template <Act kAct, class A>
void activate_row(A* row, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(row + i, activate<kAct>(load(row + i)));
}
template <Act kAct, class A>
void grad_row(A* grad, const A* saved, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(grad + i, load(grad + i) * activate_grad<kAct>(load(saved + i)));
}

template <class A, template <class> class Row, class Pick>
Row<A> pick_row(Act act, const Pick& pick) {
  switch (act) {
    case Act::relu: return pick.template operator()<Act::relu>();
    case Act::gelu: return pick.template operator()<Act::gelu>();
    case Act::gelu_tanh: return pick.template operator()<Act::gelu_tanh>();
    case Act::silu: return pick.template operator()<Act::silu>();
    case Act::sigmoid: return pick.template operator()<Act::sigmoid>();
    case Act::tanh: return pick.template operator()<Act::tanh>();
    case Act::leaky_relu: return pick.template operator()<Act::leaky_relu>();
    case Act::elu: return pick.template operator()<Act::elu>();
    case Act::softplus: return pick.template operator()<Act::softplus>();
    case Act::mish: return pick.template operator()<Act::mish>();
    default: return nullptr;   // none: nothing to do
  }
}
template <class A>
ActivateRow<A> activation_of(Act act) {
  return pick_row<A, ActivateRow>(act, []<Act kAct>() { return &activate_row<kAct, A>; });
}
template <class A>
GradRow<A> activation_grad_of(Act act) {
  return pick_row<A, GradRow>(act, []<Act kAct>() { return &grad_row<kAct, A>; });
}

// Rows in cache are `stride` apart, a multiple of every vector length, so whole vectors may run past `n`.
template <class A, class T>
inline void load_row(A* to, const T* from, int64_t n) {
  sweep<A>(n, [&](auto lanes, int64_t i) { store(to + i, lanes.load(from + i)); });
}
template <class A, class T>
inline void store_row(T* to, const A* from, int64_t n) {
  sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(to + i, load(from + i)); });
}
template <class A, class T>
inline void add_row(A* to, const T* from, int64_t n) {
  sweep<A>(n, [&](auto lanes, int64_t i) { store(to + i, load(to + i) + lanes.load(from + i)); });
}
// The same into memory that goes on after `n`.
template <class A, class T>
inline void accumulate_row(T* to, const A* from, int64_t n) {
  sweep<A>(n, [&](auto lanes, int64_t i) { lanes.store(to + i, lanes.load(to + i) + load(from + i)); });
}

// row += bias, which may be null; kept, where it may be null too, gets a copy.
template <class A, class T>
inline void add_bias(A* row, const T* bias, T* kept, int64_t n) {
  if (!kept) {
    if (bias) add_row(row, bias, n);
  } else if (!bias) {
    store_row(kept, row, n);
  } else {
    sweep<A>(n, [&](auto lanes, int64_t i) {
      const Vec<A> z = load(row + i) + lanes.load(bias + i);
      store(row + i, z);
      lanes.store(kept + i, z);
    });
  }
}

// Pieces of 256 elements of rows that lie pages apart: the processor does not see the next one coming.
constexpr int64_t kWriteAhead = 2, kReadAhead = 8;   // rows
// For a row that will be written to.
template <class T>
inline void prefetch_row(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 1);
}
template <class T>
inline void prefetch_read(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

}  // namespace
}  // namespace pyfast
