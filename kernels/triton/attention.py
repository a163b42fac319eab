"""attention in Triton: blocks of keys stream past blocks of queries (Dao, 2023)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.attention_backward import launch_backward
from pyfast.kernels.attention_operands import check_operands, empty_heads, mask_arguments
from pyfast.kernels.attention_scores import (
    block_features,
    forward_config,
    head_ptr,
    load_rows,
    mask_scores,
    scaled,
    score_exp,
    store_rows,
)
from pyfast.kernels.matmul import capability

_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attend(
    acc, total, peak, q,  # running output, sum and maximum; queries
    k_ptr, v_ptr, mask_ptr,
    query_offs, begin, end, queries, keys, scale,
    k_row_stride, k_d_stride, v_row_stride, v_d_stride, mask_query_stride, mask_key_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, total, peak) after keys begin to end; WHOLE: every query sees every one of them.

    SPREAD: `total` has a sum for every column of the tile, which are added up at the very end.
    """
    for start in range(begin, end, BLOCK_N):
        key_offs = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key_offs, keys, k_row_stride, k_d_stride, D, BLOCK_D)
        s = scaled(tl.dot(q, k.T, input_precision=PRECISION), scale)
        if not WHOLE:
            s = mask_scores(
                s,
                mask_ptr, mask_query_stride, mask_key_stride,
                query_offs[:, None], key_offs[None, :],
                queries, keys,
                MASK, CAUSAL,
            )  # fmt: skip
            s = tl.where(key_offs[None, :] < keys, s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, axis=1))
        origin = top
        if MASK != "none":
            origin = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet: p is e^-inf = 0
        p = score_exp(s - origin[:, None])
        correction = score_exp(peak - origin)
        if SPREAD:
            total = total * correction[:, None] + p
        else:
            total = total * correction + tl.sum(p, axis=1)
        v = load_rows(v_ptr, key_offs, keys, v_row_stride, v_d_stride, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
        peak = top
    return acc, total, peak


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,                     # pointers
    heads, group, queries, keys, scale,                                  # sizes
    q_batch_stride, q_head_stride, q_row_stride, q_d_stride,             # strides
    k_batch_stride, k_head_stride, k_row_stride, k_d_stride,
    v_batch_stride, v_head_stride, v_row_stride, v_d_stride,
    mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head: out = softmax(q k^T scale + mask) v, lse = log of the sums.

    A program of a causal head skips the keys after its last query; the longest come first.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    q_ptr = head_ptr(q_ptr, batch, head, q_batch_stride, q_head_stride)
    k_ptr = head_ptr(k_ptr, batch, head // group, k_batch_stride, k_head_stride)
    v_ptr = head_ptr(v_ptr, batch, head // group, v_batch_stride, v_head_stride)
    mask_ptr = head_ptr(mask_ptr, batch, head, mask_batch_stride, mask_head_stride)
    query_offs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, query_offs, queries, q_row_stride, q_d_stride, D, BLOCK_D)
    end, whole = keys, keys
    if CAUSAL:
        end, whole = tl.minimum(keys, (block + 1) * BLOCK_M), tl.minimum(keys, block * BLOCK_M)
    whole = whole // BLOCK_N * BLOCK_N if MASK == "none" else 0
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N) if SPREAD else (BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for part in tl.static_range(2 if MASK == "none" else 1):
        acc, total, peak = _attend(
            acc, total, peak, q,
            k_ptr, v_ptr, mask_ptr,
            query_offs, 0 if MASK != "none" or part == 0 else whole,
            whole if MASK == "none" and part == 0 else end, queries, keys, scale,
            k_row_stride, k_d_stride, v_row_stride, v_d_stride, mask_query_stride, mask_key_stride,
            BLOCK_N, BLOCK_D, BLOCK_DV, D, DV,
            MASK, CAUSAL, MASK == "none" and part == 0, SPREAD, PRECISION,
        )  # fmt: skip
    if SPREAD:
        total = tl.sum(total, axis=1)
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, peak + tl.log2(total) * _LN2, float("inf"))
    row = (batch * heads + head).to(tl.int64) * queries
    tl.store(lse_ptr + row + query_offs, lse, mask=query_offs < queries)
    out_ptr += (batch.to(tl.int64) * queries * heads + head) * DV  # stored as [B, T, H, D]
    store_rows(out_ptr, out, query_offs, queries, heads * DV, DV, BLOCK_DV)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Tq, Dv], lse [B, H, Tq] float32); a query that sees no key gets 0 and +inf.

    q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], mask broadcastable; any strides.
    """
    check_operands(q, k, v, mask)
    batch, heads, queries, size = q.shape
    keys, value_size = v.shape[2:]
    out = empty_heads(batch, heads, queries, value_size, q)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    if keys == 0:
        return out.zero_(), lse.fill_(float("inf"))
    kind, mask_tensor, mask_strides = mask_arguments(mask, q)
    features, masked = max(size, value_size), mask is not None
    config = forward_config(capability(q), q.dtype, queries, features, masked)
    grid = (triton.cdiv(queries, config.block_queries) * batch * heads,)
    _attention_forward_kernel[grid](
        q, k, v, mask_tensor, out, lse,
        heads, heads // k.shape[1], queries, keys, scale,
        *q.stride(), *k.stride(), *v.stride(), *mask_strides,
        D=size, DV=value_size, BLOCK_D=block_features(size), BLOCK_DV=block_features(value_size),
        MASK=kind, CAUSAL=is_causal, SPREAD=config.spread, **config.keywords(),
    )  # fmt: skip
    return out, lse


def attention_backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v, grad_mask), grad_mask empty unless needed; any strides."""
    check_operands(q, k, v, mask)
    batch, heads, queries, size = q.shape
    kv_heads, keys, value_size = v.shape[1:]
    rule = "be floating point to have a gradient"
    fits = not need_mask or (mask is not None and mask.dtype != torch.bool)
    guards.expect(fits, "attention", "mask", rule, None if mask is None else mask.dtype)
    for name, t in (("grad_out", grad_out), ("out", out)):
        guards.expect_like("attention", name, t, q, (batch, heads, queries, value_size))
    lse = guards.operand("attention", "lse", lse, q, (batch, heads, queries), torch.float32)
    dq = empty_heads(batch, heads, queries, size, q)
    dk = empty_heads(batch, kv_heads, keys, size, q)
    dv = empty_heads(batch, kv_heads, keys, value_size, q)
    dmask = mask.new_empty(mask.shape) if need_mask else q.new_empty(0)
    if lse.numel() == 0 or keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask.zero_()
    launch_backward(grad_out, q, k, v, out, lse, mask, is_causal, scale, (dq, dk, dv, dmask))
    return dq, dk, dv, dmask
