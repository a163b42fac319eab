#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

struct RopeArgs {
  DType dtype;
  bool interleaved, inverse;
  int64_t batch, heads, length, size;             // size: D, even
  int64_t batch_stride, head_stride, time_stride; // of x, in elements; its last stride is 1
  int64_t cos_stride, sin_stride;                 // from one position to the next
  const void* x;                                  // [B, H, T, D]
  const float *cos, *sin;                         // [T, D / 2]
  void* out;                                      // [B, T, H, D], contiguous
};

template <Isa kIsa> void rope(const RopeArgs&);

}  // namespace pyfast
