"""Cross entropy of a linear layer's output, whose logits never exist whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import expect, expect_float, expect_like, expect_shape, to_autocast
from pyfast.ops.cross_entropy import check_targets, in_accumulator_type, loss_dtype
from pyfast.ops.register import below_autograd, differentiable, register_fake

LITTLE_LOGITS = 2**18  # as many may exist whole, 1 MB, where torch is quicker
WHOLE_LOGITS = 32 << 20  # bytes in float32 up to which the logits are kept from loss to gradients


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.linear_cross_entropy` for class indices: cross entropy of linear(input, linear_weight).

    Rows that do not count are left out of the matrix products. The gradients of a "mean" or "sum"
    are made together with the loss, in three products, in float32 and float64, and in bfloat16
    where the logits would take up to 32 MB in float32; all others by the backward, which computes
    the logits again. Workspace: up to 40 MB where the logits take up to 32 MB in float32; else
    about an eighth of what they would take in the dtype of `input`, or 16 MB.

    Args:
        input: [..., K], float32, bfloat16, float16 or float64.
        linear_weight: [V, K], any strides; linear_bias: [V]. Both of the dtype of `input`.
        target: class indices [...], int64 (or uint8), in [0, V) or `ignore_index`.
        weight: a weight per class [V], the dtype of `input` or float32; takes no gradient.
        reduction, ignore_index, label_smoothing, dtype: as of `cross_entropy`; None ignores -100.

    Returns:
        A scalar; with reduction "none" the loss of each row, in the shape of `target`.

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a value, a dtype or a device does not fit.
    """
    op = "linear_cross_entropy"
    ignore_index = -100 if ignore_index is None else ignore_index
    if weight is None and dtype is None:
        modes = {"ignore_index": ignore_index, "reduction": reduction}
        modes |= {"label_smoothing": label_smoothing}
        loss = _by_torch(input, linear_weight, linear_bias, target, modes)
        if loss is not None:
            return loss
    out = loss_dtype(input, dtype) if isinstance(input, Tensor) else dtype
    input, linear_weight, linear_bias = to_autocast(input, linear_weight, linear_bias)
    _parse(op, input, linear_weight, linear_bias)
    check_targets(op, input, target, weight, reduction, label_smoothing, dtype, linear_weight)
    target = target if target.dtype == torch.int64 else target.long()
    if backend.uses_reference(op, input.device.type, input.dtype):
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=None if weight is None else weight.to(input.dtype),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            dtype=dtype,
        )
    rows = target.numel()
    differentiated = (input, linear_weight, linear_bias)
    wanted = torch.is_grad_enabled()
    need = (wanted and t is not None and t.requires_grad for t in differentiated)
    loss, *_ = _linear_cross_entropy(
        input.reshape(rows, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(rows),
        in_accumulator_type(weight, input),
        ignore_index,
        label_smoothing,
        reduction,
        *need,
    )
    return (loss.reshape(target.shape) if reduction == "none" else loss).to(out)


def _by_torch(
    input: Any, linear_weight: Any, linear_bias: Any, target: Any, modes: dict[str, Any]
) -> Tensor | None:
    """Little float32 work by torch's own operators; None: not that, or an argument does not fit."""
    try:
        classes, _ = linear_weight.shape
        if (
            input.numel() * classes > backend.little_work("linear_cross_entropy")
            or target.numel() * classes > LITTLE_LOGITS
            or input.dtype is not torch.float32
            or not input.is_cpu
            or target.dtype is not torch.int64
            or target.shape != input.shape[:-1]
            or (linear_bias is not None and linear_bias.shape != (classes,))
            or not 0 <= modes["label_smoothing"] <= 1
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        logits = F.linear(input, linear_weight, linear_bias).reshape(-1, classes)
        loss = F.cross_entropy(logits, target.reshape(-1), **modes)
        return loss.reshape(target.shape) if modes["reduction"] == "none" else loss
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def _parse(op: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    expect_float(op, "input", input)
    expect_like(op, "linear_weight", linear_weight, input, "input")
    rank, shape = linear_weight.dim(), list(linear_weight.shape)
    expect(rank == 2, op, "linear_weight", "be [V, K]", shape)
    fits = input.dim() >= 1 and input.shape[-1] == shape[1]
    rule = f"end in K={shape[1]} to match linear_weight {shape}"
    expect(fits, op, "input", rule, list(input.shape))
    if linear_bias is not None:
        expect_like(op, "linear_bias", linear_bias, input, "input")
        expect_shape(op, "linear_bias", linear_bias, shape[:1], f"[V={shape[0]}]")


def _with_loss(x: Tensor, weight: Tensor, reduction: str) -> bool:
    """Whether the op makes the gradients together with the loss, as the C++ of the device does."""
    if reduction == "none" or x.dtype == torch.float16:
        return False
    few = 4 * x.shape[0] * weight.shape[0] <= WHOLE_LOGITS and x.device.type == "cpu"
    return x.dtype != torch.bfloat16 or few


def _fake(
    x: Tensor, weight: Tensor, bias: Any, target: Any, class_weight: Any, *modes: Any
) -> tuple[Tensor, ...]:
    _, _, reduction, *need = modes
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=wide)
    now = _with_loss(x, weight, reduction)
    grads = _gradients_like(x, weight, bias, (now and n for n in need))
    return loss, x.new_empty((x.shape[0], 2), dtype=wide), *grads


def _backward_fake(
    grad_loss: Any, x: Tensor, weight: Tensor, bias: Any, target: Any, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients_like(x, weight, bias, rest[-3:])


def _gradients_like(x: Tensor, weight: Tensor, bias: Any, need: Any) -> tuple[Tensor, ...]:
    need_x, need_weight, need_bias = need
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[:1] if need_bias and bias is not None else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, target, class_weight, *modes = inputs
    ctx.modes, ctx.need = modes[:3], modes[3:]
    made = zip(output[2:], (x, weight, bias), ctx.need, strict=True)
    if any(ctx.need) and all(t is None or g.shape == t.shape for g, t, need in made if need):
        ctx.save_for_backward(*output[2:])
    else:
        ctx.save_for_backward(x, weight, bias, target, class_weight, output[1])


def _gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    if len(saved) == 3:
        grads = _scaled(saved, ctx.need, grad_loss)
    else:
        grads = _linear_cross_entropy_backward(grad_loss, *saved, *ctx.modes, *ctx.need)
    return *(g if n else None for g, n in zip(grads, ctx.need, strict=True)), *(None,) * 8


def _scaled(saved: tuple[Tensor, ...], need: list[bool], factor: Tensor) -> list[Tensor]:
    """The saved gradients times `factor`, in new tensors unless this is their last use."""
    if type(factor) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return [g * factor if n else g for g, n in zip(saved, need, strict=True)]
    if factor == 1:
        return list(saved)
    return [g.mul_(factor) if n else g for g, n in zip(saved, need, strict=True)]


register_fake("linear_cross_entropy", _fake)
register_fake("linear_cross_entropy_backward", _backward_fake)
_linear_cross_entropy_backward = below_autograd("linear_cross_entropy_backward")
_linear_cross_entropy = differentiable(
    "linear_cross_entropy", _setup, _gradients, statistics=(1, 2, 3, 4)
)
