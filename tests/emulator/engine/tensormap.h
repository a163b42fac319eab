// Tensor maps of the bulk engine. The 128 bytes are opaque on hardware; this is our own layout, which
// tests/emulator/tensormap.py writes for the host.
#pragma once
#include "memory.h"

namespace ptx {

struct TensorMap {
    u64 address;
    u64 strides[4];          // bytes, of dimensions 1 to 4
    u32 sizes[5];            // elements, innermost first
    u32 box[5];
    u32 element_strides[5];
    u8 rank_minus_one, element, interleave, swizzle, fill;
    u8 pad[19];
    int rank() const { return rank_minus_one + 1; }
    int element_bytes() const;
    Type element_type() const;
    u32 swizzle_bytes() const { return swizzle == 0 ? 16 : 16u << swizzle; }
};
static_assert(sizeof(TensorMap) == 128);

TensorMap read_tensor_map(Warp& w, const Instr& i, int lane, u64 at);

}  // namespace ptx
