// Compiles the product of weight gradients for all linear layers.
#include "../../kernels/cuda/weight_gradient.cuh"
