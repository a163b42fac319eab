// layer_norm and rms_norm of rows that do not fit into the registers of a block: a second read, from a cache.
#pragma once

#include "norm.h"
#include "rows.cuh"

namespace pyfast {

// f(float (&pack)[kPack<T>], first column, elements that are in the row) for every pack of a row at `at`, the packs
// counted from the sector it begins in.
template <class T, class F>
__device__ __forceinline__ void for_packs(int64_t at, int cols, const F& f) {
  constexpr int kSize = kPack<T>;
  const int shift = int(at % (kSector / int(sizeof(T))));
  for (int col = int(threadIdx.x) * kSize - shift; col < cols; col += int(blockDim.x) * kSize) f(col);
}

// Elements [col, col + kPack) of a row; zeros outside.
template <class T, class S>
__device__ __forceinline__ void load_edge(float (&to)[kPack<T>], const S* row, int col, int cols, bool aligned) {
  if (aligned && col >= 0 && col + kPack<T> <= cols) return load_pack(to, row + col);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) to[e] = unsigned(col + e) < unsigned(cols) ? float(row[col + e]) : 0;
}

// The same of weight or bias, which are of T or float32.
template <class T>
__device__ __forceinline__ void load_affine(float (&to)[kPack<T>], const void* from, DType dtype, int col, int cols,
                                            bool aligned) {
  if (dtype == DType::float32) load_edge<T>(to, static_cast<const float*>(from), col, cols, aligned);
  else load_edge<T>(to, static_cast<const T*>(from), col, cols, aligned);
}

template <class T>
__device__ __forceinline__ void store_edge(T* row, const float (&from)[kPack<T>], int col, int cols) {
  if (col >= 0 && col + kPack<T> <= cols) return store_pack(row + col, from);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    if (unsigned(col + e) < unsigned(cols)) row[col + e] = T(from[e]);
}

// Count, mean and squared deviations of what a thread has seen (Chan, Golub & LeVeque, 1979): the difference of two
// large sums would lose the digits.
struct Moments {
  float count = 0, mean = 0, squares = 0;

  __device__ __forceinline__ void add(float n, float other_mean, float other_squares) {
    if (n == 0) return;
    const float all = count + n, d = other_mean - mean;
    mean += d * (n / all);
    squares += other_squares + d * d * (count * n / all);
    count = all;
  }
};

// A block takes one row.
template <class T, bool kCentred>
__global__ void __launch_bounds__(512) wide_norm_forward_kernel(NormCudaArgs a) {
  constexpr int kSize = kPack<T>;
  __shared__ typename BlockReduction<2>::Shared meeting;
  BlockReduction<2> block(meeting);
  const int64_t at = int64_t(blockIdx.x) * a.cols;
  const T *x = static_cast<const T*>(a.x) + at, *residual = static_cast<const T*>(a.residual);
  T* sum = static_cast<T*>(a.sum);
  Moments own;
  for_packs<T>(at, a.cols, [&](int col) {
    float v[kSize];
    load_edge<T>(v, x, col, a.cols, true);
    if (residual) {
      float other[kSize];
      load_edge<T>(other, residual + at, col, a.cols, true);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[e] = float(T(v[e] + other[e]));
      store_edge(sum + at, v, col, a.cols);
    }
    const int n = min(col + kSize, a.cols) - max(col, 0);
    float mean = 0, squares = 0;
    if (kCentred && n > 0) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) mean += v[e];
      mean /= float(n);
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float d = unsigned(col + e) < unsigned(a.cols) ? v[e] - mean : 0;
      squares += d * d;
    }
    own.add(float(max(n, 0)), mean, squares);
  });
  float mean = 0, total[2] = {own.count * own.mean, own.squares};
  if constexpr (kCentred) {
    block.reduce(total, Add{});
    mean = total[0] / float(a.cols);
    total[0] = own.count * (own.mean - mean) * (own.mean - mean);
    total[1] = own.squares;
  } else {
    total[0] = 0;   // the moments were about 0
  }
  block.reduce(total, Add{});
  const float rstd = 1 / sqrtf((total[0] + total[1]) / float(a.cols) + a.eps);
  if (threadIdx.x == 0) {
    if (kCentred) a.mean[blockIdx.x] = mean;
    a.rstd[blockIdx.x] = rstd;
  }
  const T* stored = residual ? sum + at : x;   // each thread wrote what it reads
  const bool aligned = at % kSize == 0;
  for_packs<T>(at, a.cols, [&](int col) {
    float v[kSize], scale[kSize], shift[kSize];
    load_edge<T>(v, stored, col, a.cols, true);
    if (a.weight) load_affine<T>(scale, a.weight, a.affine_dtype, col, a.cols, aligned);
    if (a.bias) load_affine<T>(shift, a.bias, a.affine_dtype, col, a.cols, aligned);
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      v[e] = (v[e] - mean) * rstd * (a.weight ? scale[e] : 1) + (a.bias ? shift[e] : 0);
    store_edge(static_cast<T*>(a.out) + at, v, col, a.cols);
  });
}

template <class T, bool kCentred>
__global__ void __launch_bounds__(512) wide_norm_backward_kernel(NormBackwardCudaArgs a) {
  constexpr int kSize = kPack<T>;
  __shared__ typename BlockReduction<2>::Shared meeting;
  BlockReduction<2> block(meeting);
  const int64_t at = int64_t(blockIdx.x) * a.cols;
  const float rstd = a.rstd[blockIdx.x], mean = kCentred ? a.mean[blockIdx.x] : 0;
  const bool aligned = at % kSize == 0;
  const auto load = [&](int col, float(&xhat)[kSize], float(&g)[kSize]) {
    float scale[kSize];
    load_edge<T>(xhat, static_cast<const T*>(a.x) + at, col, a.cols, true);
    load_edge<T>(g, static_cast<const T*>(a.grad_out) + at, col, a.cols, true);
    if (a.weight) load_affine<T>(scale, a.weight, a.affine_dtype, col, a.cols, aligned);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      xhat[e] = (xhat[e] - mean) * rstd;
      if (a.weight) g[e] *= scale[e];
    }
  };
  float sums[2] = {};
  for_packs<T>(at, a.cols, [&](int col) {
    float xhat[kSize], g[kSize];
    load(col, xhat, g);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {   // outside of the row g is 0
      sums[0] += g[e] * xhat[e];
      sums[1] += g[e];
    }
  });
  block.reduce(sums, Add{});
  const float along = sums[0] / float(a.cols), offset = kCentred ? sums[1] / float(a.cols) : 0;
  for_packs<T>(at, a.cols, [&](int col) {
    float xhat[kSize], g[kSize], more[kSize] = {};
    load(col, xhat, g);
    if (a.grad_sum) load_edge<T>(more, static_cast<const T*>(a.grad_sum) + at, col, a.cols, true);
#pragma unroll
    for (int e = 0; e < kSize; ++e) g[e] = (g[e] - xhat[e] * along - offset) * rstd + more[e];
    store_edge(static_cast<T*>(a.grad_x) + at, g, col, a.cols);
  });
}

// Sums of grad_out xhat and of grad_out over every gridDim.y-th row; a thread has one column.
template <class T, bool kCentred>
__global__ void __launch_bounds__(kNormWideStrip) wide_norm_weight_kernel(NormBackwardCudaArgs a) {
  const int64_t padded = norm_padded(a.cols), col = int64_t(blockIdx.x) * kNormWideStrip + threadIdx.x;
  float dweight = 0, dbias = 0;
  if (col < a.cols) {
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
      const float dy = float(static_cast<const T*>(a.grad_out)[row * a.cols + col]);
      const float x = float(static_cast<const T*>(a.x)[row * a.cols + col]) - (kCentred ? a.mean[row] : 0);
      dweight += dy * (x * a.rstd[row]);
      dbias += dy;
    }
  }
  if (col >= padded) return;
  float* plane = a.partial + blockIdx.y * padded + col;
  if (a.grad_weight) {
    *plane = dweight;
    plane += gridDim.y * padded;
  }
  if (a.grad_bias) *plane = dbias;
}

}  // namespace pyfast
