// Kernels of layer_norm (kCentred: the mean is taken away first) and rms_norm: rows in registers, read and written
// once.
#pragma once

#include "mutant.cuh"
#include "norm.h"
#include "rows.cuh"

namespace pyfast {

// Columns [cols] of weight or bias in shared memory, each at its place in the team's window, zeros around them.
template <class A, class Slice>
__device__ __forceinline__ void stage_columns(float* stage, const Slice& slice, const A* from) {
  for (int place = threadIdx.x; place < slice.kElements * int(blockDim.x); place += blockDim.x)
    stage[staged(place)] = slice.has(place - slice.shift) ? float(from[place - slice.shift]) : 0;
  team_barrier();
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
  team_barrier();
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
  team_barrier();
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) own(stage, slice, i) = from[i];   // past the row 0
  if (!mutant(1)) team_barrier();
  const int window = slice.kElements * int(blockDim.x);
  for (int place = threadIdx.x; place < slice.shift + norm_padded(slice.cols); place += blockDim.x)
    if (place >= slice.shift) to[place - slice.shift] = place < window ? stage[staged(place)] : 0;
}

// The rows of a team: `count` of them, `period` apart. The first decides how far all are from a sector.
struct NormRows {
  unsigned set;   // of all teams' of the grid
  int64_t first;
  int period, count, most;   // most: that a team of this block has

  __device__ __forceinline__ NormRows(int64_t rows, int64_t each, int period)
      : set(blockIdx.x * blockDim.y + threadIdx.y),
        first(set / period * (each * period) + set % period),
        period(period),
        count(within(rows - first, each)),
        most(within(rows - first + threadIdx.y, each)) {}

  __device__ __forceinline__ int within(int64_t left, int64_t each) const {
    left = (left + period - 1) / period;
    return int(left < each ? (left < 0 ? 0 : left) : each);
  }

  // Teams go along side by side, so that a sector of two rows is still in a cache for the second.
  __device__ __forceinline__ bool next(int row) const {
    if (blockDim.y > 1) __syncthreads();
    return row < count;
  }

  template <class Slice>
  __device__ __forceinline__ Slice slice(int cols) const {
    constexpr int kWhole = kSector / (16 / Slice::kSize);
    return {cols, int(unsigned(first % kWhole) * unsigned(cols % kWhole) % kWhole)};
  }
};

// As many elements as may be read beside a row, for the pack at its edge.
template <class T>
__device__ __forceinline__ int within_pack(int64_t elements) {
  return int(min(elements, int64_t(kPack<T>)));
}

template <bool kTwo>
using NormMeetings = BlockReduction<kTwo ? 2 : 1, float, true>;

// The statistics of the next rows of all teams in shared memory. They move for many rows at once, in the order of the
// rows: one by one, each would cost a sector.
struct NormStatistics {
  static constexpr int kRows = 32;   // of a team
  float mean[kRows * kNormTeams], rstd[kRows * kNormTeams];

  static __device__ __forceinline__ int place(int i) { return i % kRows * int(blockDim.y) + int(threadIdx.y); }

  // f(place, row) for each of them from the teams' row `begin` on, by the whole block.
  template <class F>
  static __device__ __forceinline__ void each(const NormRows& rows, int64_t all, int begin, const F& f) {
    const int teams = int(blockDim.y), count = min(rows.most - begin, kRows) * teams;
    const int64_t first = rows.first - threadIdx.y + int64_t(begin) * rows.period;
    __syncthreads();
    for (int i = int(threadIdx.y * blockDim.x + threadIdx.x); i < count; i += int(blockDim.x) * teams) {
      const int64_t row = first + int64_t(i / teams) * rows.period + i % teams;
      if (row < all) f(i, row);
    }
    if (!mutant(4)) __syncthreads();
  }
  __device__ __forceinline__ void load(const NormBackwardCudaArgs& a, const NormRows& rows, int begin) {
    each(rows, a.rows, begin, [&](int i, int64_t row) {
      if (a.mean) mean[i] = a.mean[row];
      rstd[i] = a.rstd[row];
    });
  }
  __device__ __forceinline__ void store(const NormCudaArgs& a, const NormRows& rows, int begin) const {
    each(rows, a.rows, begin, [&](int i, int64_t row) {
      if (a.mean) a.mean[row] = mean[i];
      a.rstd[row] = rstd[i];
    });
  }
};

// out = (v - mean) rstd weight + bias, v = x + residual as it is stored.
template <class T, int kElements, bool kCentred, bool kExact>
__device__ __forceinline__ void norm_forward_rows(const NormCudaArgs& a, float* stage, NormStatistics& statistics,
                                                  NormMeetings<false> team) {
  using Slice = RowSlice<T, kElements / kPack<T>, kExact>;
  const NormRows rows(a.rows, a.rows_each, a.period);
  const auto slice = rows.slice<Slice>(a.cols);
  float weight[kElements], bias[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1, bias[i] = 0;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols, step = int64_t(rows.period) * a.cols;
  if (a.weight) with_affine<T>(a.weight, a.affine_dtype, [&](auto* w) { load_columns(weight, slice, w, stage); });
  if (kCentred && a.bias)   // there is none in rms_norm
    with_affine<T>(a.bias, a.affine_dtype, [&](auto* b) { load_columns(bias, slice, b, stage); });
  int64_t at = rows.first * a.cols;
  for (int i = 0; i < rows.most; ++i, at += step) {
    if (i > 0 && i % NormStatistics::kRows == 0) statistics.store(a, rows, i - NormStatistics::kRows);
    if (!rows.next(i)) continue;
    const int before = within_pack<T>(at), after = a.cols + within_pack<T>(all - at - a.cols);
    float v[kElements], total[1] = {};
    slice.load(v, static_cast<const T*>(a.x) + at, before, after);
    if (a.residual) {
      float other[kElements];
      slice.load(other, static_cast<const T*>(a.residual) + at, before, after);
#pragma unroll
      for (int e = 0; e < kElements; ++e) v[e] = float(T(v[e] + other[e]));
      slice.store(static_cast<T*>(a.sum) + at, v);
    }
    if constexpr (kCentred) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[0] += v[e];
      team.reduce(total, Add{});
      const float mean = total[0] * share;
      if (threadIdx.x == 0) statistics.mean[statistics.place(i)] = mean;
      total[0] = 0;
      if (mutant(2))
        for (int e = 0; e < kElements; ++e) v[e] -= mean;
      else
        slice.for_each([&](int e) { v[e] -= mean; });
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) total[0] += v[e] * v[e];
    team.reduce(total, Add{});
    const float rstd = 1 / sqrtf(total[0] * share + a.eps);
    if (threadIdx.x == 0) statistics.rstd[statistics.place(i)] = rstd;
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v[e] * rstd * weight[e] + (kCentred ? bias[e] : 0);
    slice.store(static_cast<T*>(a.out) + at, v);
  }
  if (rows.most > 0) statistics.store(a, rows, (rows.most - 1) / NormStatistics::kRows * NormStatistics::kRows);
}

template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_forward_kernel(NormCudaArgs a) {
  extern __shared__ float staged_columns[];
  float* const stage = staged_columns + threadIdx.y * staged_floats(kElements * blockDim.x);
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<false>::Shared meeting;
  const NormMeetings<false> team(meeting);
  if (a.cols % kPack<T> == 0) norm_forward_rows<T, kElements, kCentred, true>(a, stage, statistics, team);
  else norm_forward_rows<T, kElements, kCentred, false>(a, stage, statistics, team);
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; no mean(g) in rms_norm. The team's own
// sums of grad_out xhat and of grad_out go to its row of each plane of partial.
template <class T, int kElements, bool kCentred, bool kExact>
__device__ __forceinline__ void norm_backward_rows(const NormBackwardCudaArgs& a, float* stage,
                                                   NormStatistics& statistics,
                                                   NormMeetings<kCentred> team) {
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
  for (int i = 0; i < rows.most; ++i, at += step) {
    if (i % NormStatistics::kRows == 0) statistics.load(a, rows, i);
    if (!rows.next(i)) continue;
    const int before = within_pack<T>(at), after = a.cols + within_pack<T>(all - at - a.cols);
    float xhat[kElements], g[kElements], sums[kCentred ? 2 : 1] = {};
    slice.load(xhat, static_cast<const T*>(a.x) + at, before, after);
    slice.load(g, static_cast<const T*>(a.grad_out) + at, before, after);
    const int place = statistics.place(i);
    const float rstd = statistics.rstd[place], mean = kCentred ? statistics.mean[place] : 0;
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
    team.reduce(sums, Add{});
    const float along = sums[0] * share, offset = kCentred ? sums[1] * share : 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) g[e] = (g[e] - xhat[e] * along - offset) * rstd;
    if (a.grad_sum) {
      slice.load(xhat, static_cast<const T*>(a.grad_sum) + at, before, after);
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] += xhat[e];
    }
    slice.store(static_cast<T*>(a.grad_x) + at, g);
  }
  float* plane = a.partial + rows.set * norm_padded(a.cols);
  if (a.grad_weight) {
    store_columns(plane, slice, dweight, stage);
    if (!mutant(3)) plane += int64_t(gridDim.x) * blockDim.y * norm_padded(a.cols);
  }
  if (kCentred && a.grad_bias) store_columns(plane, slice, dbias, stage);
}

template <class T, int kElements, bool kCentred>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackwardCudaArgs a) {
  extern __shared__ float staged_columns[];
  float* const stage = staged_columns + threadIdx.y * staged_floats(kElements * blockDim.x);
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<kCentred>::Shared meeting;
  const NormMeetings<kCentred> team(meeting);
  if (a.cols % kPack<T> == 0) norm_backward_rows<T, kElements, kCentred, true>(a, stage, statistics, team);
  else norm_backward_rows<T, kElements, kCentred, false>(a, stage, statistics, team);
}

}  // namespace pyfast
