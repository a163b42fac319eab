// Compiles the kernels of dK and dV of attention, in a file of their own: nvcc compiles files side by side.
#include "../../kernels/cuda/attention_keys.cuh"

namespace pyfast {

cudaError_t launch_attention_keys(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  if (g.forward.dtype == DType::float32) return launch_attention_dkdv<float>(g, stream);
  if (g.forward.dtype == DType::bfloat16) return launch_attention_dkdv<bfloat16>(g, stream);
  return launch_attention_dkdv<float16>(g, stream);
}

}  // namespace pyfast
