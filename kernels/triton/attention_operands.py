"""Guards and arguments of the rooms of attention."""

import torch
from torch import Tensor

from pyfast.kernels import guards

OP = "attention"
MOST_FEATURES = 256  # of a head


def check_operands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], mask [B|1, H|1, Tq|1, Tk|1]."""
    guards.first(OP, "q", q, 4)
    batch, heads, queries, size = q.shape
    for name, t in (("k", k), ("v", v)):
        guards.expect(t.dim() == 4, OP, name, "have 4 dimensions", list(t.shape))
    kv_heads, keys = k.shape[1:3]
    guards.expect_like(OP, "k", k, q, (batch, kv_heads, keys, size))
    guards.expect_like(OP, "v", v, q, (batch, kv_heads, keys, v.shape[3]))
    fits = heads % kv_heads == 0 if kv_heads else heads == 0
    guards.expect(fits, OP, "q", f"have a multiple of the {kv_heads} heads of k", heads)
    for features in (size, v.shape[3]):
        rule = f"be from 1 to {MOST_FEATURES}"
        guards.expect(1 <= features <= MOST_FEATURES, OP, "head size", rule, features)
    if mask is None:
        return
    full = (batch, heads, queries, keys)
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
    guards.expect(fits, OP, "mask", f"broadcast to {list(full)}", list(mask.shape))
    guards.expect_like(OP, "mask", mask, q, mask.shape, torch.bool, torch.float32, q.dtype)


def mask_arguments(mask: Tensor | None, q: Tensor) -> tuple[str, Tensor, list[int]]:
    """(kind, tensor, strides with 0 where it broadcasts); without a mask, any tensor."""
    if mask is None:
        return "none", q, [0, 0, 0, 0]
    strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    if mask.dtype == torch.bool:
        return "boolean", mask.view(torch.uint8), strides
    return "additive", mask, strides


def empty_heads(batch: int, heads: int, time: int, size: int, like: Tensor) -> Tensor:
    """[B, H, T, D] stored as [B, T, H, D]: the projection beside it needs no copy."""
    return like.new_empty((batch, time, heads, size)).transpose(1, 2)
