// Compiles the kernels of linear_glu.
#include "../../kernels/cuda/linear_glu.cuh"
