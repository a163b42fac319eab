// Kernels of layer_norm (kCentred: the mean is taken away first) and rms_norm: rows in registers, read and written
// once.
#pragma once

#include "mutant.cuh"
#include "norm.h"
#include "rows.cuh"

namespace pyfast {

// Columns [cols] of weight or bias in shared memory, each at its place in the block's window, zeros around them.
template <class A, class T, int kVecs>
__device__ __forceinline__ void stage_columns(float* stage, const RowSlice<T, kVecs>& slice, const A* from) {
  for (int place = threadIdx.x; place < slice.kElements * int(blockDim.x); place += blockDim.x)
    stage[staged(place)] = slice.has(place - slice.shift) ? float(from[place - slice.shift]) : 0;
  __syncthreads();
}

// Where the thread's own element of the window is.
template <class T, int kVecs>
__device__ __forceinline__ float& own(float* stage, const RowSlice<T, kVecs>& slice, int element) {
  constexpr int kSize = kPack<T>;
  return stage[staged(slice.first(element / kSize) + slice.shift) + element % kSize];
}

// Weight or bias as the thread holds them of every row; by way of shared memory, since a lane's own elements are far
// apart where a row's packs are not those of the columns.
template <class A, class T, int kVecs>
__device__ __forceinline__ void load_columns(float (&to)[RowSlice<T, kVecs>::kElements],
                                             const RowSlice<T, kVecs>& slice, const A* from, float* stage) {
  if (slice.shift % kPack<T> == 0) return slice.load(to, from, 0, slice.cols);
  stage_columns(stage, slice, from);
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) to[i] = own(stage, slice, i);
  __syncthreads();
}

// f(pointer) with weight or bias as what it is: of x's dtype, or float32.
template <class T, class F>
__device__ __forceinline__ void with_affine(const void* from, DType dtype, const F& f) {
  if (dtype == DType::float32) f(static_cast<const float*>(from));
  else f(static_cast<const T*>(from));
}

// The other way round: sums of the columns, to a row that ends in zeros.
template <class T, int kVecs>
__device__ __forceinline__ void store_columns(float* to, const RowSlice<T, kVecs>& slice,
                                              const float (&from)[RowSlice<T, kVecs>::kElements], float* stage) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) own(stage, slice, i) = from[i];   // past the row 0
  if (!mutant(1)) __syncthreads();
  const int window = slice.kElements * int(blockDim.x);
  for (int place = threadIdx.x; place < slice.shift + norm_padded(slice.cols); place += blockDim.x)
    if (place >= slice.shift) to[place - slice.shift] = place < window ? stage[staged(place)] : 0;
}

// The block's first row decides how far all its rows are from a sector.
template <class T, int kVecs>
__device__ __forceinline__ RowSlice<T, kVecs> slice_of_block(int cols) {
  constexpr int kWhole = kSector / int(sizeof(T));
  return {cols, int(blockIdx.x % kWhole * unsigned(cols % kWhole) % kWhole)};
}

// out = (v - mean) rstd weight + bias, v = x + residual as it is stored. A block takes every gridDim.x-th row.
template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_forward_kernel(NormCudaArgs a) {
  constexpr int kVecs = kElements / kPack<T>;
  extern __shared__ float stage[];
  __shared__ typename BlockReduction<1>::Shared meeting;
  BlockReduction<1> block(meeting);
  const auto slice = slice_of_block<T, kVecs>(a.cols);
  float weight[kElements], bias[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1, bias[i] = 0;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols;
  if (a.weight) with_affine<T>(a.weight, a.affine_dtype, [&](auto* w) { load_columns(weight, slice, w, stage); });
  if (a.bias) with_affine<T>(a.bias, a.affine_dtype, [&](auto* b) { load_columns(bias, slice, b, stage); });
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.cols;
    float v[kElements], total[1] = {};
    slice.load(v, static_cast<const T*>(a.x) + at, at, all - at);
    if (a.residual) {
      float other[kElements];
      slice.load(other, static_cast<const T*>(a.residual) + at, at, all - at);
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] = float(T(v[i] + other[i]));
      slice.store(static_cast<T*>(a.sum) + at, v);
    }
    if constexpr (kCentred) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) total[0] += v[i];
      block.reduce(total, Add{});
      const float mean = total[0] * share;
      if (threadIdx.x == 0) a.mean[row] = mean;
      total[0] = 0;
      if (mutant(2))
        for (int i = 0; i < kElements; ++i) v[i] -= mean;
      else
        slice.for_each([&](int i) { v[i] -= mean; });
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) total[0] += v[i] * v[i];
    block.reduce(total, Add{});
    const float rstd = 1 / sqrtf(total[0] * share + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < kElements; ++i) v[i] = v[i] * rstd * weight[i] + bias[i];
    slice.store(static_cast<T*>(a.out) + at, v);
  }
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; no mean(g) in rms_norm. The block's own
// sums of grad_out xhat and of grad_out go to its row of each plane of partial.
template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackwardCudaArgs a) {
  constexpr int kVecs = kElements / kPack<T>;
  extern __shared__ float stage[];
  constexpr int kSums = kCentred ? 2 : 1;
  __shared__ typename BlockReduction<kSums>::Shared meeting;
  BlockReduction<kSums> block(meeting);
  const auto slice = slice_of_block<T, kVecs>(a.cols);
  constexpr bool kKeep = kElements < 16;   // else the weight stays in shared memory: registers would spill
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols;
  if (a.weight)
    with_affine<T>(a.weight, a.affine_dtype, [&](auto* w) {
      if constexpr (kKeep) load_columns(weight, slice, w, stage);
      else stage_columns(stage, slice, w);
    });
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.cols;
    float xhat[kElements], g[kElements], sums[kSums] = {};
    slice.load(xhat, static_cast<const T*>(a.x) + at, at, all - at);
    slice.load(g, static_cast<const T*>(a.grad_out) + at, at, all - at);
    const float rstd = a.rstd[row], mean = kCentred ? a.mean[row] : 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      xhat[i] = (xhat[i] - mean) * rstd;
      dweight[i] += g[i] * xhat[i];   // past the row g is 0
      if constexpr (kCentred) dbias[i] += g[i];
      if constexpr (kKeep) g[i] *= weight[i];
      else if (a.weight) g[i] *= own(stage, slice, i);
      sums[0] += g[i] * xhat[i];
      if constexpr (kCentred) sums[1] += g[i];
    }
    block.reduce(sums, Add{});
    const float along = sums[0] * share, offset = kCentred ? sums[1] * share : 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) g[i] = (g[i] - xhat[i] * along - offset) * rstd;
    if (a.grad_sum) {
      slice.load(xhat, static_cast<const T*>(a.grad_sum) + at, at, all - at);
#pragma unroll
      for (int i = 0; i < kElements; ++i) g[i] += xhat[i];
    }
    slice.store(static_cast<T*>(a.grad_x) + at, g);
  }
  float* plane = a.partial + blockIdx.x * norm_padded(a.cols);
  if (a.grad_weight) {
    store_columns<T, kVecs>(plane, slice, dweight, stage);
    if (!mutant(3)) plane += gridDim.x * norm_padded(a.cols);
  }
  if (kCentred && a.grad_bias) store_columns<T, kVecs>(plane, slice, dbias, stage);
}

}  // namespace pyfast
