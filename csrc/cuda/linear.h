// What the CUDA rooms of linear layers share: the sizes their kernels can count.
#pragma once

#include "../cpu/linear_operands.h"
#include "gpu.h"

namespace pyfast {

constexpr int64_t kMostSize = kMostColumns - 1024;   // tiles that hang over the end are counted in 32 bits, too

// The rows of a matrix whose sizes are all up to `most`.
inline int64_t rows_of(const char* op, const char* name, const Tensor& t, int64_t most = kMostSize) {
  PYFAST_EXPECT(t.dim() == 2, op, ": ", name, " must have 2 dimensions; got ", text(sizes_of(t)));
  for (int64_t d = 0; d < 2; ++d)
    PYFAST_EXPECT(t.size(d) <= most, op, ": ", name, " must have sizes up to ", most, "; got ", text(sizes_of(t)));
  return t.size(0);
}

// A matrix on the GPU of the others, of the dtype of `like` and of these sizes.
inline void expect_matrix(const Gpu& gpu, const char* op, const char* name, const Tensor& t, const Sizes& sizes,
                          const Tensor& like) {
  gpu.expect_here(name, t);
  expect_shape(op, name, t, sizes);
  expect_same_dtype(op, name, t, like);
}

}  // namespace pyfast
