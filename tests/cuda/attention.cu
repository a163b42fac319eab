// The kernels of attention for the emulator: head sizes and dtypes whose tiles differ.
#include "../../kernels/cuda/attention_forward.cuh"
#include "../../kernels/cuda/attention_keys.cuh"
#include "../../kernels/cuda/attention_mask_gradient.cuh"

namespace pyfast {

using Forward = AttentionCudaArgs;
using Backward = AttentionBackwardCudaArgs;

#define FORWARD(T, D, GROUPS) \
  template __global__ void attention_forward_kernel<T, D, GROUPS>(const __grid_constant__ Forward);
#define BACKWARD(T, D, GROUPS) \
  template __global__ void attention_backward_dq_kernel<T, D, GROUPS>(const __grid_constant__ Backward); \
  template __global__ void attention_backward_dkdv_kernel<T, D, GROUPS>(const __grid_constant__ Backward);
#define MASK(T, D) template __global__ void attention_backward_mask_kernel<T, D>(const __grid_constant__ Backward);

// A defect shows in one kernel of its direction; those from 150 on are of warpgroups.
#ifdef PYFAST_MUTANT
#if PYFAST_MUTANT < 145
FORWARD(bfloat16, 64, false)
#elif PYFAST_MUTANT < 150
BACKWARD(bfloat16, 64, false)
#elif PYFAST_MUTANT < 160
FORWARD(bfloat16, 128, true)
#elif PYFAST_MUTANT < 168
BACKWARD(bfloat16, 64, true)
#else
BACKWARD(bfloat16, 256, true)
#endif

// For warpgroups; of an architecture without the suffix "a", what stands in for them.
#elif __CUDA_ARCH__ == 900
FORWARD(bfloat16, 64, true)
BACKWARD(bfloat16, 64, true)
MASK(bfloat16, 64)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
FORWARD(float16, 128, true)
BACKWARD(float16, 128, true)
FORWARD(float16, 80, true)
BACKWARD(float16, 80, true)
FORWARD(float16, 96, true)
BACKWARD(float16, 96, true)
FORWARD(bfloat16, 192, true)
BACKWARD(bfloat16, 192, true)
#endif
FORWARD(bfloat16, 256, true)
BACKWARD(bfloat16, 256, true)
#else
FORWARD(bfloat16, 64, false)
FORWARD(float16, 128, false)
FORWARD(bfloat16, 256, false)
FORWARD(float, 64, false)
FORWARD(float, 256, false)
BACKWARD(bfloat16, 64, false)
BACKWARD(float16, 128, false)
BACKWARD(bfloat16, 256, false)
BACKWARD(float, 64, false)
BACKWARD(float, 256, false)
MASK(bfloat16, 64)
MASK(float, 64)
#endif

}  // namespace pyfast
