// Defects that tests put into the kernels on purpose, by -DPYFAST_MUTANT=n: each must be caught.
#pragma once

namespace pyfast {

#ifdef PYFAST_MUTANT
constexpr int kMutant = PYFAST_MUTANT;
#else
constexpr int kMutant = 0;
#endif

__host__ __device__ constexpr bool mutant(int n) { return kMutant == n; }

}  // namespace pyfast
