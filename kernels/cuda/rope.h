// What the launcher of rope takes: for the room and the kernel alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// x [B, H, T, D] of any strides but the last, which is 1; cos and sin [T, D / 2] likewise; out [B, T, H, D] is
// contiguous.
struct RopeCudaArgs {
  DType dtype;
  bool interleaved, inverse;   // pairs are neighbours; turn back
  int64_t batch, heads, length, size;
  int64_t batch_stride, head_stride, time_stride, cos_stride, sin_stride;   // in elements
  const void* x;
  const float *cos, *sin;
  void* out;
  int processors;
};

cudaError_t launch_rope(const RopeCudaArgs&, cudaStream_t);

}  // namespace pyfast
