// Compiles the kernels of linear_cross_entropy.
#include "../../kernels/cuda/linear_cross_entropy.cuh"
