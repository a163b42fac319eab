"""Layer normalisation (Ba, Kiros & Hinton, 2016), with an optional residual add in one pass."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import (
    FLOATS,
    expect,
    expect_device,
    expect_float,
    expect_like,
    expect_shape,
)
from pyfast.ops.register import below_autograd, differentiable, register_fake

# More are ours in 16 bits: torch's gradients of weight and bias are twice as wrong at 32 rows, 8
# times at 512.
FEW_ROWS = 8


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
    results = _layer_norm(*as_matrix(shape, input, residual, weight, bias), eps)
    return shaped(results, input, residual is not None)


def _by_torch(
    input: Any, shape: Any, weight: Any, bias: Any, eps: Any, residual: Any
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Little work by torch's own operators; None: not that, or an argument does not fit.

    In 16 bits of few rows only, or where no gradient is wanted: torch's sums over many are far from
    exact.
    """
    try:
        little = backend.little_work("layer_norm")
        if input.numel() > little or not input.is_cpu or eps < 0:
            return None
        shape = (shape,) if isinstance(shape, int) else shape
        if input.dtype is not torch.float32 and (
            input.dtype not in (torch.bfloat16, torch.float16)
            or 2 * input.numel() > little  # torch is less quick in 16 bits
            or (torch.is_grad_enabled() and input.numel() > FEW_ROWS * prod(shape))
        ):
            return None
        if residual is None:
            return F.layer_norm(input, shape, weight, bias, eps)
        if residual.dtype is not input.dtype or residual.shape != input.shape:
            return None
        total = input + residual
        return total, F.layer_norm(total, shape, weight, bias, eps)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


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
    if _fits(input, shape, residual, affine.values()) and eps >= 0:
        return shape  # of most calls, in a tenth of the time that finding words takes
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


def _fits(input: Any, shape: tuple, residual: Any, affine: Iterable[Any]) -> bool:
    """Whether these are tensors of one dtype, normalised over one dimension; more would fit."""
    if not (isinstance(input, Tensor) and input.dtype in FLOATS and input.shape[-1:] == shape):
        return False
    like = input.dtype, input.device
    for tensor in affine:
        if tensor is not None:
            fits = isinstance(tensor, Tensor) and tensor.shape == shape
            if not fits or (tensor.dtype, tensor.device) != like:
                return False
    if residual is None:
        return True
    fits = isinstance(residual, Tensor) and residual.shape == input.shape
    return fits and (residual.dtype, residual.device) == like


def as_matrix(
    shape: tuple[int, ...], input: Tensor, residual: Tensor | None, *affine: Tensor | None
) -> tuple[Tensor | None, ...]:
    """[N, M] for input and residual, [M] for weight and bias.

    What is that already stays itself: even a view to the same shape is a node of the graph.
    """
    if input.dim() == 2 and len(shape) == 1:
        return input, residual, *affine
    rows, cols = prod(input.shape[: input.dim() - len(shape)]), prod(shape)
    matrices = (None if t is None else t.reshape(rows, cols) for t in (input, residual))
    return *matrices, *(None if t is None else t.reshape(cols) for t in affine)


def shaped(results: tuple[Tensor, ...], like: Tensor, pair: bool) -> Any:
    """The norm [N, M] in the shape of `like`, or a pair with the sum before it."""
    out, total = results[:2]
    if out.shape != like.shape:
        out, total = out.reshape(like.shape), total.reshape(like.shape) if pair else total
    return (total, out) if pair else out


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
