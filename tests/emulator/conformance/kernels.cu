// All kernels of the conformance tests, so that nvcc runs once.
#include "arithmetic.cuh"
#include "async_defects.cuh"
#include "defects.cuh"
#include "exchange.cuh"
#include "tensor.cuh"
