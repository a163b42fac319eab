// What the launchers of layer_norm and rms_norm take, and how they cut the work: for rooms and kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <numeric>

#include "../../csrc/dispatch.h"

namespace pyfast {

// Contiguous [rows, cols] at multiples of 16 bytes; null means absent. Statistics are float32.
struct NormCudaArgs {
  DType dtype, affine_dtype;   // of x, and of weight and bias: the same or float32
  int64_t rows;
  int cols;
  float eps;
  const void *x, *residual, *weight, *bias;
  void *out, *sum;
  float *mean, *rstd;   // [rows]; no mean in rms_norm
  int processors;
};

struct NormBackwardCudaArgs {
  DType dtype, affine_dtype;
  int64_t rows;
  int cols;
  const void *grad_out, *grad_sum, *x, *weight;
  const float *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;
  float* partial;   // [gradients wanted, norm_plan().partials, norm_padded(cols)], if any of weight and bias is
  int processors;
};

// A block keeps a row in registers, `elements` a thread, and walks over rows so far apart that all of them begin at the
// same distance from a sector; wide rows do not fit, and are read twice.
struct NormPlan {
  bool wide;
  int elements, warps;
  int64_t blocks;
  int64_t partials;   // rows of partial sums
};

constexpr int kNormWideStrip = 256;   // columns of a block of the weight gradient of wide rows

inline NormPlan norm_plan(int64_t rows, int64_t cols, int64_t itemsize, int processors) {
  const int64_t sector = 32 / itemsize, group = std::gcd(cols, sector), period = sector / group;
  for (const int elements : {8, 16}) {
    if (elements == 16 && itemsize == 4) continue;   // sixteen float32 of each operand would spill
    int warps = 1;
    while (warps < 16 && 32 * warps * elements < cols + sector - group) warps *= 2;
    if (32 * warps * elements < cols + sector - group) continue;
    const int64_t wanted = processors * 32 / warps / period, there = (rows + period - 1) / period;
    const int64_t blocks = (wanted < 1 ? 1 : wanted < there ? wanted : there) * period;
    return {false, elements, warps, blocks, blocks};
  }
  const int64_t strips = (cols + kNormWideStrip - 1) / kNormWideStrip, parts = processors * 8 / strips;
  return {true, 0, 16, rows, parts < 1 ? 1 : parts < rows ? parts : rows};
}

constexpr int64_t norm_padded(int64_t cols) { return (cols + 3) / 4 * 4; }   // what column sums want

cudaError_t launch_layer_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_layer_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
