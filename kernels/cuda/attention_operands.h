// What the launchers of attention take: for rooms and kernels alike.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../csrc/dispatch.h"

namespace pyfast {

// [B, H, T, D] in any layout whose last stride is 1; strides in elements. `aligned`: every row begins at a multiple of
// 16 bytes.
struct AttentionHeads {
  void* data;
  int64_t batch, head, time;
  bool aligned;
};

inline AttentionHeads attention_heads(const void* data, int64_t batch, int64_t head, int64_t time, DType dtype) {
  const uintptr_t steps = uintptr_t((batch | head | time) * size_of(dtype));
  return {const_cast<void*>(data), batch, head, time, (reinterpret_cast<uintptr_t>(data) | steps) % 16 == 0};
}

enum class ScoreMaskKind { none, boolean, float32, same };   // same: of the dtype of the operands

// [B, H, Tq, Tk] with any strides, 0 where it is broadcast.
struct ScoreMask {
  ScoreMaskKind kind;
  const void* data;
  int64_t batch, head, query, key;
};

struct AttentionCudaArgs {
  DType dtype;
  int capability;   // of the GPU, major: 9 has warpgroups
  int batch, heads, kv_heads, queries, keys, size, value_size;   // B, H, Hkv, Tq, Tk, D, Dv: all positive
  bool causal;
  float scale;
  AttentionHeads q, k, v;
  ScoreMask mask;
  AttentionHeads out;   // only read in backward
  float* lse;           // [B, H, Tq]; +inf for a query that sees no key
};

struct AttentionBackwardCudaArgs {
  AttentionCudaArgs forward;
  AttentionHeads grad_out, grad_q, grad_k, grad_v;
  float* delta;      // [B, H, Tq]: the row sums of grad_out * out; the kernel of dQ leaves them for the others
  void* grad_mask;   // contiguous [Bm, Hm, Qm, Km], each 1 or the full size, of the dtype of the mask; or null
  int mask_batch, mask_heads, mask_queries, mask_keys;
};

cudaError_t launch_attention(const AttentionCudaArgs&, cudaStream_t);
cudaError_t launch_attention_keys(const AttentionBackwardCudaArgs&, cudaStream_t);   // dK and dV, after delta
cudaError_t launch_attention_backward(const AttentionBackwardCudaArgs&, cudaStream_t);

}  // namespace pyfast
