// What moves the rows that count, for the emulator.
#include "../../kernels/cuda/counted_rows.cuh"

namespace pyfast {

template __global__ void gather_rows_kernel<bfloat16>(bfloat16*, int, const bfloat16*, int64_t, int64_t, int,
                                                      CountedRows, bool);
template __global__ void clear_rows_kernel<void>(uint4*, int64_t, int64_t, CountedRows);

}  // namespace pyfast
