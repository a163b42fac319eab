"""Scaled dot-product attention in blocks, without the matrix of scores (Dao, 2023)."""

from typing import Any

import torch
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import (
    expect,
    expect_device,
    expect_float,
    expect_like,
    expect_type,
    to_autocast,
)
from pyfast.ops.register import below_autograd, differentiable, register_fake

MOST_FEATURES = 256  # of a head


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query @ key.T * scale + attn_mask) @ value, as `F.scaled_dot_product_attention`.

    Workspace on the CPU, kept from call to call: about 1 MB for each thread; in the backward 4 MB,
    more (at most 12 MB) with heads above 64 or many keys.

    Args:
        query: [..., H, Tq, D], float32, bfloat16, float16 or float64, D at most 256. Any strides: a
            view of a fused projection or of a cache is read in place, if its last stride is 1.
        key: [..., Hkv, Tk, D]; value: [..., Hkv, Tk, Dv]. Leading dimensions broadcast.
        attn_mask: broadcastable to [..., H, Tq, Tk], never expanded; boolean (True takes part), or
            added to the scores (float32 or the dtype of `query`; it may require a gradient).
        dropout_p: must be 0.
        is_causal: query i sees keys 0 to i, also where Tq and Tk differ; not with a mask.
        scale: of the scores, by default 1 / sqrt(D).
        enable_gqa: let H / Hkv neighbouring heads of `query` share a head of `key` and `value`.

    Returns:
        [..., H, Tq, Dv], stored as [..., Tq, H, Dv], so that joining the heads for the projection
        that follows costs no copy. A query that sees no key gets 0.

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a value, a dtype or a device does not fit.
    """
    bare = attn_mask is None and dropout_p == 0 and not enable_gqa
    if bare and _is_little(query, key, value):
        return reference.attention(query, key, value, None, 0.0, is_causal, scale)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        expect_float("attention", name, tensor)
    query, key, value = to_autocast(query, key, value)
    _expect_operands(query, key, value, enable_gqa)
    _expect_modes(attn_mask, dropout_p, is_causal, query)
    work = query.numel() * key.shape[-2]
    if backend.uses_reference("attention", query.device.type, query.dtype, work):
        return reference.attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rank = max(t.dim() for t in (query, key, value))
    q, k, v, leading = _align(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        full = (*leading, q.shape[1], q.shape[2], k.shape[2])[-max(rank, 2) :]
        mask = _align_mask(attn_mask, full, q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, _ = _attention(q, k, v, mask, is_causal, scale)  # [B, H, Tq, Dv]
    return out if rank == 4 else out.reshape((*leading, *out.shape[1:])[-rank:])


def _expect_operands(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    op = "attention"
    if _plain(query, key, value):
        return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        expect(tensor.dim() >= 2, op, name, "have the dimensions [..., T, D]", list(tensor.shape))
        expect_like(op, name, tensor, query, "query")
        size = tensor.shape[-1]
        rule = f"have a head size from 1 to {MOST_FEATURES}"
        expect(1 <= size <= MOST_FEATURES, op, name, rule, size)
    size, length = query.shape[-1], key.shape[-2]
    expect(key.shape[-1] == size, op, "key", f"end in D={size}, as query", list(key.shape))
    expect(value.shape[-2] == length, op, "value", f"have Tk={length} keys", list(value.shape))
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value)]
    for name, tensor, count in zip(("key", "value"), (key, value), heads[1:], strict=True):
        if enable_gqa:
            fits, rule = count > 0 and heads[0] % count == 0, "a number of heads that divides"
        else:
            fits, rule = count == heads[0] or 1 in (count, heads[0]), "as many heads as"
        remedy = "" if enable_gqa or count == 0 or heads[0] % count else "pass enable_gqa=True"
        fits = fits or count == heads[0]
        expect(fits, op, name, f"have {rule} query's {heads[0]}", list(tensor.shape), remedy)


def _is_little(query: Any, key: Any, value: Any) -> bool:
    """Whether torch's own operator is quicker, which casts under autocast as we do."""
    little = backend.little_work("attention")
    if little < 0 or not all(isinstance(t, Tensor) for t in (query, key, value)):
        return False
    if query.dtype != torch.float32 or not query.is_cpu or not _plain(query, key, value):
        return False
    return query.numel() * key.shape[2] <= little


def _plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether nothing broadcasts and all fits: the usual case, told in a tenth of the time."""
    shape = query.shape
    return (
        len(shape) == 4
        and key.shape == value.shape
        and shape[:2] == key.shape[:2]
        and shape[3] == key.shape[3]
        and 1 <= shape[3] <= MOST_FEATURES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )


def _expect_modes(mask: Tensor | None, dropout_p: float, is_causal: bool, query: Tensor) -> None:
    op = "attention"
    remedy = "drop the output of the layer instead"
    expect(dropout_p == 0, op, "dropout_p", "be 0", dropout_p, remedy)
    if mask is None:
        return
    expect(not is_causal, op, "is_causal", "be False where attn_mask is given", True)
    expect_type(isinstance(mask, Tensor), op, "attn_mask", "be a tensor", type(mask).__name__)
    fits = mask.dtype in (torch.bool, torch.float32, query.dtype)
    expect_type(fits, op, "attn_mask", f"be bool, float32 or {query.dtype}, as query", mask.dtype)
    expect_device(op, "attn_mask", mask, query, "query")


def _align(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The operands as [B, H, T, D], expanded where they broadcast, and the shape that makes up B.

    A single head of key and value serves all of query's without being expanded.
    """
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, (query.shape[0],)
    rank = max(4, query.dim(), key.dim(), value.dim())
    q, k, v = (t[(None,) * (rank - t.dim())] for t in (query, key, value))
    if enable_gqa and k.shape[-3] != v.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    heads = max(t.shape[-3] for t in (q, k, v)) if q.shape[-3] else 0
    kv_heads = k.shape[-3] if k.shape[-3] == v.shape[-3] else heads
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
    except RuntimeError:
        shapes = [list(t.shape) for t in (query, key, value)]
        rule = "have leading dimensions that broadcast"
        expect(False, "attention", "query, key and value", rule, shapes)
    aligned = []
    for t, count in ((q, heads), (k, kv_heads), (v, kv_heads)):
        whole = t.expand(*leading, count, -1, -1)
        aligned.append(whole if rank == 4 else whole.flatten(0, rank - 4))
    return (*aligned, tuple(leading))


def _align_mask(mask: Tensor, full: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask as [Bm, Hm, Qm, Km], each 1 or the full size; `full` is [..., H, Tq, Tk]."""
    sizes = mask.shape
    fits = len(sizes) <= len(full)
    fits = fits and all(m in (1, n) for m, n in zip(sizes[::-1], full[::-1], strict=False))
    expect(fits, "attention", "attn_mask", f"broadcast to {list(full)}", list(sizes))
    if mask.dtype == torch.float32 and dtype == torch.float64:
        mask = mask.double()
    if len(full) <= 4:
        return mask[(None,) * (4 - mask.dim())]
    mask = mask[(None,) * (len(full) - mask.dim())]
    if any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*full[:-3], -1, -1, -1)
    return mask.flatten(0, len(full) - 4)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float) -> tuple:
    batch, heads, length, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=wide)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, mask: Any, *modes: Any
) -> tuple[Tensor, ...]:
    def like(t: Tensor) -> Tensor:
        batch, heads, length, size = t.shape
        return t.new_empty((batch, length, heads, size)).transpose(1, 2)

    need_mask = modes[2]
    grad_mask = mask.new_empty(mask.shape) if need_mask else q.new_empty(0)
    return like(q), like(k), like(v), grad_mask


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple:
    if grad_out is None:
        return (None,) * 6
    q, k, v, out, lse, mask = ctx.saved_tensors
    need_mask = ctx.needs_input_grad[3]
    *grads, grad_mask = _attention_backward(
        grad_out, q, k, v, out, lse, mask, ctx.is_causal, ctx.scale, need_mask
    )
    return *grads, grad_mask if need_mask else None, None, None


register_fake("attention", _fake)
register_fake("attention_backward", _backward_fake)
_attention_backward = below_autograd("attention_backward")
_attention = differentiable("attention", _setup, _gradients, statistics=(1,))
