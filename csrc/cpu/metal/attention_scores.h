// From scores to probabilities: masks, the online softmax of the forward pass, and the recomputed softmax with
// its gradient.
#pragma once

#include "attention_tiles.h"

namespace pyfast {
namespace {

// A boolean mask element, read as 0 where the key takes part and -inf where it does not.
struct Flag { uint8_t set; };
typedef uint8_t VecB __attribute__((vector_size(kVectorBytes / 4)));

inline VecF load(const Flag* p) {
  const VecU set = __builtin_convertvector(load_bits<VecB>(p), VecU);
  return set != 0u ? VecF{} : splat(-__builtin_inff());
}
inline float load_one(const Flag* p) { return p->set ? 0.f : -__builtin_inff(); }

// A block of scores: head and first query, first key, and how many of each.
struct Tile {
  int64_t batch, head, query, queries, key, keys;
};

// bias[key][query] = the mask, in the layout of the tile.
template <class Core>
void load_mask(const AttentionArgs& a, const Tile& t, typename Core::Acc* bias) {
  using A = typename Core::Acc;
  const AttentionMask& m = a.mask;
  const auto pack = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* data =
        static_cast<const T*>(m.data) + t.batch * m.batch + t.head * m.head + t.query * m.query + t.key * m.key;
    const Operand<T> operand{data, m.query, m.key, t.queries, t.keys};
    if constexpr (sizeof(A) == 8) pack_strided<Core::kCols>(bias, operand);
    else pack_fma<Core::kCols>(bias, operand);
  };
  if (m.kind == MaskKind::boolean) pack(TypeTag<Flag>{});
  else if (m.kind == MaskKind::float32) pack(TypeTag<float>{});
  else dispatch_storage<Core>(a.dtype, pack);
}

// What scores are still to be multiplied with after apply_masks(), in all tiles of a call. It is positive, so that the
// largest is so before, too.
inline double score_factor(const AttentionArgs& a) {
  return a.mask.kind == MaskKind::none && a.scale > 0 ? a.scale : 1;
}

// Masks the tile and returns score_factor().
template <class Core, class A = typename Core::Acc>
A apply_masks(const AttentionArgs& a, const Tile& t, A* s, A* bias) {
  const A factor = A(score_factor(a)), now = A(a.scale / score_factor(a));
  const bool diagonal = a.causal && t.key + t.keys - 1 > t.query, masked = a.mask.kind != MaskKind::none;
  if (!diagonal && !masked && now == 1) return factor;
  if (masked) load_mask<Core>(a, t, bias);
  const A inf = A(__builtin_inf());
  Vec<A> lane;
  for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = A(i);
  for (int64_t key = 0; key < t.keys; ++key)
    for (int64_t i = 0; i < Core::kCols; i += kLanes<A>) {
      A* at = s + key * Core::kCols + i;
      Vec<A> v = load(at) * now;
      if (masked) v += load(bias + key * Core::kCols + i);
      if (diagonal) v = lane < A(t.key + key - t.query - i) ? splat(-inf) : v;   // keys after the query
      store(at, v);
    }
  return factor;
}

// The running maximum, sum and correction of one panel of queries.
template <class Core>
struct Softmax {
  using A = typename Core::Acc;
  A peak[Core::kCols], total[Core::kCols];

  void start() {
    for (int64_t i = 0; i < Core::kCols; ++i) peak[i] = -A(__builtin_inf()), total[i] = 0;
  }
};

// p = 2^((s - peak) unit) in place, for a vector of columns; returns their sums. peak is the highest score so far, here
// or before. Four keys at a time, for the latency of max and add.
template <int64_t kStride, class A>
Vec<A> exponentials(A* s, int64_t keys, A unit, Vec<A>& peak) {
  constexpr int64_t kAtOnce = 4;
  Vec<A> most[kAtOnce] = {peak, peak, peak, peak}, sum[kAtOnce] = {};
  const auto scores = [&](int64_t key) { return load(s + key * kStride); };
  int64_t key = 0;
  for (; key + kAtOnce <= keys; key += kAtOnce)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kAtOnce; ++j) most[j] = max_of(most[j], scores(key + j));
  for (; key < keys; ++key) most[0] = max_of(most[0], scores(key));
  peak = max_of(max_of(most[0], most[1]), max_of(most[2], most[3]));
  const Vec<A> shift = peak == -A(__builtin_inf()) ? Vec<A>{} : peak;   // nothing seen yet: p is 2^-inf = 0
  const auto add = [&](int64_t at, Vec<A>& to) {
    const Vec<A> p = exp2(scores(at) - shift, unit);
    to += p;
    store(s + at * kStride, p);
  };
  for (key = 0; key + kAtOnce <= keys; key += kAtOnce)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kAtOnce; ++j) add(key + j, sum[j]);
  for (; key < keys; ++key) add(key, sum[0]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The scores become probabilities; total follows, and correction[query] is what earlier sums and outputs are to be
// multiplied with.
template <class Core, class A = typename Core::Acc>
void softmax_step(A* s, int64_t keys, A factor, Softmax<Core>& state, A* correction) {
  const A unit = A(factor * kLog2e);
  for (int64_t i = 0; i < Core::kCols; i += kLanes<A>) {
    const Vec<A> before = load(state.peak + i);
    Vec<A> peak = before;
    const Vec<A> sum = exponentials<Core::kCols>(s + i, keys, unit, peak);
    const Vec<A> shift = peak == -A(__builtin_inf()) ? Vec<A>{} : peak, scale = exp2(before - shift, unit);
    store(state.peak + i, peak);
    store(correction + i, scale);
    store(state.total + i, load(state.total + i) * scale + sum);
  }
}

// With the scores in s and dP = dO V^T in d: s becomes P, d becomes dS = P (dP - delta).
template <class Core, class A = typename Core::Acc>
void softmax_gradient(A* s, A* d, int64_t keys, A factor, const A* lse, const A* delta) {
  constexpr int64_t C = Core::kCols, n = kLanes<A>;
  for (int64_t i = 0; i < C; i += n) {
    const Vec<A> row_lse = load(lse + i), row_delta = load(delta + i);
    for (int64_t at = i; at < keys * C; at += C) {
      Vec<A> t = scaled<A>(load(s + at), factor) - row_lse;
      t = min_of(Vec<A>{}, t);   // P <= 1 also where lse is so large that it lost the sum; a NaN stays
      const Vec<A> p = exp2(t, A(kLog2e));
      store(s + at, p);
      store(d + at, p * (load(d + at) - row_delta));
    }
  }
}

}  // namespace
}  // namespace pyfast
