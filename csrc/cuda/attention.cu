// Compiles the forward kernels of attention; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/attention.cuh"
