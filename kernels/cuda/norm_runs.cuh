// layer_norm, rms_norm and their gradients, a run of short rows at a time.
#pragma once

#include "norm_run.cuh"

namespace pyfast {

// As norm_forward_kernel.
template <class T, int kVecs, bool kCentred>
__global__ void __launch_bounds__(kRunThreads, 1) norm_run_forward_kernel(NormCudaArgs a) {
  extern __shared__ uint4 run_memory[];
  using Run = NormRun<T, kVecs>;
  constexpr int kElements = Run::kElements;
  T* const buffer = reinterpret_cast<T*>(run_memory);
  float* const means = reinterpret_cast<float*>(run_memory + Run::kMost);
  float* const rstds = means + blockDim.y;
  const Run run(a.cols);
  float weight[kElements], bias[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) weight[e] = 1, bias[e] = 0;
  float* const room = reinterpret_cast<float*>(run_memory);
  if (a.weight) run.columns(weight, a.weight, a.affine_dtype, room);
  if (kCentred && a.bias) run.columns(bias, a.bias, a.affine_dtype, room);
  __syncthreads();
  const float share = 1 / float(a.cols);
  const int64_t begin = int64_t(blockIdx.x) * a.rows_each, end = min(begin + a.rows_each, a.rows);
  for (int64_t row = begin; row < end; row += blockDim.y) {
    const int rows = int(min(end - row, int64_t(blockDim.y))), count = rows * a.cols;
    const T* const x = static_cast<const T*>(a.x) + row * a.cols;
    if (a.residual) {
      const T* const other = static_cast<const T*>(a.residual) + row * a.cols;
      T* const sum = static_cast<T*>(a.sum) + row * a.cols;
      const auto whole = [&](int at) {
        float v[Run::kSize], w[Run::kSize];
        load_pack(v, x + at);
        load_pack(w, other + at);
#pragma unroll
        for (int e = 0; e < Run::kSize; ++e) v[e] += w[e];
        const auto made = Run::rounded(v);
        Run::put(sum + at, made);
        return made;
      };
      run.load(buffer, count, whole, [&](int at) { return sum[at] = T(float(x[at]) + float(other[at])); });
    } else {
      run.load(buffer, count, x);
    }
    __syncthreads();
    float v[kElements], mean = 0, squares = 0;
    run.each_pack([&](int i) {
      float part[Run::kSize];
      run.take(part, buffer, i);
#pragma unroll
      for (int e = 0; e < Run::kSize; ++e) v[i * Run::kSize + e] = part[e];
    });
    if constexpr (kCentred) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) mean += v[e];
      mean = run.over_row(mean) * share;
      run.slice.for_each([&](int e) { v[e] -= mean; });
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) squares += v[e] * v[e];
    const float rstd = 1 / sqrtf(run.over_row(squares) * share + a.eps);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v[e] * rstd * weight[e] + (kCentred ? bias[e] : 0);
    if (threadIdx.x == 0) means[threadIdx.y] = mean, rstds[threadIdx.y] = rstd;
    if (!mutant(7)) __syncthreads();   // neighbours share packs, which both have read
    typename Run::Pack made[kVecs];
    run.each_pack([&](int i) { made[i] = Run::rounded(v + i * Run::kSize); });
    run.give(buffer, made);
    __syncthreads();
    run.store(static_cast<T*>(a.out) + row * a.cols, buffer, count);
    if (run.thread >= rows) continue;
    if (kCentred) a.mean[row + run.thread] = means[run.thread];
    a.rstd[row + run.thread] = rstds[run.thread];
  }
}

// As norm_backward_kernel; a block adds up the gradients of weight and bias of all its rows.
template <class T, int kVecs, bool kCentred>
__global__ void __launch_bounds__(kRunThreads, 1) norm_run_backward_kernel(NormBackwardCudaArgs a) {
  extern __shared__ uint4 run_memory[];
  using Run = NormRun<T, kVecs>;
  constexpr int kElements = Run::kElements;
  T* const xs = reinterpret_cast<T*>(run_memory);
  T* const dys = reinterpret_cast<T*>(run_memory + Run::kMost);
  T* const added = reinterpret_cast<T*>(run_memory + 2 * Run::kMost);   // grad_sum, if there is one
  float* const room = reinterpret_cast<float*>(run_memory);
  const int packs = norm_run_packs(kVecs, int(sizeof(T)), a.grad_sum ? 3 : 2);
  float4* const park = reinterpret_cast<float4*>(run_memory + packs);
  float* const means = reinterpret_cast<float*>(park) + norm_run_parked(kElements, Run::kSize);
  float* const rstds = means + blockDim.y;
  const Run run(a.cols);
  float weight[kElements], dweight[kElements] = {}, dbias[kElements] = {};
#pragma unroll
  for (int e = 0; e < kElements; ++e) weight[e] = 1;
  if (a.weight) run.columns(weight, a.weight, a.affine_dtype, room);
  if constexpr (norm_run_parks(kElements)) run.park(park, weight);
  const auto weights = [&](float(&w)[Run::kSize], int i) {
    if constexpr (norm_run_parks(kElements)) return run.unpark(w, park, i);
#pragma unroll
    for (int e = 0; e < Run::kSize; ++e) w[e] = weight[i * Run::kSize + e];
  };
  __syncthreads();
  const float share = 1 / float(a.cols);
  const int64_t begin = int64_t(blockIdx.x) * a.rows_each, end = min(begin + a.rows_each, a.rows);
  for (int64_t row = begin; row < end; row += blockDim.y) {
    const int rows = int(min(end - row, int64_t(blockDim.y))), count = rows * a.cols;
    const int64_t at = row * a.cols;
    if (run.thread < int(blockDim.y)) {   // rows that are not there count for nothing
      const bool there = run.thread < rows;
      if (kCentred) means[run.thread] = there ? a.mean[row + run.thread] : 0;
      rstds[run.thread] = there ? a.rstd[row + run.thread] : 0;
    }
    run.load(xs, count, static_cast<const T*>(a.x) + at);
    run.load(dys, count, static_cast<const T*>(a.grad_out) + at);
    if (a.grad_sum) run.load(added, count, static_cast<const T*>(a.grad_sum) + at);
    __syncthreads();
    const float rstd = rstds[threadIdx.y], mean = kCentred ? means[threadIdx.y] : 0;
    float xhat[Run::kSize], g[Run::kSize], w[Run::kSize], along = 0, offset = 0;
    run.each_pack([&](int i) {
      weights(w, i);
      run.take(xhat, xs, i);
      run.take(g, dys, i);
#pragma unroll
      for (int e = 0; e < Run::kSize; ++e) {
        const int c = i * Run::kSize + e;
        xhat[e] = (xhat[e] - mean) * rstd;
        dweight[c] += g[e] * xhat[e];   // past the row g is 0
        if constexpr (kCentred) dbias[c] += g[e];
        g[e] *= w[e];
        along += g[e] * xhat[e];
        if constexpr (kCentred) offset += g[e];
      }
    });
    along = run.over_row(along) * share;
    if constexpr (kCentred) offset = run.over_row(offset) * share;
    __syncwarp();   // so that both are read again: registers would spill
    typename Run::Pack made[kVecs];
    run.each_pack([&](int i) {
      weights(w, i);
      run.take(xhat, xs, i);
      run.take(g, dys, i);
#pragma unroll
      for (int e = 0; e < Run::kSize; ++e)
        g[e] = (g[e] * w[e] - (xhat[e] - mean) * rstd * along - offset) * rstd;
      if (a.grad_sum) {
        run.take(xhat, added, i);
#pragma unroll
        for (int e = 0; e < Run::kSize; ++e) g[e] += xhat[e];
      }
      made[i] = Run::rounded(g);
    });
    if (!mutant(9)) __syncthreads();   // neighbours share packs, which both have read
    run.give(xs, made);
    __syncthreads();
    run.store(static_cast<T*>(a.grad_x) + at, xs, count);
  }
  float* plane = a.partial + blockIdx.x * norm_padded(a.cols);
  if (a.grad_weight) {
    run.sum_columns(plane, dweight, room);
    plane += int64_t(gridDim.x) * norm_padded(a.cols);
  }
  if (kCentred && a.grad_bias) run.sum_columns(plane, dbias, room);
}

}  // namespace pyfast
