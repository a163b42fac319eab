// Compiles the backward kernels of attention but those of dK and dV: nvcc compiles files side by side.
#include "../../kernels/cuda/attention_mask_gradient.cuh"

namespace pyfast {
namespace {

template <class T>
cudaError_t launch_all(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  cudaError_t status = launch_attention_dq<T>(g, stream);   // and delta, which the others read
  if (status == cudaSuccess) status = launch_attention_keys(g, stream);
  if (status == cudaSuccess && g.grad_mask) status = launch_attention_mask_gradient<T>(g, stream);
  return status;
}

}  // namespace

cudaError_t launch_attention_backward(const AttentionBackwardCudaArgs& g, cudaStream_t stream) {
  if (g.forward.dtype == DType::float32) return launch_all<float>(g, stream);
  if (g.forward.dtype == DType::bfloat16) return launch_all<bfloat16>(g, stream);
  return launch_all<float16>(g, stream);
}

}  // namespace pyfast
