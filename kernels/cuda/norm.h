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
  int64_t rows_each = 0;   // these two the launcher sets, of its NormPlan
  int period = 0;
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
  int64_t rows_each = 0;   // these two the launcher sets, of its NormPlan
  int period = 0;
};

// A block keeps a row in registers, `elements` a thread, and has rows that lie one after the other or, where those are
// not whole sectors, `period` apart: so all of them begin at the same distance from a sector. Where it has
// many it has a multiple of 8, whose statistics fill sectors. Wide rows do not fit, and are read twice.
struct NormPlan {
  bool wide;
  int elements, warps;
  int64_t blocks, rows_each;
  int period;
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
    const int64_t wanted = processors * 32 / warps / period, groups = (wanted < 1 ? 1 : wanted) * period;
    int64_t each = (rows + groups - 1) / groups;
    if (each > 32) each = (each + 7) / 8 * 8;
    const int64_t blocks = (rows + each * period - 1) / (each * period) * period;
    return {false, elements, warps, blocks, each, int(period), blocks};
  }
  const int64_t strips = (cols + kNormWideStrip - 1) / kNormWideStrip, parts = processors * 8 / strips;
  return {true, 0, 16, rows, 1, 1, parts < 1 ? 1 : parts < rows ? parts : rows};
}

constexpr int64_t norm_padded(int64_t cols) { return (cols + 3) / 4 * 4; }   // what column sums want

cudaError_t launch_layer_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_layer_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
