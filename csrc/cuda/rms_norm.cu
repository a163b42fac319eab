// Compiles the kernels of rms_norm; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/rms_norm.cuh"
