// What the launchers of cross_entropy take: for the room and the kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// Logits [rows, cols] with adjacent columns and any row stride (in elements); null means absent. Numbers are float32.
// lse [rows, 2]: the maximum, and the logarithm of the sum of exp(x - maximum).
struct CrossEntropyCudaArgs {
  DType dtype;
  int64_t rows;
  int cols;
  int64_t row_stride;
  const void* logits;
  const int64_t* target;
  const float* weight;
  int64_t ignore_index;
  float label_smoothing;
  float *loss, *lse;   // [rows], [rows, 2]
  float* parts;        // [rows, cross_entropy_parts(cols), kCrossEntropyPart], where a row has several parts
  float* total;        // [1]: the losses added up, divided by the weights of the rows if `mean`; null: not wanted
  bool mean;
};

struct CrossEntropyBackwardCudaArgs {
  DType dtype;
  int64_t rows;
  int cols;
  int64_t row_stride;
  const void* logits;
  const int64_t* target;
  const float* weight;
  int64_t ignore_index;
  float label_smoothing;
  const float* grad_loss;
  int64_t grad_loss_stride;   // 0: one number for all rows
  bool mean;
  float* totals;              // [2]: the weights of all rows that count, and of all classes
  const float* lse;
  void* grad_logits;          // [rows, cols], contiguous
};

constexpr int kCrossEntropyPart = 4;               // maximum, sum of exp, sum of logits, sum of class weights
constexpr int kCrossEntropyPartColumns = 1 << 16;  // a longer row is split over blocks: few rows must fill a GPU

constexpr int cross_entropy_parts(int64_t cols) {
  return cols == 0 ? 1 : int((cols + kCrossEntropyPartColumns - 1) / kCrossEntropyPartColumns);
}

cudaError_t launch_cross_entropy(const CrossEntropyCudaArgs&, cudaStream_t);
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
