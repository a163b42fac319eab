// Kernels of layer_norm (kCentred: the mean is taken away first) and rms_norm, rows in registers: read and written once.
#pragma once

#include "mutant.cuh"
#include "norm.h"
#include "rows.cuh"

namespace pyfast {

template <class A>
__device__ __forceinline__ void stage_columns(float* stage, const A* from, int cols) {
  for (int col = threadIdx.x; col < cols; col += blockDim.x) stage[staged(col)] = float(from[col]);
  __syncthreads();
}

// Columns [cols] of weight or bias, as the thread holds them of every row. Where a row's packs are not those of the
// columns, they come by way of shared memory: a lane's own elements are far apart.
template <class T, int kVecs, class A>
__device__ __forceinline__ void load_columns(float (&to)[RowSlice<T, kVecs>::kElements],
                                             const RowSlice<T, kVecs>& slice, const A* from, float* stage) {
  if (slice.shift % kPack<T> == 0) return slice.load(to, from);
  stage_columns(stage, from, slice.cols);
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) to[i] = slice.has(slice.col(i)) ? stage[staged(slice.col(i))] : 0;
  __syncthreads();
}

// The other way round: sums of the columns, to a row that ends in zeros.
template <class T, int kVecs>
__device__ __forceinline__ void store_columns(float* to, const RowSlice<T, kVecs>& slice,
                                              const float (&from)[RowSlice<T, kVecs>::kElements], float* stage) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i)
    if (slice.has(slice.col(i))) stage[staged(slice.col(i))] = from[i];
  if (!mutant(1)) __syncthreads();
  for (int col = threadIdx.x; col < norm_padded(slice.cols); col += blockDim.x)
    to[col] = col < slice.cols ? stage[staged(col)] : 0;
}

// The block's first row decides how far all its rows are from a sector.
template <class T, int kVecs>
__device__ __forceinline__ RowSlice<T, kVecs> slice_of_block(int cols) {
  constexpr int kWhole = kSector / int(sizeof(T));
  return {cols, int(blockIdx.x % kWhole * unsigned(cols % kWhole) % kWhole)};
}

// out = (v - mean) rstd weight + bias, v = x + residual as it is stored. A block takes every gridDim.x-th row.
template <class T, class A, int kElements, bool kCentred>
__global__ void __launch_bounds__(512) norm_forward_kernel(NormCudaArgs a) {
  constexpr int kVecs = kElements / kPack<T>;
  extern __shared__ float stage[];
  __shared__ typename BlockReduction<1>::Shared meeting;
  BlockReduction<1> block(meeting);
  const auto slice = slice_of_block<T, kVecs>(a.cols);
  float weight[kElements], bias[kElements];
  if (a.weight) load_columns<T, kVecs>(weight, slice, static_cast<const A*>(a.weight), stage);
  if (a.bias) load_columns<T, kVecs>(bias, slice, static_cast<const A*>(a.bias), stage);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.cols;
    float v[kElements], total[1] = {};
    slice.load(v, static_cast<const T*>(a.x) + at);
    if (a.residual) {
      float other[kElements];
      slice.load(other, static_cast<const T*>(a.residual) + at);
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] = float(T(v[i] + other[i]));
      slice.store(static_cast<T*>(a.sum) + at, v);
    }
    if constexpr (kCentred) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) total[0] += v[i];
      block.reduce(total, Add{});
      const float mean = total[0] / float(a.cols);
      if (threadIdx.x == 0) a.mean[row] = mean;
      total[0] = 0;
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] = mutant(2) || slice.has(slice.col(i)) ? v[i] - mean : 0;
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) total[0] += v[i] * v[i];
    block.reduce(total, Add{});
    const float rstd = 1 / sqrtf(total[0] / float(a.cols) + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < kElements; ++i) v[i] = v[i] * rstd * (a.weight ? weight[i] : 1) + (a.bias ? bias[i] : 0);
    slice.store(static_cast<T*>(a.out) + at, v);
  }
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; no mean(g) in rms_norm. The block's own
// sums of grad_out xhat and of grad_out go to its row of each plane of partial.
template <class T, class A, int kElements, bool kCentred>
__global__ void __launch_bounds__(512) norm_backward_kernel(NormBackwardCudaArgs a) {
  constexpr int kVecs = kElements / kPack<T>;
  extern __shared__ float stage[];
  __shared__ typename BlockReduction<2>::Shared meeting;
  BlockReduction<2> block(meeting);
  const auto slice = slice_of_block<T, kVecs>(a.cols);
  constexpr bool kKeep = kElements < 16;   // else the weight stays in shared memory: registers would spill
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
  if (a.weight && kKeep) load_columns<T, kVecs>(weight, slice, static_cast<const A*>(a.weight), stage);
  if (a.weight && !kKeep) stage_columns(stage, static_cast<const A*>(a.weight), a.cols);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.cols;
    float xhat[kElements], g[kElements], sums[2] = {};
    slice.load(xhat, static_cast<const T*>(a.x) + at);
    slice.load(g, static_cast<const T*>(a.grad_out) + at);
    const float rstd = a.rstd[row], mean = kCentred ? a.mean[row] : 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      xhat[i] = (xhat[i] - mean) * rstd;
      dweight[i] += g[i] * xhat[i];   // past the row g is 0
      if constexpr (kCentred) dbias[i] += g[i];
      if (a.weight) g[i] *= kKeep ? weight[i] : slice.has(slice.col(i)) ? stage[staged(slice.col(i))] : 0;
      sums[0] += g[i] * xhat[i];
      sums[1] += g[i];
    }
    block.reduce(sums, Add{});
    const float along = sums[0] / float(a.cols), offset = kCentred ? sums[1] / float(a.cols) : 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) g[i] = (g[i] - xhat[i] * along - offset) * rstd;
    if (a.grad_sum) {
      slice.load(xhat, static_cast<const T*>(a.grad_sum) + at);
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
