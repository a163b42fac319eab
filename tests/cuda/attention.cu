// The kernels of attention for the emulator: head sizes and dtypes whose tiles differ.
#include "../../kernels/cuda/attention_forward.cuh"
#include "../../kernels/cuda/attention_mask_gradient.cuh"

namespace pyfast {

using Forward = AttentionCudaArgs;
using Backward = AttentionBackwardCudaArgs;
constexpr auto kBoth = KeyGradients::both, kKeys = KeyGradients::keys, kValues = KeyGradients::values;

#define FORWARD(T, D) template __global__ void attention_forward_kernel<T, D>(const __grid_constant__ Forward);
#define QUERIES(T, D) template __global__ void attention_backward_dq_kernel<T, D>(const __grid_constant__ Backward);
#define KEYS(T, D, WHICH) \
  template __global__ void attention_backward_dkdv_kernel<T, D, WHICH>(const __grid_constant__ Backward);
#define MASK(T, D) template __global__ void attention_backward_mask_kernel<T, D>(const __grid_constant__ Backward);

#if !defined(PYFAST_MUTANT) || PYFAST_MUTANT < 145   // a defect shows in one kernel of its direction
FORWARD(bfloat16, 64)
#endif
#if !defined(PYFAST_MUTANT) || PYFAST_MUTANT >= 145
QUERIES(bfloat16, 64)
KEYS(bfloat16, 64, kBoth)
template __global__ void attention_delta_kernel<bfloat16>(const __grid_constant__ Backward);
#endif
#if !defined(PYFAST_MUTANT) && __CUDA_ARCH__ != 900   // sm_90a differs in little: one head size of one dtype is enough
FORWARD(float16, 128)
FORWARD(bfloat16, 256)
FORWARD(float, 64)
QUERIES(float16, 128)
QUERIES(bfloat16, 256)
QUERIES(float, 64)
KEYS(float16, 128, kBoth)
KEYS(bfloat16, 256, kKeys)
KEYS(bfloat16, 256, kValues)
KEYS(float, 64, kBoth)
MASK(bfloat16, 64)
MASK(float, 64)
template __global__ void attention_delta_kernel<float16>(const __grid_constant__ Backward);
template __global__ void attention_delta_kernel<float>(const __grid_constant__ Backward);
#endif

}  // namespace pyfast
