// The gradients of layer_norm and rms_norm of rows that do not fit into the registers of a block: rows in its shared
// memory, the sums of their columns in registers, so that each row is read once all the same.
#pragma once

#include "shared_row.cuh"

namespace pyfast {

// As norm_backward_kernel. `slots`: rows in shared memory at once, with grad_out and grad_sum of each; beside them the
// weight as float32.
template <class T, bool kCentred>
__global__ void __launch_bounds__(kLongThreads, 1) norm_long_backward_kernel(NormBackwardCudaArgs a, int slots) {
  extern __shared__ uint4 long_rows[];
  using Row = SharedRow<T, kLongBackward<kCentred>>;
  constexpr int kEach = Row::kEach;
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<kCentred>::Shared meeting;
  NormMeetings<kCentred> team(meeting);
  const NormRows rows(a.rows, a.rows_each, 1);
  const int room = int(Row::room(a.cols)), slot = room * (a.grad_sum ? 3 : 2);
  T* const buffer = reinterpret_cast<T*>(long_rows);
  float* const weights = reinterpret_cast<float*>(buffer + slots * slot);
  if (a.weight)
    with_affine<T>(a.weight, a.affine_dtype, 0, [&](auto* w) {
      for (int c = int(threadIdx.x); c < norm_padded(a.cols); c += kLongThreads)
        weights[c] = c < a.cols ? float(w[c]) : 0;
    });
  const float share = 1 / float(a.cols);
  float dweight[Row::kWords][kEach] = {}, dbias[Row::kWords][kEach] = {};
  const auto fetch = [&](int i) {
    if (i < rows.count) {
      const int64_t at = (rows.first + i) * a.cols, all = a.rows * a.cols;
      T* const to = buffer + i % slots * slot;
      const Row row(a.cols, at);
      row.fetch(to, static_cast<const T*>(a.x), at, all);
      row.fetch(to + room, static_cast<const T*>(a.grad_out), at, all);
      if (a.grad_sum) row.fetch(to + 2 * room, static_cast<const T*>(a.grad_sum), at, all);
    }
    cp_async_commit();
  };
  for (int i = 0; i < slots; ++i) fetch(i);
  for (int i = 0; i < rows.count; ++i) {
    if (i % NormStatistics::kRows == 0) statistics.load(a.mean, a.rstd, rows, a.rows, i);
    if (slots > 1) cp_async_wait<1 + mutant(13)>();
    else cp_async_wait<0>();
    if (!mutant(10)) __syncthreads();
    const int64_t at = (rows.first + i) * a.cols;
    const Row row(a.cols, at);
    T* const x = buffer + i % slots * slot;
    const T* const dy = x + room;
    const float rstd = statistics.rstd[statistics.place(i)];
    const float mean = kCentred ? statistics.mean[statistics.place(i)] : 0;
    // Of a word. Past the row grad_out is 0, and so is all that is added up of it.
    const auto word = [&](float (&xhat)[kEach], float (&g)[kEach], float (&weight)[kEach], int col) {
      row.get(xhat, x, col);
      row.get(g, dy, col);
#pragma unroll
      for (int e = 0; e < kEach; ++e) xhat[e] = (xhat[e] - mean) * rstd, weight[e] = 1;
      if (!a.weight) return;
      if constexpr (kEach == 1) {
        weight[0] = weights[col];
      } else {
        const float2 two = *reinterpret_cast<const float2*>(weights + col);
        weight[0] = two.x, weight[1] = two.y;
      }
    };
    float sums[kCentred ? 2 : 1] = {};
    row.each_word([&](int k, int col) {
      float xhat[kEach], g[kEach], weight[kEach];
      word(xhat, g, weight, col);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        dweight[k][e] += g[e] * xhat[e];
        if constexpr (kCentred) dbias[k][e] += g[e];
        sums[0] += g[e] * weight[e] * xhat[e];
        if constexpr (kCentred) sums[1] += g[e] * weight[e];
      }
    });
    team.reduce(sums, Add{});
    const float along = sums[0] * share, offset = kCentred ? sums[1] * share : 0;
    row.each_word([&](int, int col) {
      float xhat[kEach], g[kEach], weight[kEach];
      word(xhat, g, weight, col);
#pragma unroll
      for (int e = 0; e < kEach; ++e) g[e] = (g[e] * weight[e] - xhat[e] * along - offset) * rstd;
      if (a.grad_sum) {
        row.get(xhat, x + 2 * room, col);
#pragma unroll
        for (int e = 0; e < kEach; ++e) g[e] += xhat[e];
      }
      row.put(x, col, g);   // where no other thread reads
    });
    if (!mutant(11)) __syncthreads();
    row.store(static_cast<T*>(a.grad_x), x, at);
    if (!mutant(12)) __syncthreads();
    fetch(i + slots);
  }
  const Row columns{a.cols, 0};
  float* plane = a.partial + blockIdx.x * norm_padded(a.cols);
  const auto sum = [&](const float(&from)[Row::kWords][kEach]) {
    columns.each_word([&](int k, int col) {   // past the row there is room, which nobody reads
      if constexpr (kEach == 1) plane[col] = from[k][0];
      else *reinterpret_cast<float2*>(plane + col) = make_float2(from[k][0], from[k][1]);
    });
    plane += int64_t(gridDim.x) * norm_padded(a.cols);
  };
  if (a.grad_weight) sum(dweight);
  if (kCentred && a.grad_bias) sum(dbias);
}

// Launches it where rows fit; whether they do, and of how many blocks it is then.
template <class T, bool kCentred>
bool launch_long_backward(cudaError_t* status, int64_t* blocks, NormBackwardCudaArgs a, cudaStream_t stream) {
  const int64_t row = (a.grad_sum ? 3 : 2) * SharedRow<T, kLongBackward<kCentred>>::room(a.cols) * int64_t(sizeof(T));
  const int64_t weight = a.weight ? norm_padded(a.cols) * int64_t(sizeof(float)) : 0;
  return a.cols <= kLongBackward<kCentred> &&
         launch_rows(norm_long_backward_kernel<T, kCentred>, status, blocks, a, row, weight, stream);
}

}  // namespace pyfast
