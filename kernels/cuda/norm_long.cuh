// layer_norm and rms_norm of rows that do not fit into the registers of a block: in its shared memory, so that each is
// read once all the same. The weight is in registers.
#pragma once

#include "shared_row.cuh"

namespace pyfast {

// As norm_forward_kernel. `slots`: rows in shared memory at once, each with that of residual; beside them the
// bias as float32.
template <class T, bool kCentred>
__global__ void __launch_bounds__(kLongThreads, 1) norm_long_forward_kernel(NormCudaArgs a, int slots) {
  extern __shared__ uint4 long_rows[];
  using Row = SharedRow<T, kLongForward<kCentred>>;
  constexpr int kEach = Row::kEach;
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<false>::Shared meeting;
  NormMeetings<false> team(meeting);
  const NormRows rows(a.rows, a.rows_each, 1);
  const int room = int(Row::room(a.cols)), slot = room * (a.residual ? 2 : 1);
  T* const buffer = reinterpret_cast<T*>(long_rows);
  float* const biases = reinterpret_cast<float*>(buffer + slots * slot);
  if (kCentred && a.bias)
    with_affine<T>(a.bias, a.affine_dtype, 0, [&](auto* b) {
      for (int c = int(threadIdx.x); c < norm_padded(a.cols); c += kLongThreads)
        biases[c] = c < a.cols ? float(b[c]) : 0;
    });
  float weight[Row::kWords][kEach];
#pragma unroll
  for (int k = 0; k < Row::kWords; ++k)
#pragma unroll
    for (int e = 0; e < kEach; ++e) weight[k][e] = 1;
  if (a.weight) with_affine<T>(a.weight, a.affine_dtype, 0, [&](auto* w) { Row{a.cols, 0}.load_columns(weight, w); });
  const float share = 1 / float(a.cols);
  const auto fetch = [&](int i) {
    if (i < rows.count) {
      const int64_t at = (rows.first + i) * a.cols, all = a.rows * a.cols;
      T* const to = buffer + i % slots * slot;
      const Row row(a.cols, at);
      row.fetch(to, static_cast<const T*>(a.x), at, all);
      if (a.residual) row.fetch(to + room, static_cast<const T*>(a.residual), at, all);
    }
    cp_async_commit();
  };
  const auto store_statistics = [&](int begin) { statistics.store(a.mean, a.rstd, rows, a.rows, begin); };
  for (int i = 0; i < slots; ++i) fetch(i);
  for (int i = 0; i < rows.count; ++i) {
    if (i % NormStatistics::kRows == 0 && i > 0) store_statistics(i - NormStatistics::kRows);
    if (slots > 1) cp_async_wait<1 + mutant(14)>();
    else cp_async_wait<0>();
    if (!mutant(15)) __syncthreads();
    const int64_t at = (rows.first + i) * a.cols;
    const Row row(a.cols, at);
    T* const x = buffer + i % slots * slot;
    T* const made = a.residual ? x + room : x;   // in place of what each thread alone reads again
    float total[1] = {};
    row.each_word([&](int, int col) {
      float v[kEach];
      row.get(v, x, col);
      if (a.residual) {
        float other[kEach];
        row.get(other, x + room, col);
#pragma unroll
        for (int e = 0; e < kEach; ++e) v[e] = float(T(v[e] + other[e]));
        row.put(x, col, v);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) total[0] += kCentred ? v[e] : v[e] * v[e];
    });
    team.reduce(total, Add{});
    if (a.residual) row.store(static_cast<T*>(a.sum), x, at);
    const float mean = kCentred ? total[0] * share : 0;
    if constexpr (kCentred) {
      total[0] = 0;
      row.each_word([&](int, int col) {
        float v[kEach];
        row.get(v, x, col);
#pragma unroll
        for (int e = 0; e < kEach; ++e)
          if (e == 0 || col + e < a.cols) total[0] += (v[e] - mean) * (v[e] - mean);
      });
      team.reduce(total, Add{});
    }
    const float rstd = 1 / sqrtf(total[0] * share + a.eps);
    if (threadIdx.x == 0) {
      statistics.mean[statistics.place(i)] = mean;
      statistics.rstd[statistics.place(i)] = rstd;
    }
    row.each_word([&](int k, int col) {
      float v[kEach];
      row.get(v, x, col);
#pragma unroll
      for (int e = 0; e < kEach; ++e) v[e] = (v[e] - mean) * rstd * weight[k][e];
      if (kCentred && a.bias) {
        if constexpr (kEach == 1) {
          v[0] += biases[col];
        } else {
          const float2 two = *reinterpret_cast<const float2*>(biases + col);
          v[0] += two.x, v[1] += two.y;
        }
      }
      row.put(made, col, v);
    });
    if (!mutant(16)) __syncthreads();
    row.store(static_cast<T*>(a.out), made, at);
    if (!mutant(17)) __syncthreads();
    fetch(i + slots);
  }
  if (rows.count > 0) store_statistics((rows.count - 1) / NormStatistics::kRows * NormStatistics::kRows);
}

// Launches it where rows fit; whether they do.
template <class T, bool kCentred>
bool launch_long(cudaError_t* status, NormCudaArgs a, cudaStream_t stream) {
  const int64_t row = (a.residual ? 2 : 1) * SharedRow<T, kLongForward<kCentred>>::room(a.cols) * int64_t(sizeof(T));
  const int64_t bias = kCentred && a.bias ? norm_padded(a.cols) * int64_t(sizeof(float)) : 0;
  int64_t blocks = 0;
  return a.cols <= kLongForward<kCentred> &&
         launch_rows(norm_long_forward_kernel<T, kCentred>, status, &blocks, a, row, bias, stream);
}

}  // namespace pyfast
