"""Layer normalisation (Ba, Kiros & Hinton, 2016), with an optional residual add in one pass."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import expect, expect_device, expect_float, expect_like, expect_shape
from pyfast.ops.register import below_autograd, differentiable, register_fake


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimensions.

    Beyond its results it takes one or two numbers a row; the backward 64 rows for the sums.

    Args:
        input: [..., *normalized_shape], float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the trailing dimensions to normalise over, or one size.
        weight, bias: [*normalized_shape], the dtype of `input`, or float32 beside a 16-bit one.
        residual: the shape of `input`; added before normalising.

    Returns:
        The normalised tensor; with `residual`, the pair (input + residual, its norm).

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a dtype or a device does not fit.
    """
    out = _by_torch(input, normalized_shape, weight, bias, eps, residual)
    if out is not None:
        return out
    input, residual = promoted(input, residual)
    shape = parse_norm(
        "layer_norm", input, normalized_shape, eps, residual, weight=weight, bias=bias
    )
    if backend.uses_reference("layer_norm", input.device.type, input.dtype, input.numel()):
        return reference.layer_norm(input, shape, weight, bias, eps, residual=residual)
    rows, cols = rows_of(input, shape)
    out, total, _, _ = _layer_norm(
        input.reshape(rows, cols),
        None if residual is None else residual.reshape(rows, cols),
        None if weight is None else weight.reshape(cols),
        None if bias is None else bias.reshape(cols),
        eps,
    )
    out = out.reshape(input.shape)
    return out if residual is None else (total.reshape(input.shape), out)


def _by_torch(
    input: Any, shape: Any, weight: Any, bias: Any, eps: Any, residual: Any
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Little work by torch's own operators; None: not that, or an argument does not fit.

    In 16 bits only where no gradient is wanted: torch's are far from exact.
    """
    try:
        if (
            not is_little_norm("layer_norm", input)
            or (input.dtype is not torch.float32 and torch.is_grad_enabled())
            or eps < 0
        ):
            return None
        shape = (shape,) if isinstance(shape, int) else shape
        if residual is None:
            return F.layer_norm(input, shape, weight, bias, eps)
        if residual.dtype is not input.dtype or residual.shape != input.shape:
            return None
        total = input + residual
        return total, F.layer_norm(total, shape, weight, bias, eps)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def is_little_norm(op: str, input: Tensor) -> bool:
    """Whether torch is quicker on so few elements; AttributeError for what is no tensor."""
    little = input.numel() <= backend.little_work(op) and input.is_cpu
    return little and input.dtype in (torch.float32, torch.bfloat16, torch.float16)


def parse_norm(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    eps: float,
    residual: Tensor | None,
    **affine: Tensor | None,
) -> tuple[int, ...]:
    """The normalised shape as a tuple, after every check; layer_norm's and rms_norm's words."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    expect_float(op, "input", input)
    fits = 0 < len(shape) <= input.dim() and tuple(input.shape[-len(shape) :]) == shape
    expect(fits, op, "input", f"end in normalized_shape {list(shape)}", list(input.shape))
    expect(eps >= 0, op, "eps", "be at least 0", eps)
    weight = affine["weight"]
    for name, tensor in affine.items():
        if tensor is None:
            continue
        if name == "weight":
            expect_affine(op, tensor, input)
        else:
            like = (input, "input") if weight is None else (weight, "weight")
            expect_like(op, name, tensor, *like)
        expect_shape(op, name, tensor, shape, f"{list(shape)}")
    if residual is not None:
        expect_like(op, "residual", residual, input, "input")
        expect_shape(op, "residual", residual, input.shape, f"{list(input.shape)}, as input")
    return shape


def promoted(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast the wider of the two dtypes, as `input + residual` would have it."""
    if not (isinstance(input, Tensor) and isinstance(residual, Tensor)):
        return input, residual
    if input.dtype == residual.dtype or not torch.is_autocast_enabled(input.device.type):
        return input, residual
    wide = torch.promote_types(input.dtype, residual.dtype)
    return input.to(wide), residual.to(wide)


def expect_affine(op: str, weight: Any, input: Tensor) -> None:
    """A weight of the dtype of `input`, or float32 beside a 16-bit one, as under autocast."""
    if not (isinstance(weight, Tensor) and weight.dtype == torch.float32 and input.itemsize == 2):
        expect_like(op, "weight", weight, input, "input")
    expect_device(op, "weight", weight, input, "input")


def rows_of(input: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    """Sizes of `input` as a matrix whose columns are the normalised dimensions."""
    return prod(input.shape[: input.dim() - len(shape)]), prod(shape)


def _fake(x: Tensor, residual: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = x.new_empty(x.shape[:1], dtype=wide)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, row, torch.empty_like(row)


def _backward_fake(
    grad_out: Tensor, grad_sum: Any, x: Tensor, mean: Any, rstd: Any, weight: Any, *need: bool
) -> tuple[Tensor, ...]:
    need_weight, need_bias = need
    cols = x.shape[1:]
    like = x if weight is None else weight
    sums = (like.new_empty(cols if need_weight else 0), like.new_empty(cols if need_bias else 0))
    return x.new_empty(x.shape), *sums


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)
    ctx.with_residual, ctx.with_bias = residual is not None, bias is not None


def _gradients(ctx: Any, grad_out: Any, grad_sum: Any, *_: Any) -> tuple:
    x, mean, rstd, weight = ctx.saved_tensors
    if grad_out is None:  # only the sum was used
        return grad_sum, grad_sum if ctx.with_residual else None, None, None, None
    need = (
        weight is not None and ctx.needs_input_grad[2],
        ctx.with_bias and ctx.needs_input_grad[3],
    )
    extra = grad_sum if ctx.with_residual else None
    grad_x, grad_weight, grad_bias = _layer_norm_backward(
        grad_out, extra, x, mean, rstd, weight, *need
    )
    grad_residual = grad_x if ctx.with_residual else None
    sums = (grad_weight if need[0] else None, grad_bias if need[1] else None)
    return grad_x, grad_residual, *sums, None


register_fake("layer_norm", _fake)
register_fake("layer_norm_backward", _backward_fake)
_layer_norm_backward = below_autograd("layer_norm_backward")
_layer_norm = differentiable("layer_norm", _setup, _gradients, statistics=(2, 3))
