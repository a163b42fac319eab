"""The gradients of attention, in two kernels that each own what they write: no atomics.

With P = e^(s - lse) computed again: dV = P^T dO, dP = dO V^T, dS = P (dP - delta), delta = the row
sums of dO * O, dQ = scale dS K, dK = scale dS^T Q. Seven products of tiles where one kernel with
atomics would need five.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.attention_mask_gradient import launch_mask_gradient
from pyfast.kernels.attention_operands import mask_arguments
from pyfast.kernels.attention_scores import (
    backward_config,
    block_features,
    head_ptr,
    load_rows,
    mask_gradient_config,
    mask_scores,
    scaled,
    score_exp,
    store_rows,
)
from pyfast.kernels.matmul import capability


@triton.jit
def _attention_backward_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, dq_ptr, delta_ptr,
    heads, group, queries, keys, scale,                                  # sizes
    dout_batch_stride, dout_head_stride, dout_row_stride, dout_d_stride,  # strides
    q_batch_stride, q_head_stride, q_row_stride, q_d_stride,
    k_batch_stride, k_head_stride, k_row_stride, k_d_stride,
    v_batch_stride, v_head_stride, v_row_stride, v_d_stride,
    out_batch_stride, out_head_stride, out_row_stride, out_d_stride,
    mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of dQ of one head, and their delta for the kernel that follows."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest of a causal head first
    batch, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    dout_ptr = head_ptr(dout_ptr, batch, head, dout_batch_stride, dout_head_stride)
    q_ptr = head_ptr(q_ptr, batch, head, q_batch_stride, q_head_stride)
    k_ptr = head_ptr(k_ptr, batch, head // group, k_batch_stride, k_head_stride)
    v_ptr = head_ptr(v_ptr, batch, head // group, v_batch_stride, v_head_stride)
    out_ptr = head_ptr(out_ptr, batch, head, out_batch_stride, out_head_stride)
    mask_ptr = head_ptr(mask_ptr, batch, head, mask_batch_stride, mask_head_stride)
    row = (batch * heads + head).to(tl.int64) * queries
    query_offs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, query_offs, queries, q_row_stride, q_d_stride, D, BLOCK_D)
    dout = load_rows(dout_ptr, query_offs, queries, dout_row_stride, dout_d_stride, DV, BLOCK_DV)
    out = load_rows(out_ptr, query_offs, queries, out_row_stride, out_d_stride, DV, BLOCK_DV)
    inside = query_offs < queries
    lse = tl.load(lse_ptr + row + query_offs, mask=inside, other=float("inf"))
    if dout.dtype == tl.float32:
        # In the order of dP: in a row of one key they are equal to the bit, and dS is 0.
        products = tl.dot(dout, out.T, input_precision=PRECISION)
        rows = tl.arange(0, BLOCK_M)
        delta = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), axis=1)
    else:
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row + query_offs, delta, mask=inside)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(keys, (block + 1) * BLOCK_M) if CAUSAL else keys
    for start in range(0, end, BLOCK_N):  # keys that do not exist are zeros, and add nothing
        key_offs = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key_offs, keys, k_row_stride, k_d_stride, D, BLOCK_D)
        v = load_rows(v_ptr, key_offs, keys, v_row_stride, v_d_stride, DV, BLOCK_DV)
        s = scaled(tl.dot(q, k.T, input_precision=PRECISION), scale)
        s = mask_scores(
            s,
            mask_ptr, mask_query_stride, mask_key_stride,
            query_offs[:, None], key_offs[None, :],
            queries, keys,
            MASK, CAUSAL,
        )  # fmt: skip
        p = score_exp(tl.minimum(s - lse[:, None], 0.0))  # <= 1 also where lse lost the sum
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    dq_ptr += (batch.to(tl.int64) * queries * heads + head) * D  # stored as [B, T, H, D]
    store_rows(dq_ptr, acc * scale, query_offs, queries, heads * D, D, BLOCK_D)


@triton.jit
def _key_weights(
    k, q, lse, scale,
    mask_ptr, mask_query_stride, mask_key_stride,
    query_offs, key_offs, queries, keys,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of a tile, keys by queries."""
    s = scaled(tl.dot(k, q.T, input_precision=PRECISION), scale)
    s = mask_scores(
        s,
        mask_ptr, mask_query_stride, mask_key_stride,
        query_offs[None, :], key_offs[:, None],
        queries, keys,
        MASK, CAUSAL,
    )  # fmt: skip
    return score_exp(tl.minimum(s - lse[None, :], 0.0))


@triton.jit
def _key_gradients(p, v, dout, delta, PRECISION: tl.constexpr):
    """dS of a tile, keys by queries."""
    return p * (tl.dot(v, dout.T, input_precision=PRECISION) - delta[None, :])


@triton.jit
def _add_queries(
    dk, dv,  # running sums
    k, v, q, dout, lse, delta, scale,
    mask_ptr, mask_query_stride, mask_key_stride,
    query_offs, key_offs, queries, keys,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with what a block of queries adds to them.

    APART: P and dS come out of a branch, else Triton sees that one product feeds another, gives
    every warp whole rows of the first, and has groups of four warps multiply the same ones.
    """
    if APART:
        weights = tl.zeros((key_offs.shape[0], lse.shape[0]), dout.dtype)
        ds = tl.zeros((key_offs.shape[0], lse.shape[0]), q.dtype)
        if queries > 0:  # as always here
            p = _key_weights(
                k, q, lse, scale, mask_ptr, mask_query_stride, mask_key_stride,
                query_offs, key_offs, queries, keys, MASK, CAUSAL, PRECISION,
            )  # fmt: skip
            weights = p.to(dout.dtype)
            ds = _key_gradients(p, v, dout, delta, PRECISION).to(q.dtype)
        dv = tl.dot(weights, dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    else:
        p = _key_weights(
            k, q, lse, scale, mask_ptr, mask_query_stride, mask_key_stride,
            query_offs, key_offs, queries, keys, MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = _key_gradients(p, v, dout, delta, PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_backward_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, mask_ptr, dk_ptr, dv_ptr,
    heads, group, queries, keys, scale,                                  # sizes
    dout_batch_stride, dout_head_stride, dout_row_stride, dout_d_stride,  # strides
    q_batch_stride, q_head_stride, q_row_stride, q_d_stride,
    k_batch_stride, k_head_stride, k_row_stride, k_d_stride,
    v_batch_stride, v_head_stride, v_row_stride, v_d_stride,
    mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of dK and dV of one head of keys, over all heads of queries that share it."""
    blocks, kv_heads = tl.cdiv(keys, BLOCK_N), heads // group
    block = tl.program_id(0) % blocks
    batch, kv_head = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    k_ptr = head_ptr(k_ptr, batch, kv_head, k_batch_stride, k_head_stride)
    v_ptr = head_ptr(v_ptr, batch, kv_head, v_batch_stride, v_head_stride)
    key_offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, key_offs, keys, k_row_stride, k_d_stride, D, BLOCK_D)
    v = load_rows(v_ptr, key_offs, keys, v_row_stride, v_d_stride, DV, BLOCK_DV)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    first = block * BLOCK_N // BLOCK_M if CAUSAL else 0  # blocks of queries that see none are left
    steps = tl.maximum(tl.cdiv(queries, BLOCK_M) - first, 0)
    for step in range(0, steps * group):
        head = kv_head * group + step // steps
        query_offs = (first + step % steps) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = (batch * heads + head).to(tl.int64) * queries
        q = load_rows(
            head_ptr(q_ptr, batch, head, q_batch_stride, q_head_stride),
            query_offs, queries, q_row_stride, q_d_stride, D, BLOCK_D,
        )  # fmt: skip
        dout = load_rows(
            head_ptr(dout_ptr, batch, head, dout_batch_stride, dout_head_stride),
            query_offs, queries, dout_row_stride, dout_d_stride, DV, BLOCK_DV,
        )  # fmt: skip
        inside = query_offs < queries  # queries that do not exist have an infinite lse: p = 0
        lse = tl.load(lse_ptr + row + query_offs, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + row + query_offs, mask=inside, other=0.0)
        dk, dv = _add_queries(
            dk, dv, k, v, q, dout, lse, delta, scale,
            head_ptr(mask_ptr, batch, head, mask_batch_stride, mask_head_stride),
            mask_query_stride, mask_key_stride, query_offs, key_offs, queries, keys,
            MASK, CAUSAL, PRECISION, APART,
        )  # fmt: skip
    start = batch.to(tl.int64) * keys * kv_heads + kv_head  # stored as [B, T, H, D]
    row_stride = kv_heads * D
    store_rows(dk_ptr + start * D, dk * scale, key_offs, keys, row_stride, D, BLOCK_D)
    store_rows(dv_ptr + start * DV, dv, key_offs, keys, kv_heads * DV, DV, BLOCK_DV)


def launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills grads (dq, dk, dv, dmask); dmask of no elements is left. Workspace: delta, as lse."""
    dq, dk, dv, dmask = grads
    batch, heads, queries, size = q.shape
    kv_heads, keys, value_size = v.shape[1:]
    kind, mask_tensor, mask_strides = mask_arguments(mask, q)
    arch, features = capability(q), max(size, value_size)
    by_queries, by_keys = backward_config(arch, q.dtype, features)
    delta = torch.empty_like(lse)
    sizes = (heads, heads // kv_heads, queries, keys, scale)
    strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride())
    modes = {
        "D": size,
        "DV": value_size,
        "BLOCK_D": block_features(size),
        "BLOCK_DV": block_features(value_size),
        "MASK": kind,
        "CAUSAL": is_causal,
    }
    blocks = triton.cdiv(queries, by_queries.block_queries)
    _attention_backward_dq_kernel[(blocks * batch * heads,)](
        grad_out, q, k, v, out, lse, mask_tensor, dq, delta,
        *sizes, *strides, *out.stride(), *mask_strides, **modes, **by_queries.keywords(),
    )  # fmt: skip
    blocks = triton.cdiv(keys, by_keys.block_keys)
    _attention_backward_dkdv_kernel[(blocks * batch * kv_heads,)](
        grad_out, q, k, v, lse, delta, mask_tensor, dk, dv,
        *sizes, *strides, *mask_strides, **modes, **by_keys.keywords(), APART=by_keys.apart,
    )  # fmt: skip
    if dmask.numel():
        modes |= mask_gradient_config(arch, q.dtype, features).keywords()
        launch_mask_gradient(
            (grad_out, q, k, v, lse, delta, mask_tensor, dmask), sizes, strides, mask_strides, modes
        )
