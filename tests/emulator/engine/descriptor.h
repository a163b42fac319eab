// Matrices in shared memory as wgmma sees them: 64-bit descriptors, core matrices, swizzles.
#pragma once
#include "isa.h"

namespace ptx {

// 16-byte chunks change places within their 128-byte line, by the number of the line in its pattern:
// bits 4.. of the address are xored with bits 7.. (1 bit for 32-byte swizzle, 2 for 64, 3 for 128).
inline u64 swizzled(u64 address, u32 bytes, u32 base_offset = 0) {
    return address ^ (((address >> 7) - base_offset) & (bytes / 16 - 1)) << 4;
}

struct MatrixDescriptor {
    u64 start, leading, stride;  // bytes
    u32 base_offset;
    u32 swizzle;                 // bytes of the pattern's rows; 16: none

    explicit MatrixDescriptor(u64 bits)
        : start((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4),
          base_offset(u32(bits >> 49 & 7)) {
        const u32 widths[] = {16, 128, 64, 32};
        swizzle = widths[bits >> 62];
    }

    // Where the 16-byte chunk lies that holds element (row, k): row is the index along M or N, k along K.
    // `along_rows`: the matrix is stored with rows as its contiguous dimension (MN-major).
    u64 chunk(int row, int k, int bytes, bool along_rows) const {
        const int wide = int(swizzle) / bytes;  // elements in a row of the pattern
        u64 at = start;
        if (!along_rows) {
            at += u64(row / 8) * stride;
            if (swizzle == 16) at += u64(k * bytes / 16) * leading + u64(row % 8) * 16;
            else at += u64(row % 8) * swizzle + u64(k * bytes / 16 * 16);
        } else if (swizzle == 16) {
            at += u64(row / 8) * stride + u64(k / 8) * leading + u64(k % 8) * 16;
        } else {
            at += u64(row / wide) * leading + u64(k / 8) * stride + u64(k % 8) * swizzle;
            at += u64(row % wide * bytes / 16 * 16);
        }
        return swizzled(at, swizzle, base_offset);
    }
};

}  // namespace ptx
