// Kernels of layer_norm (kCentred: the mean is taken away first) and rms_norm: rows in registers, read and written
// once.
#pragma once

#include "norm_rows.cuh"

namespace pyfast {

// Rows that do not fit into the registers of a block are cut into strips, which two launches read: the first for what
// must be known of the whole row, the second for what is made with it.
enum class NormPass { kWhole, kStatistics, kApply };

// Whether there is code of its own for rows of whole packs: not for strips, which few rows need.
template <NormPass kPass>
constexpr bool kExactToo = kPass == NormPass::kWhole;

// Where the numbers of a strip's rows are in `strips` [2, strips, rows].
__device__ __forceinline__ float* strip_row(float* strips, int which, int strip, int64_t rows) {
  return strips + (which * int64_t(gridDim.y) + strip) * rows;
}

// Mean and rstd of rows from the means and squared deviations of their strips (Chan, Golub & LeVeque, 1979): the
// difference of two large sums would lose the digits.
template <class Slice, bool kCentred>
__device__ __forceinline__ void join_strips(const NormCudaArgs& a, NormStatistics& statistics, const NormRows& rows,
                                            int begin) {
  const float share = 1 / float(a.cols);
  const int strips = int(gridDim.y);
  statistics.each(rows, a.rows, begin, [&](int i, int64_t row) {
    const auto part = [&](int which, int s) { return strip_row(a.strips, which, s, a.rows)[row]; };
    const auto count = [&](int s) { return float(NormStrip<Slice>(row, a.cols, s).slice.cols); };
    float mean = 0, squares = 0;
    if constexpr (kCentred)
      for (int s = 0; s < strips; ++s) mean += count(s) * share * part(0, s);
    for (int s = 0; s < strips; ++s) {
      const float apart = kCentred ? part(0, s) - mean : 0;
      squares += part(1, s) + count(s) * apart * apart;
    }
    const float rstd = 1 / sqrtf(squares * share + a.eps);
    statistics.mean[i] = mean;
    statistics.rstd[i] = rstd;
    if (blockIdx.y > 0) return;
    if (kCentred) a.mean[row] = mean;
    a.rstd[row] = rstd;
  });
}

// out = (v - mean) rstd weight + bias, v = x + residual as it is stored.
template <class T, int kElements, bool kCentred, NormPass kPass, bool kExact>
__device__ __forceinline__ void norm_forward_rows(const NormCudaArgs& a, float* stage, NormStatistics& statistics,
                                                  NormMeetings<false> team) {
  using Slice = RowSlice<T, kElements / kPack<T>, kExact>;
  constexpr bool kMeasures = kPass != NormPass::kApply, kApplies = kPass != NormPass::kStatistics;
  const NormRows rows(a.rows, a.rows_each, a.period);
  const NormStrip<Slice> strip(rows.first, a.cols, kPass == NormPass::kWhole ? kAllColumns : int(blockIdx.y));
  const Slice slice = strip.slice;
  float weight[kElements], bias[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) weight[i] = 1, bias[i] = 0;
  const float share = 1 / float(kApplies ? a.cols : max(slice.cols, 1));
  const int64_t all = a.rows * a.cols, step = int64_t(rows.period) * a.cols;
  const auto columns = [&](float(&to)[kElements], const void* from) {
    with_affine<T>(from, a.affine_dtype, strip.begin, [&](auto* w) { load_columns(to, slice, w, stage); });
  };
  if (kApplies && a.weight) columns(weight, a.weight);
  if (kApplies && kCentred && a.bias) columns(bias, a.bias);   // there is none in rms_norm
  const auto store_statistics = [&](int begin) {
    if (kApplies) return statistics.store(a.mean, a.rstd, rows, a.rows, begin);
    float* const squares = strip_row(a.strips, 1, int(blockIdx.y), a.rows);
    float* const means = kCentred ? strip_row(a.strips, 0, int(blockIdx.y), a.rows) : nullptr;
    statistics.store(means, squares, rows, a.rows, begin);
  };
  const T* const x = static_cast<const T*>(!kMeasures && a.residual ? a.sum : a.x);
  int64_t at = rows.first * a.cols + strip.begin;
  for (int i = 0; i < rows.most; ++i, at += step) {
    if (i % NormStatistics::kRows == 0) {
      if (!kMeasures) join_strips<Slice, kCentred>(a, statistics, rows, i);
      else if (i > 0) store_statistics(i - NormStatistics::kRows);
    }
    if (!rows.next(i)) continue;
    const int before = within_pack<T>(at), after = slice.cols + within_pack<T>(all - at - slice.cols);
    const int place = statistics.place(i);
    float v[kElements], total[1] = {}, rstd;
    slice.load(v, x + at, before, after);
    if (kMeasures && a.residual) {
      float other[kElements];
      slice.load(other, static_cast<const T*>(a.residual) + at, before, after);
#pragma unroll
      for (int e = 0; e < kElements; ++e) v[e] = float(T(v[e] + other[e]));
      slice.store(static_cast<T*>(a.sum) + at, v);
    }
    if constexpr (kCentred) {
      float mean;
      if constexpr (kMeasures) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) total[0] += v[e];
        team.reduce(total, Add{});
        mean = total[0] * share;
        if (threadIdx.x == 0) statistics.mean[place] = mean;
      } else {
        mean = statistics.mean[place];
      }
      if (mutant(2))
        for (int e = 0; e < kElements; ++e) v[e] -= mean;
      else
        slice.for_each([&](int e) { v[e] -= mean; });
    }
    if constexpr (kMeasures) {
      total[0] = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[0] += v[e] * v[e];
      team.reduce(total, Add{});
      rstd = kApplies ? 1 / sqrtf(total[0] * share + a.eps) : total[0];
      if (threadIdx.x == 0) statistics.rstd[place] = rstd;
    } else {
      rstd = statistics.rstd[place];
    }
    if constexpr (!kApplies) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v[e] * rstd * weight[e] + (kCentred ? bias[e] : 0);
    slice.store(static_cast<T*>(a.out) + at, v);
  }
  if (kMeasures && rows.most > 0)
    store_statistics((rows.most - 1) / NormStatistics::kRows * NormStatistics::kRows);
}

template <class T, int kElements, bool kCentred, NormPass kPass>
__global__ void __launch_bounds__(512, 1) norm_forward_kernel(NormCudaArgs a) {
  extern __shared__ float staged_columns[];
  float* const stage = staged_columns + threadIdx.y * staged_floats(kElements * blockDim.x);
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<false>::Shared meeting;
  const NormMeetings<false> team(meeting);
  const auto run = [&](auto exact) {
    norm_forward_rows<T, kElements, kCentred, kPass, decltype(exact)::value>(a, stage, statistics, team);
  };
  if (kExactToo<kPass> && a.cols % kPack<T> == 0) run(std::bool_constant<kExactToo<kPass>>());
  else run(std::false_type());
}

}  // namespace pyfast
