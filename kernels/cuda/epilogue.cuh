// What becomes of the accumulators of a GEMM. An epilogue is asked for each column of four once, and gets its rows.
#pragma once

#include "activation.cuh"
#include "mutant.cuh"
#include "ptx.cuh"

namespace pyfast {

// Four neighbours; `aligned`: to the whole, and all there.
template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&v)[4], int count, bool aligned) {
  if (aligned) {
    alignas(4 * sizeof(T)) const T all[4] = {T(v[0]), T(v[1]), T(v[2]), T(v[3])};
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(all);
    else
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(all);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < count) to[e] = T(v[e]);
  }
}

// out = acc [m, n]; or, of a product in slices, partial[slice] = acc in float32.
template <class T>
struct StoreEpilogue {
  T* out;
  float* partial;   // null: there is one slice
  int64_t stride, slice;
  bool aligned;     // rows begin at multiples of four elements

  struct Column {
    T* out;
    float* partial;
    int64_t stride;
    int count;
    bool aligned;
    __device__ __forceinline__ void operator()(int64_t row, const float (&v)[4]) const {
      if (partial)
        store_four(partial + row * stride, v, count, aligned);
      else
        store_four(out + row * stride, v, count, aligned);
    }
  };
  __device__ __forceinline__ Column column(int col, int count) const {
    float* const own = partial ? partial + (mutant(106) ? 0 : blockIdx.y * slice) + col : nullptr;
    return {out + col, own, stride, count, aligned && count == 4};
  }
};

// out = act(acc + bias), and preact = acc + bias where it is wanted.
template <class T>
struct LinearEpilogue {
  T *out, *preact;   // [m, n]; preact may be null
  const T* bias;     // [n] or null
  int64_t stride;
  Act act;
  bool aligned;

  struct Column {
    const LinearEpilogue& to;
    int col, count;
    bool aligned;
    float bias[4];
    __device__ __forceinline__ void operator()(int64_t row, float (&v)[4]) const {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] += bias[e];
      const int64_t at = row * to.stride + col;
      if (to.preact) store_four(to.preact + at, v, count, aligned);
      dispatch_act(to.act, [&](auto act) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = activate<decltype(act)::value>(v[e]);
      });
      store_four(to.out + at, v, count, aligned);
    }
  };
  __device__ __forceinline__ Column column(int col, int count) const {
    Column column{*this, col, count, aligned && count == 4, {}};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (bias && e < count) column.bias[e] = float(bias[col + e]);
    return column;
  }
};

}  // namespace pyfast
