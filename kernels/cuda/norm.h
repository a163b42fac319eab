// What the launchers of layer_norm and rms_norm take, and how they cut the work: for rooms and kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
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
  float* strips;        // [2, norm_plan().strips, rows], if there are several
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
  float* strips;    // [2, norm_plan().strips, rows], if there are several
  int processors;
  int64_t rows_each = 0;   // these two the launcher sets, of its NormPlan
  int period = 0;
};

// A team keeps a row in registers, `elements` a thread, and has rows that lie one after the other or, where those are
// not whole sectors, `period` apart: so all of them begin at the same distance from a sector. Rows between them go to
// other teams of the block at the same time, since neighbours share a sector. Where a team has many rows it has a
// multiple of 8, whose statistics fill sectors. Rows that do not fit are cut into strips, which two launches read.
//
// Short rows are taken in runs of neighbours instead: a run in shared memory, a row of it for each `lanes` of a block.
struct NormPlan {
  int elements, warps, teams;   // warps: of a team; teams: of a block
  int strips;                   // of a row
  int64_t blocks, rows_each;
  int period;
  int64_t partials;             // rows of partial sums, at most
  int lanes = 0;
};

constexpr int kNormWarps = 16, kNormTeams = 8;   // most of a block

constexpr int kRunThreads = 512;     // of a block that takes runs
constexpr int kRunPacks = 3;         // of 16 bytes, most of a thread

// Packs that cover a row wherever it begins.
inline int64_t norm_packs(int64_t cols, int64_t itemsize) {
  const int64_t size = 16 / itemsize;
  return (cols + size - std::gcd(cols, size) + size - 1) / size;
}

// Rows that fill half of a warp or less, and longer ones if they share sectors that would be much beside them.
inline bool norm_in_runs(int64_t cols, int64_t itemsize) {
  return norm_packs(cols, itemsize) <= (cols * itemsize % 32 == 0 ? 16 : 32 * kRunPacks);
}

inline NormPlan norm_run_plan(int64_t rows, int64_t cols, int64_t itemsize, int processors) {
  const int64_t packs = norm_packs(cols, itemsize), each = (packs + 31) / 32;
  int lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  const int64_t run = kRunThreads / lanes, runs = (rows + run - 1) / run;
  const int64_t wanted = std::min<int64_t>(runs, processors), some = (runs + wanted - 1) / wanted * run;
  const int64_t blocks = (rows + some - 1) / some;
  return {int(each * 16 / itemsize), 0, int(run), 1, blocks, some, 1, blocks, lanes};
}

// Packs of shared memory for `each` a thread, of `runs`; where several were, there will be sums of columns.
__host__ __device__ constexpr int norm_run_packs(int each, int itemsize, int runs) {
  const int elements = kRunThreads * each * 16 / itemsize;
  const int sums = runs > 1 ? (elements + elements / 32 + kRunThreads + 3) / 4 : 0, all = runs * each * kRunThreads;
  return sums > all ? sums : all;
}

// Backward a thread with more would spill: the weight stays in shared memory, for each place that a row can begin at.
__host__ __device__ constexpr bool norm_run_parks(int elements) { return elements > 16; }
__host__ __device__ constexpr int norm_run_parked(int elements, int places) {
  return norm_run_parks(elements) ? places * elements * 32 : 0;
}

// Forward, fewer warps with more each meet at less cost; backward, where sums of columns are kept too, sixteen elements
// are for rows that need them, or share sectors with others that then fit into the block, and would spill in float32.
inline NormPlan norm_plan(int64_t rows, int64_t cols, int64_t itemsize, int processors, bool backward) {
  if (norm_in_runs(cols, itemsize)) return norm_run_plan(rows, cols, itemsize, processors);
  const int64_t sector = 32 / itemsize, group = std::gcd(cols, sector), period = sector / group;
  const int64_t window = cols + sector - group;
  const bool fits = window <= 32 * kNormWarps * (backward && itemsize == 4 ? 8 : 16);
  const int64_t eight = backward ? (itemsize == 2 && period > 1 ? 2048 : 4096) : 256;   // most columns with so many
  const int elements = window <= eight || !fits || (backward && itemsize == 4) ? 8 : 16;
  int warps = fits ? 1 : kNormWarps;
  while (warps < kNormWarps && 32 * warps * elements < window) warps *= 2;
  const int strips = int((window + 32 * warps * elements - 1) / (32 * warps * elements));
  const int resident = elements == 16 ? 16 : 32;   // warps of a multiprocessor, by their registers
  const int64_t wanted = processors * resident / warps / period / strips, groups = (wanted < 1 ? 1 : wanted) * period;
  int64_t each = (rows + groups - 1) / groups;
  if (each > 32) each = (each + 7) / 8 * 8;
  const int64_t sets = (rows + each * period - 1) / (each * period) * period;   // of rows, one for each team
  const int teams = int(std::min<int64_t>(std::min(kNormWarps / warps, kNormTeams), period));
  const int64_t blocks = sets / teams, partials = strips > 1 ? std::max<int64_t>(blocks, processors) : blocks;
  return {elements, warps, teams, strips, blocks, each, int(period), partials};
}

constexpr int64_t norm_padded(int64_t cols) { return (cols + 3) / 4 * 4; }   // what column sums want

cudaError_t launch_layer_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_layer_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm(const NormCudaArgs&, cudaStream_t);
cudaError_t launch_rms_norm_backward(const NormBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
