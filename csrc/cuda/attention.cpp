#include <limits>

#include "../../kernels/cuda/attention_decode.h"
#include "gpu.h"

namespace pyfast {
namespace {

constexpr const char* kOp = "attention";
constexpr int64_t kMostFeatures = 256;
constexpr int64_t kMostSize = kMostColumns - 1024;   // tiles that hang over the end are counted in 32 bits, too

// The tensor itself where its last dimension has stride 1, else a contiguous copy.
Tensor with_unit_stride(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// A result [B, H, T, D] stored as [B, T, H, D]: the projection that follows or precedes needs no copy of it.
Tensor empty_heads(const Gpu& gpu, int64_t batch, int64_t heads, int64_t time, int64_t size, ScalarType type) {
  return torch::stable::transpose(gpu.empty({batch, time, heads, size}, type), 1, 2);
}

AttentionHeads heads_of(const Tensor& t, DType dtype) {
  return attention_heads(t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype);
}

void expect_heads(const Gpu& gpu, const char* name, const Tensor& t, const Tensor& like) {
  gpu.expect_here(name, t);
  PYFAST_EXPECT(t.dim() == 4, kOp, ": ", name, " must have 4 dimensions; got ", text(sizes_of(t)));
  expect_same_dtype(kOp, name, t, like);
  for (int64_t d = 0; d < 4; ++d)
    PYFAST_EXPECT(t.size(d) <= kMostSize, kOp, ": ", name, " must have sizes up to ", kMostSize, "; got ",
                  text(sizes_of(t)));
}

ScoreMask score_mask(const Gpu& gpu, const std::optional<Tensor>& mask, const Tensor& q, const AttentionCudaArgs& a) {
  if (!mask) return {ScoreMaskKind::none, nullptr, 0, 0, 0, 0};
  gpu.expect_here("mask", *mask);
  PYFAST_EXPECT(mask->dim() == 4, kOp, ": mask must have 4 dimensions; got ", text(sizes_of(*mask)));
  const ScalarType type = mask->scalar_type();
  PYFAST_EXPECT(type == ScalarType::Bool || type == ScalarType::Float || type == q.scalar_type(), kOp,
                ": mask must be bool, float32 or of the dtype of q; got ", torch::headeronly::toString(type));
  const int64_t full[] = {a.batch, a.heads, a.queries, a.keys};
  int64_t stride[4];
  for (int64_t d = 0; d < 4; ++d) {
    PYFAST_EXPECT(mask->size(d) == full[d] || mask->size(d) == 1, kOp, ": mask must broadcast to ",
                  text({full, full + 4}), "; got ", text(sizes_of(*mask)));
    stride[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
  }
  const ScoreMaskKind kind = type == ScalarType::Bool    ? ScoreMaskKind::boolean
                             : type == ScalarType::Float ? ScoreMaskKind::float32
                                                         : ScoreMaskKind::same;
  return {kind, mask->const_data_ptr(), stride[0], stride[1], stride[2], stride[3]};
}

// The operands of both directions, checked and brought to strides that the kernels read.
struct Operands {
  Gpu gpu;
  Tensor q, k, v;
  AttentionCudaArgs args;

  Operands(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, bool causal,
           double scale)
      : gpu(kOp, "q", query), args{} {
    for (const auto& [name, t] : {std::pair{"q", &query}, {"k", &key}, {"v", &value}})
      expect_heads(gpu, name, *t, query);
    args.dtype = gpu.dtype_of("q", query), args.capability = gpu.capability();
    const int64_t heads = query.size(1), kv_heads = key.size(1);
    expect_shape(kOp, "k", key, {query.size(0), kv_heads, key.size(2), query.size(3)});
    expect_shape(kOp, "v", value, {query.size(0), kv_heads, key.size(2), value.size(3)});
    PYFAST_EXPECT(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, kOp, ": q must have a multiple of the ",
                  kv_heads, " heads of k; got ", heads);
    for (const int64_t size : {query.size(3), value.size(3)})
      PYFAST_EXPECT(1 <= size && size <= kMostFeatures, kOp, ": head size must be from 1 to ", kMostFeatures,
                    "; got ", size);
    q = with_unit_stride(query), k = with_unit_stride(key), v = with_unit_stride(value);
    args.batch = int(q.size(0)), args.heads = int(heads), args.kv_heads = int(kv_heads);
    args.queries = int(q.size(2)), args.keys = int(k.size(2));
    args.size = int(q.size(3)), args.value_size = int(v.size(3));
    args.causal = causal, args.scale = float(scale);
    args.q = heads_of(q, args.dtype), args.k = heads_of(k, args.dtype), args.v = heads_of(v, args.dtype);
    args.mask = score_mask(gpu, mask, query, args);
  }

  bool nothing() const { return args.batch == 0 || args.heads == 0 || args.queries == 0; }
};

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                                          bool is_causal, double scale) {
  Operands o(q, k, v, mask, is_causal, scale);
  AttentionCudaArgs& a = o.args;
  Tensor out = empty_heads(o.gpu, a.batch, a.heads, a.queries, a.value_size, q.scalar_type());
  Tensor lse = o.gpu.empty({a.batch, a.heads, a.queries}, ScalarType::Float);
  if (o.nothing()) return {out, lse};
  if (a.keys == 0) {
    torch::stable::zero_(out);
    return {out, torch::stable::fill_(lse, std::numeric_limits<double>::infinity())};
  }
  a.out = heads_of(out, a.dtype);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const KeyParts parts = attention_key_parts(a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.causal);
  if (parts.count == 0) {
    o.gpu.launched(launch_attention(a, o.gpu.stream()));
    return {out, lse};
  }
  const int stride = (a.value_size + 3) / 4 * 4;
  Tensor found = o.gpu.empty({parts.count, a.batch, a.heads, a.queries, stride}, ScalarType::Float);
  Tensor sums = o.gpu.empty({parts.count, a.batch, a.heads, a.queries, 2}, ScalarType::Float);
  const AttentionDecodeArgs decode{a, parts.count, parts.keys, stride, static_cast<float*>(found.mutable_data_ptr()),
                                   static_cast<float*>(sums.mutable_data_ptr())};
  o.gpu.launched(launch_attention_decode(decode, o.gpu.stream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& grad_out, const Tensor& q,
                                                                   const Tensor& k, const Tensor& v, const Tensor& out,
                                                                   const Tensor& lse, std::optional<Tensor> mask,
                                                                   bool is_causal, double scale, bool need_mask) {
  Operands o(q, k, v, mask, is_causal, scale);
  AttentionBackwardCudaArgs args{o.args};
  AttentionCudaArgs& a = args.forward;
  PYFAST_EXPECT(!need_mask || (mask && a.mask.kind != ScoreMaskKind::boolean), kOp,
                ": mask must be floating point to have a gradient");
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    expect_heads(o.gpu, name, *t, q);
    expect_shape(kOp, name, *t, {a.batch, a.heads, a.queries, a.value_size});
  }
  const Tensor lse_in = o.gpu.operand("lse", lse, {a.batch, a.heads, a.queries}, ScalarType::Float);
  Tensor dq = empty_heads(o.gpu, a.batch, a.heads, a.queries, a.size, q.scalar_type());
  Tensor dk = empty_heads(o.gpu, a.batch, a.kv_heads, a.keys, a.size, q.scalar_type());
  Tensor dv = empty_heads(o.gpu, a.batch, a.kv_heads, a.keys, a.value_size, q.scalar_type());
  Tensor dmask = o.gpu.empty(need_mask ? sizes_of(*mask) : Sizes{0}, need_mask ? mask->scalar_type() : q.scalar_type());
  if (o.nothing() || a.keys == 0) {
    for (Tensor* t : {&dq, &dk, &dv, &dmask}) torch::stable::zero_(*t);
    return {dq, dk, dv, dmask};
  }
  const Tensor dout = with_unit_stride(grad_out), out_in = with_unit_stride(out);
  const Tensor delta = o.gpu.empty({a.batch, a.heads, a.queries}, ScalarType::Float);
  a.out = heads_of(out_in, a.dtype);
  a.lse = static_cast<float*>(const_cast<void*>(lse_in.const_data_ptr()));   // read only, as the struct says
  args.grad_out = heads_of(dout, a.dtype);
  args.grad_q = heads_of(dq, a.dtype), args.grad_k = heads_of(dk, a.dtype), args.grad_v = heads_of(dv, a.dtype);
  args.delta = static_cast<float*>(delta.mutable_data_ptr());
  if (need_mask) {
    args.grad_mask = dmask.mutable_data_ptr();
    args.mask_batch = int(mask->size(0)), args.mask_heads = int(mask->size(1));
    args.mask_queries = int(mask->size(2)), args.mask_keys = int(mask->size(3));
  }
  o.gpu.launched(launch_attention_backward(args, o.gpu.stream()));
  return {dq, dk, dv, dmask};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("attention", TORCH_BOX(&pyfast::attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&pyfast::attention_backward_cuda));
}
