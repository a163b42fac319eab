#include "../../kernels/cuda/rope.h"

#include "gpu.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "rope";
constexpr int64_t kMostUnits = int64_t(1) << 31;

// The tensor itself where its last dimension has stride 1, else a contiguous copy.
Tensor with_unit_stride(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// A gradient flows through the same rotation by the opposite angles (inverse).
Tensor rope_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const Gpu gpu(kOp, "x", x);
  PYFAST_EXPECT(x.dim() == 4, kOp, ": x must have 4 dimensions; got ", text(sizes_of(x)));
  const DType dtype = gpu.dtype_of("x", x);
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), size = x.size(3);
  PYFAST_EXPECT(size % 2 == 0, kOp, ": x must end in an even head size; got ", text(sizes_of(x)));
  PYFAST_EXPECT(length < kMostUnits && (size == 0 || heads < kMostUnits / size), kOp,
                ": x must have fewer than 2**31 positions, and elements of one; got ", text(sizes_of(x)));
  const auto table = [&](const char* name, const Tensor& t) {
    gpu.expect_here(name, t);
    expect_shape(kOp, name, t, {length, size / 2});
    expect_scalar_type(kOp, name, t, ScalarType::Float);
    return with_unit_stride(t);
  };
  const Tensor c = table("cos", cos), s = table("sin", sin), in = with_unit_stride(x);
  const Tensor out = gpu.empty({batch, length, heads, size}, x.scalar_type());
  if (batch * heads * length * size > 0) {
    const RopeCudaArgs args{dtype, interleaved, inverse, batch, heads, length, size, in.stride(0), in.stride(1),
                            in.stride(2), c.stride(0), s.stride(0), in.const_data_ptr(),
                            static_cast<const float*>(c.const_data_ptr()),
                            static_cast<const float*>(s.const_data_ptr()), out.mutable_data_ptr(), gpu.processors()};
    gpu.launched(launch_rope(args, gpu.stream()));
  }
  return torch::stable::transpose(out, 1, 2);   // [B, H, T, D]
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("rope", TORCH_BOX(&pyfast::rope_cuda)); }
