// The products of a gated linear unit, and the pass between them, for the emulator, in the tiles of large matrices.
#include "../../kernels/cuda/glu_backward.cuh"
#include "../../kernels/cuda/paired_gemm.cuh"

namespace pyfast {

#define FORWARD(T, TILE) \
  template __global__ void gemm_kernel<T, TILE, Major::depth, Major::depth, false, GluEpilogue<T>, PairedRows<T>>( \
      GemmArgs<T, PairedRows<T>>, GluEpilogue<T>);
#define BACKWARD(T, TILE) \
  template __global__ void gemm_kernel<T, TILE, Major::depth, Major::rows, false, StoreEpilogue<T>, PairedDepth<T>>( \
      GemmArgs<T, PairedDepth<T>>, StoreEpilogue<T>);
#define TMA(T, COLS, PAIRING, B, EPILOGUE) \
  template __global__ void gemm_tma_pair_kernel<T, TmaTile<COLS>, Pairing::PAIRING, Major::B, EPILOGUE<T>>( \
      const __grid_constant__ PairedMaps, const GemmArgs<T>, const EPILOGUE<T>);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
TMA(bfloat16, 128, rows, depth, GluEpilogue)
TMA(bfloat16, 128, depth, rows, StoreEpilogue)
#ifndef PYFAST_MUTANT
TMA(bfloat16, 256, rows, depth, GluEpilogue)
TMA(bfloat16, 256, depth, rows, StoreEpilogue)
#endif
#else
FORWARD(bfloat16, LargeTile)
BACKWARD(bfloat16, LargeTile)
#endif
template __global__ void glu_backward_kernel<bfloat16>(GluBackwardArgs<bfloat16>);

}  // namespace pyfast
