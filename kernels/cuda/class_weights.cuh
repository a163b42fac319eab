// What the cross entropies share: exponentials, and sums over rows on the device: nothing waits for them on the host.
// One block, one order. The kernels are templates because two files have them.
#pragma once

#include "mutant.cuh"
#include "rows.cuh"

namespace pyfast {

constexpr int kTotalThreads = 1024;

constexpr float kLowest = -3.4028234663852886e38f;   // and not -inf: what has nothing but -inf adds 0
constexpr float kHuge = 1e30f;      // logits beyond it are masks, from which differences would overflow
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2E); }

// The weight of a row: that of its class, 1 without class weights, 0 if it is ignored.
__device__ __forceinline__ float row_weight(int64_t target, const float* weight, int64_t classes,
                                            int64_t ignore_index) {
  if (target == ignore_index && !mutant(4)) return 0;
  if (!weight) return 1;
  return target >= 0 && target < classes ? weight[target] : 0;
}

// total = the sum of loss [rows], divided by the weights of the rows if `mean`.
template <class = void>
__global__ void __launch_bounds__(kTotalThreads) reduce_loss_kernel(float* total, const float* loss,
                                                                    const int64_t* target, const float* weight,
                                                                    int64_t rows, int64_t classes,
                                                                    int64_t ignore_index, bool mean) {
  __shared__ BlockReduction<2>::Shared meeting;
  float sums[2] = {};
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    sums[0] += loss[row];
    if (mean) sums[1] += row_weight(target[row], weight, classes, ignore_index);
  }
  BlockReduction<2>(meeting).reduce(sums, Add{});
  if (threadIdx.x == 0) *total = mean ? sums[0] / sums[1] : sums[0];   // 0 / 0 is nan, as in torch
}

// totals = (the weights of all rows, the weights of all classes).
template <class = void>
__global__ void __launch_bounds__(kTotalThreads) class_totals_kernel(float* totals, const int64_t* target,
                                                                     const float* weight, int64_t rows,
                                                                     int64_t classes, int64_t ignore_index) {
  __shared__ BlockReduction<2>::Shared meeting;
  float sums[2] = {};
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
    sums[0] += row_weight(target[row], weight, classes, ignore_index);
  if (weight)
    for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) sums[1] += weight[c];
  else
    sums[1] = threadIdx.x == 0 ? float(classes) : 0;
  BlockReduction<2>(meeting).reduce(sums, Add{});
  if (threadIdx.x < 2) totals[threadIdx.x] = threadIdx.x == 0 ? sums[0] : sums[1];
}

// Threads of the one block: few for few rows.
inline unsigned total_threads(int64_t count) {
  unsigned threads = 32;
  while (threads < kTotalThreads && threads < count) threads *= 2;
  return threads;
}

}  // namespace pyfast
