"""The gradient of an additive mask: dS summed over what the mask broadcasts over, in one order."""

import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.attention_scores import head_ptr, load_rows, mask_scores, scaled, score_exp


@triton.jit
def _store_tile(
    dmask_ptr, total, plane, query_block, key_block, queries, keys,
    ONE_QUERY: tl.constexpr, ONE_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dmask = total, or its sum where one row or column stands for all."""
    row_offs = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    col_offs = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = 1 if ONE_QUERY else queries, 1 if ONE_KEY else keys
    if ONE_QUERY:
        total = tl.where(row_offs[:, None] == 0, tl.sum(total, axis=0)[None, :], 0.0)
    if ONE_KEY:
        total = tl.where(col_offs[None, :] == 0, tl.sum(total, axis=1)[:, None], 0.0)
    at = (plane.to(tl.int64) * rows + row_offs[:, None]) * cols + col_offs[None, :]
    inside = (row_offs[:, None] < rows) & (col_offs[None, :] < cols)
    tl.store(dmask_ptr + at, total.to(dmask_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attention_backward_mask_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, mask_ptr, dmask_ptr,
    heads, group, queries, keys, scale,                                  # sizes
    mask_heads, batches_each, heads_each,
    dout_batch_stride, dout_head_stride, dout_row_stride, dout_d_stride,  # strides
    q_batch_stride, q_head_stride, q_row_stride, q_d_stride,
    k_batch_stride, k_head_stride, k_row_stride, k_d_stride,
    v_batch_stride, v_head_stride, v_row_stride, v_d_stride,
    mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_QUERY: tl.constexpr, ONE_KEY: tl.constexpr,
):  # fmt: skip
    """A tile of dmask, over the batches, heads, queries and keys that share it.

    ONE_QUERY: the mask has one row for all queries; ONE_KEY: one column for all keys.
    """
    query_blocks = 1 if ONE_QUERY else tl.cdiv(queries, BLOCK_M)
    key_blocks = 1 if ONE_KEY else tl.cdiv(keys, BLOCK_N)
    tile = tl.program_id(0) % (query_blocks * key_blocks)
    plane = tl.program_id(0) // (query_blocks * key_blocks)
    first_batch, first_head = plane // mask_heads, plane % mask_heads
    query_block, key_block = tile // key_blocks, tile % key_blocks
    query_steps = tl.cdiv(queries, BLOCK_M) if ONE_QUERY else 1
    key_steps = tl.cdiv(keys, BLOCK_N) if ONE_KEY else 1
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, batches_each * heads_each * query_steps * key_steps):
        at, key_step = step // key_steps, step % key_steps
        at, query_step = at // query_steps, at % query_steps
        batch, head = first_batch + at // heads_each, first_head + at % heads_each
        query_offs = (query_block + query_step) * BLOCK_M + tl.arange(0, BLOCK_M)
        key_offs = (key_block + key_step) * BLOCK_N + tl.arange(0, BLOCK_N)
        q_head = head_ptr(q_ptr, batch, head, q_batch_stride, q_head_stride)
        k_head = head_ptr(k_ptr, batch, head // group, k_batch_stride, k_head_stride)
        v_head = head_ptr(v_ptr, batch, head // group, v_batch_stride, v_head_stride)
        dout_head = head_ptr(dout_ptr, batch, head, dout_batch_stride, dout_head_stride)
        q = load_rows(q_head, query_offs, queries, q_row_stride, q_d_stride, D, BLOCK_D)
        k = load_rows(k_head, key_offs, keys, k_row_stride, k_d_stride, D, BLOCK_D)
        v = load_rows(v_head, key_offs, keys, v_row_stride, v_d_stride, DV, BLOCK_DV)
        dout = load_rows(
            dout_head, query_offs, queries, dout_row_stride, dout_d_stride, DV, BLOCK_DV
        )
        row = (batch * heads + head).to(tl.int64) * queries
        inside = query_offs < queries  # an infinite lse: p = 0
        lse = tl.load(lse_ptr + row + query_offs, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + row + query_offs, mask=inside, other=0.0)
        s = scaled(tl.dot(q, k.T, input_precision=PRECISION), scale)
        s = mask_scores(
            s,
            head_ptr(mask_ptr, batch, head, mask_batch_stride, mask_head_stride),
            mask_query_stride, mask_key_stride,
            query_offs[:, None], key_offs[None, :],
            queries, keys,
            MASK, CAUSAL,
        )  # fmt: skip
        p = score_exp(tl.minimum(s - lse[:, None], 0.0))
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        total += tl.where(key_offs[None, :] < keys, p * (dp - delta[:, None]), 0.0)
    _store_tile(
        dmask_ptr, total, plane, query_block, key_block, queries, keys,
        ONE_QUERY, ONE_KEY, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def launch_mask_gradient(
    tensors: tuple[Tensor, ...],
    sizes: tuple[int | float, ...],
    strides: tuple[int, ...],
    mask_strides: list[int],
    modes: dict[str, int | str],
) -> None:
    """Fills the last of `tensors`, contiguous [B|1, H|1, Tq|1, Tk|1]; sizes of whole attention."""
    q, dmask = tensors[1], tensors[-1]
    batches, heads, queries, keys = dmask.shape
    one_query, one_key = queries == 1, keys == 1
    tiles = 1 if one_query else triton.cdiv(queries, modes["BLOCK_M"])
    tiles *= 1 if one_key else triton.cdiv(keys, modes["BLOCK_N"])
    _attention_backward_mask_kernel[(tiles * batches * heads,)](
        *tensors, *sizes,
        heads, q.shape[0] // batches, q.shape[1] // heads,
        *strides, *mask_strides,
        ONE_QUERY=one_query, ONE_KEY=one_key, **modes,
    )  # fmt: skip
