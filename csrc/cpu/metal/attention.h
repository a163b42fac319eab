#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// [B, H, T, D] in any layout whose last stride is 1; strides in elements.
template <class Data>
struct Heads {
  Data* data;
  int64_t batch, head, time;
};

enum class MaskKind { none, boolean, float32, same };   // same: of the dtype of the operands

// [B, H, Tq, Tk] with any strides, 0 where it is broadcast.
struct AttentionMask {
  MaskKind kind;
  const void* data;
  int64_t batch, head, query, key;
};

struct AttentionArgs {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, size, value_size;   // B, H, Hkv, Tq, Tk, D, Dv
  bool causal;
  double scale;
  Heads<const void> q, k, v;
  AttentionMask mask;
  Heads<void> out;
  void* lse;        // [B, H, Tq], of the accumulator type
  void* partials;   // attention_rows: its workspace, of the accumulator type
};

struct AttentionBackwardArgs {
  AttentionArgs forward;   // out is only read here
  Heads<const void> grad_out;
  Heads<void> grad_q, grad_k, grad_v;
  void* grad_mask;         // contiguous [Bm, Hm, Qm, Km], each 1 or the full size; of the dtype of the mask
  int64_t mask_batch, mask_heads, mask_queries, mask_keys;
};

// softmax(q k^T scale + mask) v in blocks, and the log-sum-exp of every row (+inf for a row that sees no key).
template <Isa kIsa> void attention(const AttentionArgs&);

// The same for a few queries, without packing: decoding. Keys are split so that all threads read; the number of
// splits and the elements of the workspace depend on the sizes alone.
int64_t attention_splits(const AttentionArgs&);
template <Isa kIsa> void attention_rows(const AttentionArgs&);            // partials[B, H, Tq, splits, Dv + 2]
template <Isa kIsa> void attention_rows_backward(const AttentionBackwardArgs&);   // partials[B, H, Tq, splits, D]

template <Isa kIsa> void attention_backward(const AttentionBackwardArgs&);
template <Isa kIsa> void attention_grad_mask(const AttentionBackwardArgs&);

}  // namespace pyfast
