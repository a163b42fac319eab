"""Cross entropy of logits and class indices: one read forward, one read and one write backward."""

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
    expect_shape,
    expect_type,
)
from pyfast.ops.register import below_autograd, differentiable, register_fake

REDUCTIONS = ("none", "mean", "sum")
LITTLE_ROWS = 256  # torch takes some 0.1 us for each beside its elements, we a fifth of that


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.cross_entropy` for class indices: log(sum(exp(input))) - input[target] of each row.

    Beyond the loss and the gradient it takes two numbers a row.

    Args:
        input: logits [V], [N, V] or [N, V, d1, ...], float32, bfloat16, float16 or float64; any
            strides (rows whose V logits are side by side in memory are read in place).
        target: class indices [], [N] or [N, d1, ...], int64 (or uint8), in [0, V) or
            `ignore_index`.
        weight: a weight per class [V], the dtype of `input` or float32; takes no gradient.
        ignore_index: the target of rows that do not count: no loss, a gradient of zeros.
        reduction: "mean" (weighted by the class weights of the targets; nan if none counts), "sum"
            or "none".
        label_smoothing: the part of the target, in [0, 1], spread evenly over all classes.
        dtype: dtype of the loss, by default that of `input` (under autocast float32, as in torch);
            sums are kept in float32, or float64 for float64.

    Returns:
        A scalar; with reduction "none" the loss of each row, in the shape of `target`.

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a value, a dtype or a device does not fit.
    """
    loss = _by_torch(input, target, weight, ignore_index, reduction, label_smoothing, dtype)
    if loss is not None:
        return loss
    check_targets("cross_entropy", input, target, weight, reduction, label_smoothing, dtype)
    target = target if target.dtype == torch.int64 else target.long()
    if backend.uses_reference("cross_entropy", input.device.type, input.dtype, input.numel()):
        return reference.cross_entropy(
            input,
            target,
            None if weight is None else weight.to(input.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            dtype=dtype,
        )
    logits, flat = input, target
    if input.dim() == 1:
        logits, flat = input.unsqueeze(0), target.unsqueeze(0)  # [1, V], [1]
    elif input.dim() > 2:
        logits, flat = input.movedim(1, -1).flatten(0, -2), target.flatten()  # [N * d1 * ..., V]
    weight = in_accumulator_type(weight, input)
    loss, _ = _cross_entropy(logits, flat, weight, ignore_index, label_smoothing, reduction)
    if reduction == "none" and input.dim() != 2:
        loss = loss.reshape(target.shape)
    wanted = loss_dtype(input, dtype)
    return loss if loss.dtype is wanted else loss.to(wanted)


def _by_torch(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    dtype: Any,
) -> Tensor | None:
    """Little work by torch's own operators; None: not that, or an argument does not fit.

    In bfloat16 too: of so few rows its loss is as exact as ours, its gradient half as exact. Class
    probabilities are not for us, and a wrong target is told of in our words.
    """
    try:
        if (
            weight is not None
            or dtype is not None
            or input.dtype not in (torch.float32, torch.bfloat16)
            or target.numel() > LITTLE_ROWS
            or input.numel() > backend.little_work("cross_entropy")
            or target.dtype is not torch.int64
            or not input.is_cpu
            or not 0 <= label_smoothing <= 1
        ):
            return None
        return F.cross_entropy(
            input,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def check_targets(
    op: str,
    input: Any,
    target: Any,
    weight: Any,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype | None,
    classes: Tensor | None = None,
) -> None:
    """Raise unless the arguments fit; `classes` [V, K]: logits are input [..., K] times it."""
    plain = classes is None and weight is None and dtype is None and reduction in REDUCTIONS
    if plain and 0 <= label_smoothing <= 1 and _fits(input, target):
        return  # as in most calls, in a tenth of the time that finding words takes
    expect_float(op, "input", input)
    expect(input.dim() >= 1, op, "input", "have at least 1 dimension", list(input.shape))
    expect_type(isinstance(target, Tensor), op, "target", "be a tensor", type(target).__name__)
    remedy = "class probabilities are not supported" if target.is_floating_point() else ""
    fits = target.dtype in (torch.int64, torch.uint8)
    expect_type(fits, op, "target", "be int64 (or uint8)", target.dtype, remedy)
    if classes is not None:
        shape, count = input.shape[:-1], classes.shape[0]
    else:
        count = input.shape[min(1, input.dim() - 1)]
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    expect_shape(op, "target", target, shape, f"{list(shape)}, to match input {list(input.shape)}")
    expect_device(op, "target", target, input, "input")
    if weight is not None:
        expect_type(isinstance(weight, Tensor), op, "weight", "be a tensor", type(weight).__name__)
        fits = weight.dtype in (input.dtype, torch.float32)
        expect_type(fits, op, "weight", f"be {input.dtype} or float32", weight.dtype)
        expect_shape(op, "weight", weight, (count,), f"[V={count}]")
        expect_device(op, "weight", weight, input, "input")
        expect(not weight.requires_grad, op, "weight", "not require a gradient", "one that does")
    known = f"be one of {', '.join(REDUCTIONS)}"
    expect(reduction in REDUCTIONS, op, "reduction", known, repr(reduction))
    expect(0 <= label_smoothing <= 1, op, "label_smoothing", "be in [0, 1]", label_smoothing)
    expect_type(dtype is None or dtype in FLOATS, op, "dtype", "be a floating-point dtype", dtype)


def _fits(input: Any, target: Any) -> bool:
    """Whether these are logits [N, V] and int64 classes [N]; not every pair that fits is."""
    return (
        isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and input.dtype in FLOATS
        and target.dtype is torch.int64
        and input.dim() == 2
        and input.shape[:1] == target.shape
        and input.device == target.device
    )


def in_accumulator_type(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """`tensor` in the dtype of sums over `like`: float64 for float64, float32 for the others."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return None if tensor is None else tensor.to(wide)


def loss_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else that of `input`; under autocast float32, as in torch."""
    if dtype is not None:
        return dtype
    narrow = input.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and torch.is_autocast_enabled(input.device.type) else input.dtype


def _fake(
    logits: Tensor, target: Any, weight: Any, ignore_index: int, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=wide)
    return loss, logits.new_empty((rows, 2), dtype=wide)


def _backward_fake(grad_loss: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, target, weight, *ctx.modes = inputs
    ctx.save_for_backward(logits, target, weight, output[1])


def _gradients(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple:
    if grad_loss is None:
        return (None,) * 6
    logits, target, weight, lse = ctx.saved_tensors
    grad = _cross_entropy_backward(grad_loss, logits, target, weight, lse, *ctx.modes)
    return grad, *(None,) * 5


register_fake("cross_entropy", _fake)
register_fake("cross_entropy_backward", _backward_fake)
_cross_entropy_backward = below_autograd("cross_entropy_backward")
_cross_entropy = differentiable("cross_entropy", _setup, _gradients, statistics=(1,))
