// Compiles the kernels of attention on split keys, in a file of their own: nvcc compiles files side by side.
#include "../../kernels/cuda/attention_decode.cuh"

namespace pyfast {

cudaError_t launch_attention_decode(const AttentionDecodeArgs& args, cudaStream_t stream) {
  const AttentionDecodeArgs d = heads_as_queries(args);
  if (d.forward.dtype == DType::float32) return launch_attention_decode_of<float>(d, stream);
  if (d.forward.dtype == DType::bfloat16) return launch_attention_decode_of<bfloat16>(d, stream);
  return launch_attention_decode_of<float16>(d, stream);
}

}  // namespace pyfast
