// Compiles the kernels of rope; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/rope.cuh"
