// The kernels of attention on split keys for the emulator, where they are compiled with defects.
#include "../../kernels/cuda/attention_decode.cuh"

namespace pyfast {

// Parts of whole tiles of 64 and of at least 256 keys, until there are blocks enough for a large GPU; heads that share
// keys are one for one query. None with a causal mask, for more queries than a tile has, and for few keys.
constexpr bool splits(KeyParts p, int count, int keys) { return p.count == count && p.keys == keys; }
static_assert(splits(attention_key_parts(1, 2, 1, 1, 2048, false), 8, 256), "as many as there may be");
static_assert(splits(attention_key_parts(1, 32, 8, 1, 65536, false), 32, 2048), "of 8 heads: as many as fill the GPU");
static_assert(splits(attention_key_parts(66, 2, 2, 1, 1024, false), 2, 512), "two of 132 heads");
static_assert(splits(attention_key_parts(300, 2, 2, 4, 1000, false), 1, 1024), "one of 600");
static_assert(splits(attention_key_parts(1, 1, 1, 16, 515, false), 2, 320), "the last one is short");
static_assert(attention_key_parts(1, 1, 1, 17, 2048, false).count == 0, "a tile of more queries");
static_assert(attention_key_parts(1, 1, 1, 1, 511, false).count == 0, "too few keys");
static_assert(attention_key_parts(1, 1, 1, 1, 2048, true).count == 0, "one key is seen");

template __global__ void attention_decode_kernel<bfloat16, 64>(const __grid_constant__ AttentionDecodeArgs);
template __global__ void attention_combine_kernel<bfloat16>(const __grid_constant__ AttentionDecodeArgs);

}  // namespace pyfast
