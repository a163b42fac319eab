// cross_entropy: one read of the logits forward, one read and one write backward.
//
// Every thread keeps a running maximum and the sum of exp(x - maximum) of what it has seen (Milakov & Gimelshein,
// 2018); they meet at the end of the row. The row's head, up to its first whole sector, and its tail go element by
// element.
#pragma once

#include "class_weights.cuh"
#include "cross_entropy.h"
#include "row_walk.cuh"

namespace pyfast {

constexpr int kLossThreads = 256;   // most of a block

// The running sums of a thread, of a part of a row, or of the row.
struct LossSums {
  float peak = kLowest, total = 0, shifted = 0, weights = 0;   // shifted: of w (x - origin); weights: of w

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount]) {
    float top = x[0];
#pragma unroll
    for (int e = 1; e < kCount; ++e) top = fmaxf(top, x[e]);
    if (top > peak) {   // rare after the first few
      if (!mutant(1)) total *= exp_approx(peak - top);
      peak = top;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) total += exp_approx(x[e] - peak);
  }

  template <int kCount>
  __device__ __forceinline__ void spread(const float (&x)[kCount], float origin, const float* weight, int col) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float w = weight ? weight[col + e] : 1;
      shifted += w * (x[e] - origin);
      weights += w;
    }
  }
};

// With e the smoothing, w the class weights, t the target, all logits relative to x_t:
// loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c).
struct RowLoss {
  int64_t target;
  bool counts, is_class;   // of a target that is no class the loss is nan: memory stays safe
  float at_target, origin;

  template <class T>
  __device__ __forceinline__ RowLoss(const CrossEntropyCudaArgs& a, const T* x, int64_t row)
      : target(a.target[row]),
        counts(target != a.ignore_index),
        is_class(counts && target >= 0 && (target < a.cols || mutant(2))),
        at_target(is_class ? float(x[target]) : nanf("")),
        origin(fabsf(at_target) < kHuge ? at_target : 0) {}

  __device__ __forceinline__ void write(const CrossEntropyCudaArgs& a, int64_t row, const LossSums& sums) const {
    float loss = 0, log_total = 0;
    if (counts) {
      log_total = logf(sums.total);
      loss = (1 - a.label_smoothing) * (a.weight && is_class ? a.weight[target] : 1) *
             ((sums.peak - at_target) + log_total);
      if (a.label_smoothing > 0) {
        const float spread = sums.weights * ((sums.peak - origin) + log_total) - sums.shifted;
        loss += a.label_smoothing / float(a.cols) * spread;
      }
    }
    a.loss[row] = loss;
    a.lse[2 * row] = counts ? sums.peak : 0;
    a.lse[2 * row + 1] = log_total;
  }
};

// A block takes a part of a row; blockIdx.x is the part. Where it is the whole row, it writes the loss.
template <class T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_forward_kernel(CrossEntropyCudaArgs a) {
  __shared__ BlockReduction<1>::Shared peak_meeting;
  __shared__ BlockReduction<3>::Shared sum_meeting;
  const int64_t row = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (row >= a.rows) return;
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const RowLoss loss(a, x, row);
  LossSums sums;
  if (loss.counts) {
    const bool smooth = a.label_smoothing > 0;
    const int begin = int(blockIdx.x) * kCrossEntropyPartColumns;
    const int end = a.cols - begin > kCrossEntropyPartColumns ? begin + kCrossEntropyPartColumns : a.cols;
    const auto add = [&](int col, auto& v) {
      sums.add(v);
      if (smooth) sums.spread(v, loss.origin, a.weight, col);
    };
    walk<true>(x, begin, end, add, [&](int col, float v) {
      const float single[1] = {v};
      add(col, single);
    });
    float top[1] = {sums.peak}, all[3] = {0, sums.shifted, sums.weights};
    BlockReduction<1>(peak_meeting).reduce(top, Larger{});
    all[0] = sums.total * exp_approx(sums.peak - top[0]);
    BlockReduction<3>(sum_meeting).reduce(all, Add{});
    sums = {top[0], all[0], all[1], all[2]};
  }
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) return loss.write(a, row, sums);
  float* part = a.parts + (row * gridDim.x + blockIdx.x) * kCrossEntropyPart;
  *reinterpret_cast<float4*>(part) = make_float4(sums.peak, sums.total, sums.shifted, sums.weights);
}

// The parts of a row, put together by a thread in their order.
template <class T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_join_kernel(CrossEntropyCudaArgs a, int parts) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row >= a.rows) return;
  const float4* part = reinterpret_cast<const float4*>(a.parts) + row * parts;
  LossSums sums;
  for (int p = 0; p < parts; ++p) sums.peak = fmaxf(sums.peak, part[p].x);
  for (int p = 0; p < parts; ++p) {
    const float4 s = part[p];
    sums.total += s.y * exp_approx(s.x - sums.peak);
    sums.shifted += s.z;
    sums.weights += s.w;
  }
  RowLoss(a, static_cast<const T*>(a.logits) + row * a.row_stride, row).write(a, row, sums);
}

// dx_c = g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t.
struct RowGradient {
  int64_t target;
  bool counts;
  float top, log_total, picked, uniform, scale;
  const float* weight;

  __device__ __forceinline__ RowGradient(const CrossEntropyBackwardCudaArgs& a, int64_t row)
      : target(a.target[row]), counts(target != a.ignore_index), weight(a.weight) {
    if (!counts) return;
    const bool is_class = target >= 0 && target < a.cols;
    float g = a.grad_loss[row * a.grad_loss_stride];
    if (a.mean) g /= a.totals[0];
    top = a.lse[2 * row];
    log_total = a.lse[2 * row + 1];
    picked = is_class ? g * (1 - a.label_smoothing) * (weight ? weight[target] : 1) : nanf("");
    uniform = g * (a.label_smoothing / float(a.cols));
    scale = picked;
    if (a.label_smoothing > 0) scale += uniform * (weight && !mutant(3) ? a.totals[1] : float(a.cols));
  }

  __device__ __forceinline__ float operator()(int col, float x) const {
    float dx = scale * exp_approx((x - top) - log_total);
    if (uniform != 0) dx -= weight ? uniform * weight[col] : uniform;
    return col == target ? dx - picked : dx;
  }
};

// Blocks walk over parts of rows as the forward does. `alike`: rows of logits and of their gradient are equally far
// from a sector, so that packs of one are packs of the other.
template <class T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_backward_kernel(CrossEntropyBackwardCudaArgs a,
                                                                              bool alike) {
  const int64_t row = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (row >= a.rows) return;
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  T* dx = static_cast<T*>(a.grad_logits) + row * a.cols;
  const int begin = int(blockIdx.x) * kCrossEntropyPartColumns;
  const int end = a.cols - begin > kCrossEntropyPartColumns ? begin + kCrossEntropyPartColumns : a.cols;
  const RowGradient gradient(a, row);
  if (!gradient.counts) {
    walk<false>(
        dx, begin, end, [&](int col, auto& zeros) { store_pack<true>(dx + col, zeros); },
        [&](int col, float zero) { dx[col] = T(zero); });
    return;
  }
  const auto whole = [&](int col, auto& v) {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) v[e] = gradient(col + e, v[e]);
    store_pack<true>(dx + col, v);
  };
  const auto one = [&](int col, float v) { dx[col] = T(gradient(col, v)); };
  if (alike) walk<true>(x, begin, end, whole, one);
  else walk_apart(x, dx, begin, end, whole, one);
}

struct LossGrid {
  dim3 grid;
  unsigned block;
};

// A row has a block for each of its parts; there may be more rows than a grid is high.
inline LossGrid loss_grid(int64_t rows, int64_t cols, int64_t itemsize) {
  const int64_t packs = (cols * itemsize + 15) / 16, height = rows < 32768 ? rows : 32768;
  unsigned block = 32;
  while (block < kLossThreads && block * kWalkLoads < packs) block *= 2;
  return {dim3(unsigned(cross_entropy_parts(cols)), unsigned(height), unsigned((rows + height - 1) / height)), block};
}

template <class T>
struct LossType {
  using Element = T;
};

template <class F>
cudaError_t dispatch_loss(DType dtype, const F& f) {
  if (dtype == DType::float32) return f(LossType<float>{});
  return dtype == DType::bfloat16 ? f(LossType<bfloat16>{}) : f(LossType<float16>{});
}

cudaError_t launch_cross_entropy(const CrossEntropyCudaArgs& a, cudaStream_t stream) {
  if (a.rows > 0) {
    const LossGrid size = loss_grid(a.rows, a.cols, size_of(a.dtype));
    const cudaError_t error = dispatch_loss(a.dtype, [&](auto type) {
      using T = typename decltype(type)::Element;
      cross_entropy_forward_kernel<T><<<size.grid, size.block, 0, stream>>>(a);
      if (size.grid.x > 1)
        cross_entropy_join_kernel<T>
            <<<unsigned((a.rows + 127) / 128), 128, 0, stream>>>(a, int(size.grid.x));
      return cudaGetLastError();
    });
    if (error != cudaSuccess) return error;
  }
  if (a.total)
    reduce_loss_kernel<><<<1, total_threads(a.rows), 0, stream>>>(a.total, a.loss, a.target, a.weight, a.rows, a.cols,
                                                                a.ignore_index, a.mean);
  return cudaGetLastError();
}

cudaError_t launch_cross_entropy_backward(const CrossEntropyBackwardCudaArgs& a, cudaStream_t stream) {
  const bool smooth_weights = a.label_smoothing > 0 && a.weight;
  if (a.mean || smooth_weights)
    class_totals_kernel<><<<1, total_threads(smooth_weights && a.cols > a.rows ? a.cols : a.rows), 0, stream>>>(
        a.totals, a.target, a.weight, a.rows, a.cols, a.ignore_index);
  const int64_t apart = int64_t(reinterpret_cast<uintptr_t>(a.logits) - reinterpret_cast<uintptr_t>(a.grad_logits));
  const bool alike = apart % kSector == 0 && (a.row_stride - a.cols) * size_of(a.dtype) % kSector == 0;
  const LossGrid size = loss_grid(a.rows, a.cols, size_of(a.dtype));
  return dispatch_loss(a.dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    cross_entropy_backward_kernel<T><<<size.grid, size.block, 0, stream>>>(a, alike);
    return cudaGetLastError();
  });
}

}  // namespace pyfast
