"""act(x @ weight.T + bias), the activation inside the matrix product."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import (
    FLOATS,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    to_autocast,
)
from pyfast.ops.register import below_autograd, differentiable, register_fake

ACTIVATIONS = tuple(reference.ACTIVATIONS)
GRAD_FROM_OUTPUT = frozenset({"relu", "sigmoid", "tanh", "leaky_relu", "elu"})


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """A linear layer and its activation in one pass over the output.

    Workspace on the CPU, kept from call to call: packed copies of x and weight, 16 MB each at most;
    in the backward of 1024 rows of x and (twice) of the output's gradient, of the weight, and the
    sum of its gradient in float32, or 64 such sums of up to 8192 elements.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides.
        weight: [N, K], the dtype of `x`; may be the transpose of a [K, N] matrix at no cost.
        bias: [N].
        act: "none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "leaky_relu", "elu",
            "softplus" or "mish", with torch's default parameters.

    Returns:
        [..., N], the dtype of `x`; sums are float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: a shape or a name, a dtype, or a device does not fit.
    """
    out = _by_torch(x, weight, bias, act)
    if out is not None:
        return out
    if not _is_plain(x, weight, bias, act):
        x, weight, bias = to_autocast(x, weight, bias)
        _parse(x, weight, bias, act)
    n, k = weight.shape
    work = x.numel() * n
    if backend.uses_reference("linear_act", x.device.type, x.dtype, work):
        return reference.linear_act(x, weight, bias, act)
    x2d = x if x.dim() == 2 else x.reshape(-1, k) if k else x.reshape(x.shape[:-1].numel(), 0)
    save = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    out, _ = _linear_act(x2d, weight, bias, act, save)  # [M, N]
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], n)


def _by_torch(x: Any, weight: Any, bias: Any, act: Any) -> Tensor | None:
    """Little float32 work by torch's own operators; None: not that, or an argument does not fit.

    Before all other checks, which cost as much as such a product: torch's own stand in for them.
    """
    try:
        n, _ = weight.shape
        work, little = x.numel() * n, backend.little_work("linear_act")
        if (
            x.dtype is not torch.float32
            or not x.is_cpu
            # On one thread torch's products are quicker for longer.
            or (work > little and (work > 4 * little or torch.get_num_threads() > 1))
            or (bias is not None and (bias.dim() != 1 or bias.numel() != n))
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        out = F.linear(x, weight, bias)
        return out if act == "none" else reference.ACTIVATIONS[act](out)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _is_plain(x: Any, weight: Any, bias: Any, act: Any) -> bool:
    """Whether the arguments are seen at a glance to fit; if not, `_parse` has the words.

    One function, since in a training step the code of each that is called comes from memory: the
    checks of `_parse` then cost 20 us, as much as the product of a small layer.
    """
    try:
        n, k = weight.shape
        dtype = weight.dtype
        return (
            x.dtype is dtype
            and dtype in FLOATS
            and x.is_cpu
            and weight.is_cpu
            and x.dim() > 0
            and x.size(-1) == k
            and (
                bias is None
                or (bias.dtype is dtype and bias.is_cpu and bias.dim() == 1 and bias.numel() == n)
            )
            and act in reference.ACTIVATIONS
            and not torch.is_autocast_enabled("cpu")
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _parse(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> None:
    """Every check."""
    op = "linear_act"
    expect_float(op, "x", x)
    expect(x.dim() >= 1, op, "x", "have at least 1 dimension", list(x.shape))
    expect_like(op, "weight", weight, x, "x")
    expect(weight.dim() == 2, op, "weight", "have 2 dimensions, [N, K]", list(weight.shape))
    n, k = weight.shape
    if x.shape[-1] != k:
        expect(False, op, "x", f"end in K={k} to match weight {[n, k]}", list(x.shape))
    if bias is not None:
        expect_like(op, "bias", bias, x, "x")
        expect_shape(op, "bias", bias, (n,), f"[N={n}]")
    if act not in reference.ACTIVATIONS:
        expect(False, op, "act", f"be one of {', '.join(ACTIVATIONS)}", repr(act))


def _fake(x: Tensor, weight: Tensor, bias: Any, act: str, save: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    keep = save and act != "none" and act not in GRAD_FROM_OUTPUT
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def is_transposed(weight: Tensor) -> bool:
    """Whether [N, K] is the transpose of a row-major matrix: its gradient comes in that layout."""
    return weight.stride(0) == 1 and weight.stride(1) != 1 and weight.stride(1) >= weight.shape[0]


def _like_weight(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty(k, n).t() if is_transposed(weight) else weight.new_empty(n, k)


def _backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Any, act: str, *need: bool
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_weight, need_bias = need
    return (
        x.new_empty(x.shape if need_x else 0),
        _like_weight(weight) if need_weight else x.new_empty(0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, act, save = inputs
    out, preact = output
    saved = None
    if act != "none" and save:
        saved = out if act in GRAD_FROM_OUTPUT else preact
    ctx.save_for_backward(x, weight, saved)
    ctx.act, ctx.with_bias = act, bias is not None


def _gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple:
    x, weight, saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need = (needs[0], needs[1], ctx.with_bias and needs[2])
    grads = _linear_act_backward(grad_out, x, weight, saved, ctx.act, *need)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None


register_fake("linear_act", _fake)
register_fake("linear_act_backward", _backward_fake)
_linear_act_backward = below_autograd("linear_act_backward")
_linear_act = differentiable("linear_act", _setup, _gradients, statistics=(1,))
