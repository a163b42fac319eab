// Kernels of layer_norm (kCentred: the mean is taken away first) and rms_norm: rows in registers, read and written
// once.
#pragma once

#include "mutant.cuh"
#include "norm.h"
#include "rows.cuh"

namespace pyfast {

// Columns [cols] of weight or bias in shared memory, each at its place in the block's window, zeros around them.
template <class A, class Slice>
__device__ __forceinline__ void stage_columns(float* stage, const Slice& slice, const A* from) {
  for (int place = threadIdx.x; place < slice.kElements * int(blockDim.x); place += blockDim.x)
    stage[staged(place)] = slice.has(place - slice.shift) ? float(from[place - slice.shift]) : 0;
  __syncthreads();
}

// Where the thread's own element of the window is.
template <class Slice>
__device__ __forceinline__ float& own(float* stage, const Slice& slice, int element) {
  constexpr int kSize = Slice::kSize;
  return stage[staged(slice.first(element / kSize) + slice.shift) + element % kSize];
}

// Weight or bias as the thread holds them of every row; by way of shared memory, since a lane's own elements are far
// apart where a row's packs are not those of the columns.
template <class A, class Slice>
__device__ __forceinline__ void load_columns(float (&to)[Slice::kElements], const Slice& slice, const A* from,
                                             float* stage) {
  if (slice.shift % Slice::kSize == 0) return slice.load(to, from, 0, slice.cols);
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
template <class Slice>
__device__ __forceinline__ void store_columns(float* to, const Slice& slice, const float (&from)[Slice::kElements],
                                              float* stage) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) own(stage, slice, i) = from[i];   // past the row 0
  if (!mutant(1)) __syncthreads();
  const int window = slice.kElements * int(blockDim.x);
  for (int place = threadIdx.x; place < slice.shift + norm_padded(slice.cols); place += blockDim.x)
    if (place >= slice.shift) to[place - slice.shift] = place < window ? stage[staged(place)] : 0;
}

// The rows of a block: `count` of them, `period` apart. The first decides how far all are from a sector.
struct NormRows {
  int64_t first;
  int period, count;

  __device__ __forceinline__ NormRows(int64_t rows, int64_t each, int period)
      : first(blockIdx.x / period * (each * period) + blockIdx.x % period), period(period) {
    const int64_t left = (rows - first + period - 1) / period;
    count = int(left < each ? (left < 0 ? 0 : left) : each);
  }

  template <class Slice>
  __device__ __forceinline__ Slice slice(int cols) const {
    constexpr int kWhole = kSector / (16 / Slice::kSize);
    return {cols, int(unsigned(first % kWhole) * unsigned(cols % kWhole) % kWhole)};
  }
};

constexpr int kStatistics = 32;   // rows whose statistics move at once: one by one, each would cost a sector

// out = (v - mean) rstd weight + bias, v = x + residual as it is stored.
template <class T, int kElements, bool kCentred, bool kExact>
__device__ __forceinline__ void norm_forward_rows(const NormCudaArgs& a, float* stage, BlockReduction<1> block) {
  using Slice = RowSlice<T, kElements / kPack<T>, kExact>;
  const NormRows rows(a.rows, a.rows_each, a.period);
  const auto slice = rows.slice<Slice>(a.cols);
  float weight[kElements], bias[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1, bias[i] = 0;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols, step = int64_t(rows.period) * a.cols;
  if (a.weight) with_affine<T>(a.weight, a.affine_dtype, [&](auto* w) { load_columns(weight, slice, w, stage); });
  if (a.bias) with_affine<T>(a.bias, a.affine_dtype, [&](auto* b) { load_columns(bias, slice, b, stage); });
  int64_t at = rows.first * a.cols;
  float mean_kept = 0, rstd_kept = 0;   // of a row for each lane
  for (int i = 0; i < rows.count; ++i, at += step) {
    float v[kElements], total[1] = {};
    slice.load(v, static_cast<const T*>(a.x) + at, at, all - at);
    if (a.residual) {
      float other[kElements];
      slice.load(other, static_cast<const T*>(a.residual) + at, at, all - at);
#pragma unroll
      for (int e = 0; e < kElements; ++e) v[e] = float(T(v[e] + other[e]));
      slice.store(static_cast<T*>(a.sum) + at, v);
    }
    const int lane = int(threadIdx.x) % 32, turn = i % kStatistics;
    if constexpr (kCentred) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[0] += v[e];
      block.reduce(total, Add{});
      const float mean = total[0] * share;
      mean_kept = turn == lane ? mean : mean_kept;
      total[0] = 0;
      if (mutant(2))
        for (int e = 0; e < kElements; ++e) v[e] -= mean;
      else
        slice.for_each([&](int e) { v[e] -= mean; });
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) total[0] += v[e] * v[e];
    block.reduce(total, Add{});
    const float rstd = 1 / sqrtf(total[0] * share + a.eps);
    rstd_kept = turn == lane ? rstd : rstd_kept;
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v[e] * rstd * weight[e] + bias[e];
    slice.store(static_cast<T*>(a.out) + at, v);
    if (threadIdx.x < 32 && (turn == kStatistics - 1 || i + 1 == rows.count) && lane <= turn) {
      const int64_t row = rows.first + int64_t(i - turn + lane) * rows.period;
      if (kCentred) a.mean[row] = mean_kept;
      a.rstd[row] = rstd_kept;
    }
  }
}

template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_forward_kernel(NormCudaArgs a) {
  extern __shared__ float stage[];
  __shared__ typename BlockReduction<1>::Shared meeting;
  const BlockReduction<1> block(meeting);
  if (a.cols % kPack<T> == 0) norm_forward_rows<T, kElements, kCentred, true>(a, stage, block);
  else norm_forward_rows<T, kElements, kCentred, false>(a, stage, block);
}

// The statistics of a block's next rows in shared memory.
struct NormStatistics {
  float mean[kStatistics], rstd[kStatistics];

  __device__ __forceinline__ void load(const NormBackwardCudaArgs& a, const NormRows& rows, int begin) {
    __syncthreads();
    if (const int lane = int(threadIdx.x); lane < kStatistics && begin + lane < rows.count) {
      const int64_t row = rows.first + int64_t(begin + lane) * rows.period;
      if (a.mean) mean[lane] = a.mean[row];
      rstd[lane] = a.rstd[row];
    }
    if (!mutant(4)) __syncthreads();
  }
};

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; no mean(g) in rms_norm. The block's own
// sums of grad_out xhat and of grad_out go to its row of each plane of partial.
template <class T, int kElements, bool kCentred, bool kExact>
__device__ __forceinline__ void norm_backward_rows(const NormBackwardCudaArgs& a, float* stage,
                                                   NormStatistics& statistics,
                                                   BlockReduction<kCentred ? 2 : 1> block) {
  using Slice = RowSlice<T, kElements / kPack<T>, kExact>;
  const NormRows rows(a.rows, a.rows_each, a.period);
  const auto slice = rows.slice<Slice>(a.cols);
  constexpr bool kKeep = kElements < 16;   // else the weight stays in shared memory: registers would spill
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols, step = int64_t(rows.period) * a.cols;
  if (a.weight)
    with_affine<T>(a.weight, a.affine_dtype, [&](auto* w) {
      if constexpr (kKeep) load_columns(weight, slice, w, stage);
      else stage_columns(stage, slice, w);
    });
  int64_t at = rows.first * a.cols;
  for (int i = 0; i < rows.count; ++i, at += step) {
    float xhat[kElements], g[kElements], sums[kCentred ? 2 : 1] = {};
    if (i % kStatistics == 0) statistics.load(a, rows, i);
    slice.load(xhat, static_cast<const T*>(a.x) + at, at, all - at);
    slice.load(g, static_cast<const T*>(a.grad_out) + at, at, all - at);
    const float rstd = statistics.rstd[i % kStatistics], mean = kCentred ? statistics.mean[i % kStatistics] : 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      xhat[e] = (xhat[e] - mean) * rstd;
      dweight[e] += g[e] * xhat[e];   // past the row g is 0
      if constexpr (kCentred) dbias[e] += g[e];
      if constexpr (kKeep) g[e] *= weight[e];
      else if (a.weight) g[e] *= own(stage, slice, e);
      sums[0] += g[e] * xhat[e];
      if constexpr (kCentred) sums[1] += g[e];
    }
    block.reduce(sums, Add{});
    const float along = sums[0] * share, offset = kCentred ? sums[1] * share : 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) g[e] = (g[e] - xhat[e] * along - offset) * rstd;
    if (a.grad_sum) {
      slice.load(xhat, static_cast<const T*>(a.grad_sum) + at, at, all - at);
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] += xhat[e];
    }
    slice.store(static_cast<T*>(a.grad_x) + at, g);
  }
  float* plane = a.partial + blockIdx.x * norm_padded(a.cols);
  if (a.grad_weight) {
    store_columns(plane, slice, dweight, stage);
    if (!mutant(3)) plane += gridDim.x * norm_padded(a.cols);
  }
  if (kCentred && a.grad_bias) store_columns(plane, slice, dbias, stage);
}

template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackwardCudaArgs a) {
  extern __shared__ float stage[];
  __shared__ NormStatistics statistics;
  __shared__ typename BlockReduction<kCentred ? 2 : 1>::Shared meeting;
  const BlockReduction<kCentred ? 2 : 1> block(meeting);
  if (a.cols % kPack<T> == 0) norm_backward_rows<T, kElements, kCentred, true>(a, stage, statistics, block);
  else norm_backward_rows<T, kElements, kCentred, false>(a, stage, statistics, block);
}

}  // namespace pyfast
