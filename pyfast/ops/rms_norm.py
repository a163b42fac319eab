"""Root-mean-square norm (Zhang & Sennrich, 2019), with an optional residual add in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.layer_norm import as_matrix, parse_norm, promoted, shaped
from pyfast.ops.register import below_autograd, differentiable, register_fake


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """input / sqrt(mean of squares + eps) * weight over the last dimensions.

    Args:
        input: [..., *normalized_shape], float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the trailing dimensions to normalise over, or one size.
        weight: [*normalized_shape], the dtype of `input`, or float32 beside a 16-bit one.
        eps: None means the spacing of the numbers the sums are kept in, as in torch: that of
            float32, or of float64 for float64 input.
        residual: the shape of `input`; added before normalising.

    Returns:
        The normalised tensor; with `residual`, the pair (input + residual, its norm).

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a dtype or a device does not fit.
    """
    input, residual = promoted(input, residual)
    shape = parse_norm(
        "rms_norm", input, normalized_shape, 0.0 if eps is None else eps, residual, weight=weight
    )
    if backend.uses_reference("rms_norm", input.device.type, input.dtype, input.numel()):
        return reference.rms_norm(input, shape, weight, eps, residual=residual)
    eps = torch.finfo(_wide(input)).eps if eps is None else eps
    results = _rms_norm(*as_matrix(shape, input, residual, weight), eps)
    return shaped(results, input, residual is not None)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, residual: Any, weight: Any, eps: float) -> tuple[Tensor, ...]:
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:1], dtype=_wide(x))


def _backward_fake(
    grad_out: Tensor, grad_sum: Any, x: Tensor, rstd: Any, weight: Any, need_weight: bool
) -> tuple[Tensor, ...]:
    like = x if weight is None else weight
    return x.new_empty(x.shape), like.new_empty(x.shape[1:] if need_weight else 0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if residual is None else total, rstd, weight)
    ctx.with_residual = residual is not None


def _gradients(ctx: Any, grad_out: Any, grad_sum: Any, *_: Any) -> tuple:
    x, rstd, weight = ctx.saved_tensors
    if grad_out is None:  # only the sum was used
        return grad_sum, grad_sum if ctx.with_residual else None, None, None
    need_weight = weight is not None and ctx.needs_input_grad[2]
    extra = grad_sum if ctx.with_residual else None
    grad_x, grad_weight = _rms_norm_backward(grad_out, extra, x, rstd, weight, need_weight)
    return grad_x, grad_x if ctx.with_residual else None, grad_weight if need_weight else None, None


register_fake("rms_norm", _fake)
register_fake("rms_norm_backward", _backward_fake)
_rms_norm_backward = below_autograd("rms_norm_backward")
_rms_norm = differentiable("rms_norm", _setup, _gradients, statistics=(2,))
