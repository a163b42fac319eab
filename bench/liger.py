"""Liger-Kernel's Triton kernels on the inputs of our cases, where it is installed."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.torch_sequence import BYTES, Pass
from pyfast.testing import Case


def _norm_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    inputs = case.inputs(torch.bfloat16)
    return inputs["input"], inputs["weight"], torch.ones_like(inputs["input"])


def layer_norm(case: Case) -> None:
    """Forward and backward."""
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

    x, weight, dy = _norm_inputs(case)
    bias = torch.zeros_like(weight)
    _, flat, mean, rstd, *_ = layer_norm_forward(x, weight, bias, 1e-5)
    layer_norm_backward(dy, flat, weight, bias, mean, rstd)


def rms_norm(case: Case) -> None:
    """Forward and backward."""
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

    x, weight, dy = _norm_inputs(case)
    _, flat, rstd, block, warps, mode = rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)
    rms_norm_backward(dy, flat, weight, rstd, 0.0, mode, block, warps, False, None)


def cross_entropy(case: Case) -> None:
    """Forward, which makes the gradient in place of the logits."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    inputs = case.inputs(torch.bfloat16)
    logits = inputs["input"].requires_grad_()
    cross_entropy_forward(
        logits, inputs["target"], None, -100, 0.0, 0.0, "mean", None, False
    )  # fmt: skip


def passes(case: Case, processors: int) -> list[Pass]:
    """What Liger leaves to torch beside its kernels: partial weight gradients, a row for each
    processor, are added up and then rounded."""
    names = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",)}.get(case.op, ())
    cols = case.inputs(torch.bfloat16)["weight"].numel() if names else 0
    found = []
    for name in names:
        found.append(Pass(f"sum, grad of {name}", 4 * cols * (processors + 1)))
        found.append(Pass(f"to bfloat16, grad of {name}", (4 + BYTES) * cols))
    return found


CALLS: dict[str, Callable[[Case], None]] = {}
if find_spec("liger_kernel"):
    CALLS = {f.__name__: f for f in (layer_norm, rms_norm, cross_entropy)}
