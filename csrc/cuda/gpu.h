// What the CUDA rooms share: the GPU of an operation, guards for its tensors, allocation there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

namespace pyfast {

constexpr uintptr_t kGpuAlignment = 16;   // bytes; what the widest load wants

// The GPU that holds the first tensor, current for as long as this lives, and its stream.
class Gpu {
 public:
  Gpu(const char* op, const char* name, const Tensor& first)
      : op_(op),
        index_(index_of(op, name, first)),
        guard_(index_),
        stream_(torch::stable::accelerator::getCurrentStream(index_)) {}

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.nativeHandle()); }

  int processors() const {
    int count = 0;
    launched(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  int capability() const {   // major
    int major = 0;
    launched(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_));
    return major;
  }

  void expect_here(const char* name, const Tensor& t) const {
    expect_defined(op_, name, t);
    PYFAST_EXPECT(t.is_cuda() && t.get_device_index() == index_, op_, ": ", name, " must be on cuda:", index_);
  }

  // float32, bfloat16 or float16, what the kernels are made for.
  DType dtype_of(const char* name, const Tensor& t) const {
    const DType dtype = pyfast::dtype_of(op_, name, t);
    PYFAST_EXPECT(dtype != DType::float64, op_, ": ", name,
                  " must be float32, bfloat16 or float16 on the gpu; got float64");
    return dtype;
  }

  // `t` after its checks, contiguous and aligned: itself or a copy.
  Tensor operand(const char* name, const Tensor& t, const Sizes& sizes, ScalarType type) const {
    expect_here(name, t);
    expect_shape(op_, name, t, sizes);
    expect_scalar_type(op_, name, t, type);
    return packed(t);
  }

  std::optional<Tensor> operand(const char* name, const std::optional<Tensor>& t, const Sizes& sizes,
                                ScalarType type) const {
    if (!t) return t;
    return operand(name, *t, sizes, type);
  }

  Tensor packed(const Tensor& t) const {
    const Tensor whole = as_contiguous(t);
    const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % kGpuAlignment == 0;
    return aligned ? whole : torch::stable::clone(whole);
  }

  // Uninitialised and contiguous.
  Tensor empty(const Sizes& sizes, ScalarType type) const {
    Sizes strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                           dtype_code(type), aoti_torch_device_type_cuda(), index_,
                                                           &handle));
    return Tensor(handle);
  }

  // What a launcher says.
  void launched(cudaError_t error) const {
    PYFAST_EXPECT(error == cudaSuccess, op_, ": the GPU must take the launch; got ", cudaGetErrorString(error));
  }

 private:
  static int32_t index_of(const char* op, const char* name, const Tensor& t) {
    expect_defined(op, name, t);
    PYFAST_EXPECT(t.is_cuda(), op, ": ", name, " must be on a CUDA device");
    return t.get_device_index();
  }

  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

constexpr int64_t kMostColumns = int64_t(1) << 31;

inline void expect_columns(const char* op, const char* name, int64_t cols) {
  PYFAST_EXPECT(cols < kMostColumns, op, ": ", name, " must have fewer than 2**31 columns; got ", cols);
}

}  // namespace pyfast
