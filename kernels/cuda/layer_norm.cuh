// layer_norm and its gradients: launchers.
#pragma once

#include "norm_launch.cuh"

namespace pyfast {

cudaError_t launch_layer_norm(const NormCudaArgs& args, cudaStream_t stream) { return launch_norm<true>(args, stream); }

cudaError_t launch_layer_norm_backward(const NormBackwardCudaArgs& args, cudaStream_t stream) {
  return launch_norm_backward<true>(args, stream);
}

}  // namespace pyfast
