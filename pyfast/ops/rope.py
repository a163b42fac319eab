"""Rotary position embedding in one pass (Su et al., 2021)."""

from typing import Any

import torch
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import expect, expect_device, expect_float, expect_shape, expect_type
from pyfast.ops.register import below_autograd, differentiable, register_fake


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of features of `x` by the angle of their position.

    Pairs are (i, i + D/2), as Hugging Face's Llama has them, or (2i, 2i + 1) when `interleaved`:
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        x: [..., H, T, D] or [T, D] with D even; float32, bfloat16, float16 or float64. Any strides:
            a view of a fused projection is read in place.
        cos, sin: [T, D/2], float32; they get no gradient.
        interleaved: which features make a pair.

    Returns:
        The shape and dtype of `x`; stored as [..., T, H, D].

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a dtype or a device does not fit.
    """
    _parse(x, cos, sin)
    if backend.uses_reference("rope", x.device.type, x.dtype, x.numel()):
        return reference.rope(x, cos, sin, interleaved=interleaved)
    if x.dim() == 4:
        return _rope(x, cos, sin, interleaved, False)
    leading = 1 if x.dim() == 2 else x.shape[-3]
    batched = x.reshape(-1 if x.numel() else 0, leading, *x.shape[-2:])  # [B, H, T, D]
    return _rope(batched, cos, sin, interleaved, False).reshape(x.shape)


def _parse(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rope"
    expect_float(op, "x", x)
    expect(x.dim() >= 2, op, "x", "have the dimensions [..., T, D]", list(x.shape))
    length, size = x.shape[-2:]
    expect(size % 2 == 0, op, "x", "end in an even head size", list(x.shape))
    for name, table in (("cos", cos), ("sin", sin)):
        expect_type(isinstance(table, Tensor), op, name, "be a tensor", type(table).__name__)
        rule = "be float32, whatever the dtype of x: angles lose positions in 16 bits"
        expect_type(table.dtype == torch.float32, op, name, rule, table.dtype)
        expect_shape(op, name, table, (length, size // 2), f"[T={length}, D/2={size // 2}]")
        expect_device(op, name, table, x, "x")
        trained = table.requires_grad and torch.is_grad_enabled()
        expect(not trained, op, name, "not require a gradient", "one that does", "detach it")


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    batch, heads, length, size = x.shape
    return x.new_empty((batch, length, heads, size)).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple:
    if grad_out is None:
        return (None,) * 5
    cos, sin = ctx.saved_tensors
    grad_x = _rope_below_autograd(grad_out, cos, sin, ctx.interleaved, not ctx.inverse)
    return grad_x, None, None, None, None


register_fake("rope", _fake)
_rope_below_autograd = below_autograd("rope")
_rope = differentiable("rope", _setup, _gradients)
