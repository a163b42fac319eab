// Tensor maps: what the copies of sm_90 know of a matrix. The driver makes them on the host; its function is found at
// run time, so that nothing links libcuda and a process without a driver loads all the same.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyfast {

// cuTensorMapEncodeTiled of the driver, or null where it has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto found = []() -> PFN_cuTensorMapEncodeTiled_v12000 {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const auto status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const auto status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) cudaGetLastError();   // it is not for the next launch to report
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry) : nullptr;
  }();
  return found;
}

// `lines` of `across` elements of 16 bits, `stride` elements from one to the next, cut into boxes of 128 bytes by
// box_lines, XORed in shared memory as SharedTile is. False where the matrix is none the hardware can read.
inline bool encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, int64_t across,
                              int64_t lines, int64_t stride, uint32_t box_lines) {
  const auto encode = tensor_map_encoder();
  if (!encode || across < 1 || lines < 1 || stride < across) return false;
  const cuuint64_t sizes[] = {cuuint64_t(across), cuuint64_t(lines)}, strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {64, box_lines}, steps[] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pyfast
