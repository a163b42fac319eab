// As many sums across lanes as a vector has, together: a third of the shuffles of one after the other.
#pragma once

#include "vec.h"

namespace pyfast {
namespace {

// Lane i of the result is the sum of the lanes of v[i].
template <int kHalf, class V, int kSize, int... kLane>
inline __attribute__((always_inline)) V sums_of_each(V (&v)[kSize], Numbers<kLane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + kHalf], (kLane & kHalf ? kSize + kLane - kHalf : kLane)...) +
           __builtin_shufflevector(v[i], v[i + kHalf], (kLane & kHalf ? kSize + kLane : kLane + kHalf)...);
  if constexpr (kHalf > 1) return sums_of_each<kHalf / 2>(v, lanes);
  return v[0];
}

}  // namespace
}  // namespace pyfast
