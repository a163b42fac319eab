// Compiles the kernels of cross_entropy; they know no torch, whose headers would take nvcc five times as long.
#include "../../kernels/cuda/cross_entropy.cuh"
