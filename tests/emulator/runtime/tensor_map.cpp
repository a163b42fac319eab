// Stands in for the driver where tensor maps are made: refuses what cuTensorMapEncodeTiled's documentation refuses, and
// writes the emulator's own layout (engine/tensormap.h). Strides of elements other than 1, interleaved and im2col maps
// are not modelled.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

namespace {

struct Map {   // TensorMap in engine/tensormap.h
    uint64_t address, strides[4];
    uint32_t sizes[5], box[5], element_strides[5];
    uint8_t rank_minus_one, element, interleave, swizzle, fill, pad[19];
};
static_assert(sizeof(Map) == 128 && sizeof(CUtensorMap) == 128);

struct Kind {
    int bytes, code;   // the code: of tensormap.replace .elemtype
};

// By CUtensorMapDataType; 0 bytes: not modelled.
Kind kind_of(CUtensorMapDataType type) {
    constexpr Kind kinds[] = {{1, 0}, {2, 1}, {4, 2}, {4, 3}, {8, 4}, {8, 5}, {2, 6}, {4, 7}, {8, 9}, {2, 10}};
    return unsigned(type) < 10 ? kinds[type] : Kind{0, 0};
}

uint64_t swizzle_bytes(CUtensorMapSwizzle swizzle) { return swizzle ? 16u << swizzle : uint64_t(-1); }

CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                CUtensorMapFloatOOBfill fill) {
    const Kind kind = kind_of(type);
    bool right = to && reinterpret_cast<uintptr_t>(to) % 64 == 0 && kind.bytes && rank >= 1 && rank <= 5 && address &&
                 reinterpret_cast<uintptr_t>(address) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                 swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B &&
                 (fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
    for (cuuint32_t d = 0; right && d < rank; ++d) {
        right = sizes[d] >= 1 && sizes[d] <= uint64_t(1) << 32 && box[d] >= 1 && box[d] <= 256 &&
                element_strides[d] == 1;
        if (d > 0) right &= strides[d - 1] % 16 == 0 && strides[d - 1] < uint64_t(1) << 40;
    }
    const uint64_t inner = right ? uint64_t(box[0]) * uint64_t(kind.bytes) : 0;
    if (!right || inner % 16 || inner > swizzle_bytes(swizzle)) return CUDA_ERROR_INVALID_VALUE;
    Map map{};
    map.address = reinterpret_cast<uint64_t>(address);
    for (cuuint32_t d = 0; d < 5; ++d) {
        map.sizes[d] = d < rank ? uint32_t(sizes[d]) : 1;
        map.box[d] = d < rank ? box[d] : 1;
        map.element_strides[d] = 1;
        if (d > 0 && d < rank) map.strides[d - 1] = strides[d - 1];
    }
    map.rank_minus_one = uint8_t(rank - 1);
    map.element = uint8_t(kind.code);
    map.swizzle = uint8_t(swizzle);
    map.fill = uint8_t(fill);
    memcpy(to, &map, sizeof map);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled") && version >= 12000;
    *entry = known ? reinterpret_cast<void*>(encode) : nullptr;
    if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

}  // extern "C"
