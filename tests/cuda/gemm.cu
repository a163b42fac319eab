// The GEMM for the emulator: each layout, tile and dtype at least once, as the linear layers use them.
#include "../../kernels/cuda/act_backward.cuh"
#include "../../kernels/cuda/gemm.cuh"

namespace pyfast {

template <class T>
using Forward = LinearEpilogue<T>;
template <class T>
using Store = StoreEpilogue<T>;

#define GEMM(T, TILE, A, B, SUMS, EPILOGUE) \
  template __global__ void gemm_kernel<T, TILE, Major::A, Major::B, SUMS, EPILOGUE<T>>(GemmArgs<T>, EPILOGUE<T>);
#define TMA(T, COLS, A, B, SUMS, EPILOGUE) \
  template __global__ void gemm_tma_kernel<T, TmaTile<COLS>, Major::A, Major::B, SUMS, EPILOGUE<T>>( \
      const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap, const GemmArgs<T>, const EPILOGUE<T>);

GEMM(bfloat16, LargeTile, rows, rows, true, Store)
template __global__ void act_backward_kernel<bfloat16>(ActBackwardArgs<bfloat16>);
template __global__ void column_sums_kernel<bfloat16>(bfloat16*, const float*, int64_t, int64_t, int, bool);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
GEMM(bfloat16, HopperTile, rows, rows, true, Store)
TMA(bfloat16, 128, rows, rows, true, Store)
#ifndef PYFAST_MUTANT
TMA(bfloat16, 256, rows, rows, true, Store)
TMA(bfloat16, 128, depth, depth, false, Forward)
TMA(bfloat16, 256, depth, depth, false, Forward)
TMA(bfloat16, 256, depth, rows, false, Store)
TMA(float16, 128, depth, rows, false, Forward)
TMA(float16, 256, depth, rows, false, Forward)
GEMM(bfloat16, HopperTile, depth, depth, false, Forward)
GEMM(float16, HopperTile, depth, rows, false, Forward)
#endif
#endif

#ifndef PYFAST_MUTANT   // the others are enough to see a defect
GEMM(bfloat16, LargeTile, depth, depth, false, Forward)
GEMM(bfloat16, LargeTile, depth, rows, false, Store)
GEMM(bfloat16, SmallTile, depth, depth, false, Forward)
GEMM(float16, SmallTile, depth, rows, false, Forward)
GEMM(float, FloatTile, depth, depth, false, Forward)
GEMM(float, FloatTile, rows, rows, true, Store)
template __global__ void act_backward_kernel<float>(ActBackwardArgs<float>);
#endif

}  // namespace pyfast
