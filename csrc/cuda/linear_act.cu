// Compiles the kernels of linear_act; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/linear_act.cuh"
