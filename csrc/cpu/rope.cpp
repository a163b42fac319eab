#include "metal/rope.h"

#include "../checks.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "rope";

// The tensor itself where its last dimension has stride 1, else a contiguous copy.
Tensor with_unit_stride(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// A gradient flows through the same rotation by the opposite angles (inverse).
Tensor rope_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  expect_rank(kOp, "x", x, 4);
  const DType dtype = dtype_of(kOp, "x", x);
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), size = x.size(3);
  PYFAST_EXPECT(size % 2 == 0, kOp, ": x must end in an even head size; got ", text(sizes_of(x)));
  const auto checked = [&](const char* name, const Tensor& t) {
    expect_sizes(kOp, name, t, {length, size / 2});
    expect_scalar_type(kOp, name, t, ScalarType::Float);
    return with_unit_stride(t);
  };
  const Tensor c = checked("cos", cos), s = checked("sin", sin), in = with_unit_stride(x);
  Tensor out = empty({batch, length, heads, size}, x.scalar_type());
  const RopeArgs args{dtype, interleaved, inverse, batch, heads, length, size, in.stride(0), in.stride(1), in.stride(2),
                      c.stride(0), s.stride(0), in.const_data_ptr(), static_cast<const float*>(c.const_data_ptr()),
                      static_cast<const float*>(s.const_data_ptr()), out.mutable_data_ptr()};
  if (batch * heads * length * size > 0) dispatch_isa(dtype, [&](auto isa) { rope<decltype(isa)::value>(args); });
  return torch::stable::transpose(out, 1, 2);   // [B, H, T, D]
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("rope", TORCH_BOX(&pyfast::rope_cpu)); }
