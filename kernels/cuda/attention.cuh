// attention: its launcher.
#pragma once

#include "attention_forward.cuh"

namespace pyfast {

cudaError_t launch_attention(const AttentionCudaArgs& a, cudaStream_t stream) {
  if (a.dtype == DType::float32) return launch_attention_forward<float>(a, stream);
  if (a.dtype == DType::bfloat16) return launch_attention_forward<bfloat16>(a, stream);
  return launch_attention_forward<float16>(a, stream);
}

}  // namespace pyfast
