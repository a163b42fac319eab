// Compiles the kernels of layer_norm; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/layer_norm.cuh"
