// Compiles the kernels of adamw; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/adamw.cuh"
