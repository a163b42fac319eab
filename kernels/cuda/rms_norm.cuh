// rms_norm and its gradients: launchers.
#pragma once

#include "norm_launch.cuh"

namespace pyfast {

cudaError_t launch_rms_norm(const NormCudaArgs& args, cudaStream_t stream) { return launch_norm<false>(args, stream); }

cudaError_t launch_rms_norm_backward(const NormBackwardCudaArgs& args, cudaStream_t stream) {
  return launch_norm_backward<false>(args, stream);
}

}  // namespace pyfast
