// NVIDIA's cuBLASLt as a second candidate for the products of linear_act: found at run time where it is installed (a
// CUDA build of torch brings it), never linked, and asked only after choose_cublaslt(true).
#pragma once

#include <functional>

#include "../../kernels/cuda/linear_act.h"

namespace pyfast {

bool choose_cublaslt(bool on);   // false: it is asked for and cannot be found
bool cublaslt_chosen();

using Allocate = std::function<void*(int64_t bytes)>;   // on the GPU, at a multiple of 256, until the call returns

// Each returns false where the library cannot do it, or says so; nothing has been written then that must stay.
bool cublaslt_linear_act(const LinearActCudaArgs&, const Allocate&, cudaStream_t);

// Of Act::none, whatever `act` says: grad_out is the gradient of the pre-activation.
bool cublaslt_grad_x(const LinearActBackwardCudaArgs&, const Allocate&, cudaStream_t);
bool cublaslt_grad_weight(const LinearActBackwardCudaArgs&, const Allocate&, cudaStream_t);   // and grad_bias if wanted

}  // namespace pyfast
