// What is packed: a matrix with any strides.
#pragma once

#include "gemm_core.h"

namespace pyfast {
namespace {

// A matrix seen as lanes x depth; element (lane, k) at data[lane * lane_stride + k * depth_stride].
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, depth_stride;
  int64_t lanes, depth;

  Operand from(int64_t lane, int64_t k) const {
    return {data + lane * lane_stride + k * depth_stride, lane_stride, depth_stride, lanes - lane, depth - k};
  }
};

}  // namespace
}  // namespace pyfast
