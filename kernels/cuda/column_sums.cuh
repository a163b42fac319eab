// out[c] = the sum of partial[:, c], always in one order: the second step of bias gradients and of split products.
// Bound by bytes: every partial sum is read once, in 16-byte loads.
#pragma once

#include "epilogue.cuh"

namespace pyfast {

constexpr int kSumColumns = 128, kSumRows = 8;   // of a block: a warp takes 32 lanes of 4 columns of every 8th row

// Rows of `partial` are `stride` long, a multiple of four; what is past `cols` is not read.
template <class T>
__global__ void __launch_bounds__(32 * kSumRows) column_sums_kernel(T* out, const float* partial, int64_t cols,
                                                                    int64_t stride, int rows, bool aligned) {
  __shared__ float4 total[kSumRows][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = int64_t(blockIdx.x) * kSumColumns + lane * 4;
  float4 sum = make_float4(0, 0, 0, 0);
  const auto add = [&sum](float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  const int count = int(min(max(cols - col, int64_t(0)), int64_t(4)));
  for (int row = warp; row < rows; row += kSumRows) {
    const float* from = partial + row * stride + col;
    if (count == 4)
      add(*reinterpret_cast<const float4*>(from));
    else
      add(make_float4(count > 0 ? from[0] : 0, count > 1 ? from[1] : 0, count > 2 ? from[2] : 0, 0));
  }
  total[warp][lane] = sum;
  if (!mutant(108)) __syncthreads();
  if (warp > 0 || count == 0) return;
  for (int other = 1; other < kSumRows; ++other) add(total[other][lane]);
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
  store_four(out + col, v, count, aligned && count == 4);
}

__host__ __device__ constexpr int64_t padded(int64_t cols) { return (cols + 3) / 4 * 4; }

// `partial`: [rows, padded(cols)], at a multiple of 16 bytes; `rows` may be 0.
template <class T>
cudaError_t launch_column_sums(T* out, const float* partial, int64_t cols, int rows, cudaStream_t stream) {
  const unsigned grid = unsigned((cols + kSumColumns - 1) / kSumColumns);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0;
  column_sums_kernel<T><<<grid, 32 * kSumRows, 0, stream>>>(out, partial, cols, padded(cols), rows, aligned);
  return cudaGetLastError();
}

}  // namespace pyfast
