#include "metal/attention.h"

#include "../checks.h"

namespace pyfast {

namespace {
constexpr int64_t kSplitKeys = 1024, kLeastSplitKeys = 256;
constexpr int64_t kReaders = 32;   // workers wanted: enough for the threads of a workstation
constexpr int64_t kFewQueries = 64, kFewPairQueries = 16, kFewOfGroup = 256;
}  // namespace

int64_t attention_splits(const AttentionArgs& a) {
  const int64_t groups = a.batch * a.kv_heads, least = (a.keys + kSplitKeys - 1) / kSplitKeys;
  const int64_t wanted = (kReaders + groups - 1) / groups, most = (a.keys + kLeastSplitKeys - 1) / kLeastSplitKeys;
  return std::max(least, std::min(wanted, most));
}

namespace {

// Whether keys are read as they lie: packing them would take longer. It does not where bfloat16 is multiplied in pairs,
// twice as quick as the float that keys are widened to here.
bool has_few_queries(const AttentionArgs& a) {
  const int64_t few = a.dtype == DType::bfloat16 && rounds_bfloat16() ? kFewPairQueries : kFewQueries;
  return a.queries <= few && a.queries * (a.heads / a.kv_heads) <= kFewOfGroup;
}

// The workspace of what reads them so: `width` elements for a query and a run of keys.
Tensor empty_partials(const AttentionArgs& a, int64_t width, const Tensor& like) {
  return empty({a.batch * a.heads * a.queries * attention_splits(a) * width}, accumulator_type(like));
}

constexpr const char* kOp = "attention";
constexpr int64_t kMostFeatures = 256;

// The tensor itself where its last dimension has stride 1, else a contiguous copy.
Tensor with_unit_stride(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

template <class Data>
Heads<Data> heads_of(const Tensor& t, Data* data) {
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}
Heads<const void> heads_of(const Tensor& t) { return heads_of<const void>(t, t.const_data_ptr()); }

// A result [B, H, T, D] stored as [B, T, H, D]: the projection that follows or precedes needs no copy of it.
Tensor empty_heads(int64_t batch, int64_t heads, int64_t time, int64_t size, ScalarType type) {
  return torch::stable::transpose(empty({batch, time, heads, size}, type), 1, 2);
}

// Checks what both directions share; the strides and pointers are filled in later.
AttentionArgs check_operands(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  for (const auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    expect_rank(kOp, name, *t, 4);
    expect_same_dtype(kOp, name, *t, q);
  }
  const DType dtype = dtype_of(kOp, "q", q);
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  expect_sizes(kOp, "k", k, {q.size(0), kv_heads, k.size(2), q.size(3)});
  expect_sizes(kOp, "v", v, {q.size(0), kv_heads, k.size(2), v.size(3)});
  PYFAST_EXPECT(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, kOp, ": q must have a multiple of the ", kv_heads,
                " heads of k; got ", heads);
  for (const int64_t size : {q.size(3), v.size(3)})
    PYFAST_EXPECT(1 <= size && size <= kMostFeatures, kOp, ": head size must be from 1 to ", kMostFeatures, "; got ",
                  size);
  AttentionArgs args{};
  args.dtype = dtype;
  args.batch = q.size(0), args.heads = heads, args.kv_heads = kv_heads;
  args.queries = q.size(2), args.keys = k.size(2), args.size = q.size(3), args.value_size = v.size(3);
  args.causal = causal, args.scale = scale;
  return args;
}

AttentionMask checked_mask(const std::optional<Tensor>& mask, const Tensor& q, const AttentionArgs& a) {
  if (!mask) return {MaskKind::none, nullptr, 0, 0, 0, 0};
  expect_rank(kOp, "mask", *mask, 4);
  const ScalarType type = mask->scalar_type();
  const bool single = type == ScalarType::Float && q.scalar_type() != ScalarType::Double;
  PYFAST_EXPECT(type == ScalarType::Bool || single || type == q.scalar_type(), kOp,
                ": mask must be bool, float32 (unless q is float64) or of the dtype of q; got ",
                torch::headeronly::toString(type));
  const int64_t full[] = {a.batch, a.heads, a.queries, a.keys};
  int64_t stride[4];
  for (int64_t d = 0; d < 4; ++d) {
    PYFAST_EXPECT(mask->size(d) == full[d] || mask->size(d) == 1, kOp, ": mask must broadcast to ",
                  text({full, full + 4}), "; got ", text(sizes_of(*mask)));
    stride[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
  }
  const MaskKind kind = type == ScalarType::Bool ? MaskKind::boolean : single ? MaskKind::float32 : MaskKind::same;
  return {kind, mask->const_data_ptr(), stride[0], stride[1], stride[2], stride[3]};
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                                         bool is_causal, double scale) {
  AttentionArgs args = check_operands(q, k, v, is_causal, scale);
  args.mask = checked_mask(mask, q, args);
  Tensor out = empty_heads(args.batch, args.heads, args.queries, args.value_size, q.scalar_type());
  Tensor lse = empty({args.batch, args.heads, args.queries}, accumulator_type(q));
  if (lse.numel() == 0) return {out, lse};
  if (args.keys == 0) {
    torch::stable::zero_(out);
    return {out, torch::stable::fill_(lse, std::numeric_limits<double>::infinity())};
  }
  const Tensor q_in = with_unit_stride(q), k_in = with_unit_stride(k), v_in = with_unit_stride(v);
  args.q = heads_of(q_in), args.k = heads_of(k_in), args.v = heads_of(v_in);
  args.out = heads_of(out, out.mutable_data_ptr());
  args.lse = lse.mutable_data_ptr();
  if (has_few_queries(args)) {
    Tensor partials = empty_partials(args, args.value_size + 2, q);
    args.partials = partials.mutable_data_ptr();
    dispatch_isa([&](auto isa) { attention_rows<decltype(isa)::value>(args); });
  } else {
    dispatch_matmul_isa(args.dtype, [&](auto isa) { attention<decltype(isa)::value>(args); });
  }
  return {out, lse};
}

// The gradients of all but the mask. `lse` and `out` are trusted as numbers only: no value of theirs is an index.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_out, const Tensor& q,
                                                                  const Tensor& k, const Tensor& v, const Tensor& out,
                                                                  const Tensor& lse, std::optional<Tensor> mask,
                                                                  bool is_causal, double scale, bool need_mask) {
  AttentionBackwardArgs args{check_operands(q, k, v, is_causal, scale)};
  AttentionArgs& a = args.forward;
  a.mask = checked_mask(mask, q, a);
  PYFAST_EXPECT(!need_mask || (mask && a.mask.kind != MaskKind::boolean), kOp,
                ": mask must be floating point to have a gradient");
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    expect_sizes(kOp, name, *t, {a.batch, a.heads, a.queries, a.value_size});
    expect_same_dtype(kOp, name, *t, q);
  }
  expect_sizes(kOp, "lse", lse, {a.batch, a.heads, a.queries});
  expect_scalar_type(kOp, "lse", lse, accumulator_type(q));
  Tensor dq = empty_heads(a.batch, a.heads, a.queries, a.size, q.scalar_type());
  Tensor dk = empty_heads(a.batch, a.kv_heads, a.keys, a.size, q.scalar_type());
  Tensor dv = empty_heads(a.batch, a.kv_heads, a.keys, a.value_size, q.scalar_type());
  Tensor dmask = need_mask ? empty(sizes_of(*mask), mask->scalar_type()) : none_like(q);
  if (lse.numel() == 0 || a.keys == 0) {
    for (Tensor* t : {&dq, &dk, &dv, &dmask}) torch::stable::zero_(*t);
    return {dq, dk, dv, dmask};
  }
  const Tensor q_in = with_unit_stride(q), k_in = with_unit_stride(k), v_in = with_unit_stride(v);
  const Tensor dout = with_unit_stride(grad_out), out_in = with_unit_stride(out), lse_in = as_contiguous(lse);
  a.q = heads_of(q_in), a.k = heads_of(k_in), a.v = heads_of(v_in);
  a.out = heads_of(out_in, const_cast<void*>(out_in.const_data_ptr()));   // read only, as the struct says
  a.lse = const_cast<void*>(lse_in.const_data_ptr());
  args.grad_out = heads_of(dout);
  args.grad_q = heads_of(dq, dq.mutable_data_ptr());
  args.grad_k = heads_of(dk, dk.mutable_data_ptr());
  args.grad_v = heads_of(dv, dv.mutable_data_ptr());
  if (has_few_queries(a)) {
    Tensor partials = empty_partials(a, a.size, q);
    a.partials = partials.mutable_data_ptr();
    dispatch_isa([&](auto isa) { attention_rows_backward<decltype(isa)::value>(args); });
  } else {
    dispatch_matmul_isa(a.dtype, [&](auto isa) { attention_backward<decltype(isa)::value>(args); });
  }
  if (need_mask) {
    args.grad_mask = dmask.mutable_data_ptr();
    args.mask_batch = mask->size(0), args.mask_heads = mask->size(1);
    args.mask_queries = mask->size(2), args.mask_keys = mask->size(3);
    dispatch_matmul_isa(a.dtype, [&](auto isa) { attention_grad_mask<decltype(isa)::value>(args); });
  }
  return {dq, dk, dv, dmask};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&pyfast::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&pyfast::attention_backward_cpu));
}
