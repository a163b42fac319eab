"""Gated linear unit: act(x Wg^T + bg) * (x Wu^T + bu) in one matrix product (Shazeer, 2020)."""

from typing import Any

import torch
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import expect, expect_float, expect_like, expect_shape, to_autocast
from pyfast.ops.linear_act import ACTIVATIONS, is_transposed
from pyfast.ops.register import below_autograd, differentiable, register_fake


def linear_glu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """A gated linear unit; act="silu" is SwiGLU, "gelu" GEGLU, "sigmoid" GLU, "none" bilinear.

    Workspace on the CPU: as of `linear_act`, with both weights as one.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides.
        gate_weight, up_weight: [N, K], the dtype of `x`.
        gate_bias, up_bias: [N].
        act: a name `pyfast.linear_act` knows.

    Returns:
        [..., N], the dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: a shape or a name, a dtype, or a device does not fit.
    """
    if _is_little(x, gate_weight, up_weight, gate_bias, up_bias, act):
        return reference.linear_glu(x, gate_weight, up_weight, gate_bias, up_bias, act)
    tensors = to_autocast(x, gate_weight, up_weight, gate_bias, up_bias)
    n, k = _parse(*tensors, act)
    x = tensors[0]
    if backend.uses_reference("linear_glu", x.device.type, x.dtype, x.numel() * n):
        return reference.linear_glu(*tensors, act)
    x2d = x.reshape(x.shape[:-1].numel(), k)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, _, _ = _linear_glu(x2d, *tensors[1:], act, save)  # [M, N]
    return out.reshape(*x.shape[:-1], n)


def _is_little(x: Any, gate_weight: Any, up_weight: Any, *rest: Any) -> bool:
    """Whether the arguments fit, and torch's own operators are quicker."""
    *biases, act = rest
    try:
        n, k = gate_weight.shape
        tensors = [x, gate_weight, up_weight, *(bias for bias in biases if bias is not None)]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return (
            x.numel() * n <= backend.little_work("linear_glu") // (1 if wanted else 8)
            and all(t.dtype is torch.float32 and t.is_cpu for t in tensors)
            and up_weight.shape == (n, k)
            and x.shape[-1] == k
            and all(bias is None or bias.shape == (n,) for bias in biases)
            and act in ACTIVATIONS
            and not torch.is_autocast_enabled("cpu")
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def _parse(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    act: str,
) -> tuple[int, int]:
    """(N, K), after every check."""
    op = "linear_glu"
    expect_float(op, "x", x)
    expect(x.dim() >= 1, op, "x", "have at least 1 dimension", list(x.shape))
    expect_like(op, "gate_weight", gate_weight, x, "x")
    expect(gate_weight.dim() == 2, op, "gate_weight", "be [N, K]", list(gate_weight.shape))
    n, k = gate_weight.shape
    rule = f"end in K={k} to match gate_weight {[n, k]}"
    expect(x.shape[-1] == k, op, "x", rule, list(x.shape))
    expect_like(op, "up_weight", up_weight, x, "x")
    expect_shape(op, "up_weight", up_weight, (n, k), f"[N={n}, K={k}]")
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            expect_like(op, name, bias, x, "x")
            expect_shape(op, name, bias, (n,), f"[N={n}]")
    expect(act in ACTIVATIONS, op, "act", f"be one of {', '.join(ACTIVATIONS)}", repr(act))
    return n, k


def _fake(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Any,
    gate_bias: Any,
    up_bias: Any,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], gate_weight.shape[0])
    kept = shape if save else (0,)
    return x.new_empty(shape), x.new_empty(kept), x.new_empty(kept)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate: Any,
    up: Any,
    act: str,
    *need: bool,
) -> tuple[Tensor, ...]:
    need_x, need_weight, need_bias = need
    n, k = gate_weight.shape
    flipped = is_transposed(gate_weight) and is_transposed(up_weight)

    def weight() -> Tensor:
        if not need_weight:
            return x.new_empty(0)
        return x.new_empty(k, n).t() if flipped else x.new_empty(n, k)

    sums = [x.new_empty(n if need_bias else 0) for _ in range(2)]
    return x.new_empty(x.shape if need_x else 0), weight(), weight(), *sums


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate_weight, up_weight, gate_bias, up_bias, act, _ = inputs
    _, gate, up = output
    ctx.save_for_backward(x, gate_weight, up_weight, gate, up)
    ctx.act = act
    ctx.with_bias = gate_bias is not None, up_bias is not None


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple:
    needs = ctx.needs_input_grad
    wanted = [needs[i] for i in range(3)]
    wanted += [needs[3 + i] and ctx.with_bias[i] for i in range(2)]
    need = wanted[0], wanted[1] or wanted[2], wanted[3] or wanted[4]
    grads = _linear_glu_backward(grad_out, *ctx.saved_tensors, ctx.act, *need)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None


register_fake("linear_glu", _fake)
register_fake("linear_glu_backward", _backward_fake)
_linear_glu_backward = below_autograd("linear_glu_backward")
_linear_glu = differentiable("linear_glu", _setup, _gradients, statistics=(1, 2))
