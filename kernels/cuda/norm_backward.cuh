// Kernels of the gradients of layer_norm (kCentred) and rms_norm: rows in registers, read and written once.
#pragma once

#include "norm.cuh"

namespace pyfast {

// The sums of rows, from those of their strips.
template <bool kCentred>
__device__ __forceinline__ void add_strips(const NormBackwardCudaArgs& a, NormStatistics& sums, const NormRows& rows,
                                           int begin) {
  sums.each(rows, a.rows, begin, [&](int i, int64_t row) {
    float along = 0, offset = 0;
    for (int s = 0; s < int(gridDim.y); ++s) {
      along += strip_row(a.strips, 1, s, a.rows)[row];
      if (kCentred) offset += strip_row(a.strips, 0, s, a.rows)[row];
    }
    sums.rstd[i] = along;
    sums.mean[i] = offset;
  });
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; no mean(g) in rms_norm. The sums of
// grad_out xhat and of grad_out over the rows of a block go to its row of each plane of partial.
template <class T, int kElements, bool kCentred, NormPass kPass, bool kExact>
__device__ __forceinline__ void norm_backward_rows(const NormBackwardCudaArgs& a, float* stages,
                                                   NormStatistics& statistics, NormStatistics* row_sums,
                                                   NormMeetings<kCentred> team) {
  using Slice = RowSlice<T, kElements / kPack<T>, kExact>;
  constexpr bool kApplies = kPass != NormPass::kStatistics;
  const NormRows rows(a.rows, a.rows_each, a.period);
  const NormStrip<Slice> strip(rows.first, a.cols, kPass == NormPass::kWhole ? kAllColumns : int(blockIdx.y));
  const Slice slice = strip.slice;
  float* const stage = stages + threadIdx.y * staged_floats(kElements * blockDim.x);
  constexpr bool kKeep = kElements < 16;   // else the weight stays in shared memory: registers would spill
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1;
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols, step = int64_t(rows.period) * a.cols;
  if (a.weight)
    with_affine<T>(a.weight, a.affine_dtype, strip.begin, [&](auto* w) {
      if constexpr (kKeep) load_columns(weight, slice, w, stage);
      else stage_columns(stage, slice, w);
    });
  const auto store_sums = [&](int begin) {   // where mean and rstd were
    float* const along = strip_row(a.strips, 1, int(blockIdx.y), a.rows);
    statistics.store(kCentred ? strip_row(a.strips, 0, int(blockIdx.y), a.rows) : nullptr, along, rows, a.rows, begin);
  };
  int64_t at = rows.first * a.cols + strip.begin;
  for (int i = 0; i < rows.most; ++i, at += step) {
    if (i % NormStatistics::kRows == 0) {
      if (!kApplies && i > 0) store_sums(i - NormStatistics::kRows);
      statistics.load(a.mean, a.rstd, rows, a.rows, i);
      if constexpr (kPass == NormPass::kApply) add_strips<kCentred>(a, *row_sums, rows, i);
    }
    if (!rows.next(i)) continue;
    const int before = within_pack<T>(at), after = slice.cols + within_pack<T>(all - at - slice.cols);
    float xhat[kElements], g[kElements], sums[kCentred ? 2 : 1] = {};
    slice.load(xhat, static_cast<const T*>(a.x) + at, before, after);
    slice.load(g, static_cast<const T*>(a.grad_out) + at, before, after);
    const int place = statistics.place(i);
    const float rstd = statistics.rstd[place], mean = kCentred ? statistics.mean[place] : 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      xhat[e] = (xhat[e] - mean) * rstd;
      if constexpr (kApplies) dweight[e] += g[e] * xhat[e];   // past the row g is 0
      if constexpr (kApplies && kCentred) dbias[e] += g[e];
      if constexpr (kKeep) g[e] *= weight[e];
      else if (a.weight) g[e] *= own(stage, slice, e);
      sums[0] += g[e] * xhat[e];
      if constexpr (kCentred) sums[1] += g[e];
    }
    if constexpr (kPass == NormPass::kApply) {
      sums[0] = row_sums->rstd[place];
      if constexpr (kCentred) sums[1] = row_sums->mean[place];
    } else {
      team.reduce(sums, Add{});
    }
    if constexpr (!kApplies) {
      if (threadIdx.x == 0) {
        statistics.rstd[place] = sums[0];
        if constexpr (kCentred) statistics.mean[place] = sums[1];
      }
      continue;
    }
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
  if constexpr (!kApplies) {
    if (rows.most > 0) store_sums((rows.most - 1) / NormStatistics::kRows * NormStatistics::kRows);
    return;
  }
  float* plane = a.partial + blockIdx.x * norm_padded(a.cols) + strip.begin;
  const auto sum = [&](const float(&from)[kElements]) { sum_columns(plane, slice, from, stages, rows.first, a.cols); };
  if (a.grad_weight) {
    sum(dweight);
    if (!mutant(3)) plane += int64_t(gridDim.x) * norm_padded(a.cols);
  }
  if (kCentred && a.grad_bias) sum(dbias);
}

template <class T, int kElements, bool kCentred, NormPass kPass>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackwardCudaArgs a) {
  extern __shared__ float staged_columns[];
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<kCentred>::Shared meeting;
  NormStatistics* row_sums = nullptr;
  if constexpr (kPass == NormPass::kApply) {
    __shared__ NormStatistics joined;
    row_sums = &joined;
  }
  const NormMeetings<kCentred> team(meeting);
  const auto run = [&](auto exact) {
    constexpr bool kExact = decltype(exact)::value;
    norm_backward_rows<T, kElements, kCentred, kPass, kExact>(a, staged_columns, statistics, row_sums, team);
  };
  if (kExactToo<kPass> && a.cols % kPack<T> == 0) run(std::bool_constant<kExactToo<kPass>>());
  else run(std::false_type());
}

}  // namespace pyfast
