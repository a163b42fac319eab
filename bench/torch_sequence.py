"""What plain torch does, operator by operator, as bytes through memory and FLOPs; nothing fused.

Operators that torch fuses itself (layer_norm, log_softmax, addmm's bias) count as one. Small
results such as statistics are left out, in torch's favour.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyfast.testing import Case

BYTES = 2  # of a bfloat16


class Pass(NamedTuple):
    """One operator: what it moves at least, and multiplies."""

    what: str
    bytes: int
    flops: int = 0


def passes(case: Case) -> list[Pass]:
    """Forward and backward of a case in bfloat16; only the shapes of its inputs are used."""
    with torch.device("meta"):
        shapes = _Shapes(torch.bfloat16)
        inputs = case.make(shapes)
    return SEQUENCES[case.op](inputs)


class _Shapes:
    """Stands for the maker of a case's tensors: shapes without values."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)


def _elementwise(what: str, size: int, tensors: int) -> Pass:
    return Pass(what, BYTES * size * tensors)


def _matmul(what: str, m: int, k: int, n: int, batch: int = 1) -> Pass:
    return Pass(what, BYTES * batch * (m * k + k * n + m * n), 2 * batch * m * k * n)


def _linear(m: int, k: int, n: int) -> list[Pass]:
    return [
        _matmul("linear", m, k, n),
        _matmul("linear, grad of input", m, n, k),
        _matmul("linear, grad of weight", n, m, k),
    ]


def _linear_act(inputs: dict[str, Any]) -> list[Pass]:
    (m, k), n = inputs["x"].shape, len(inputs["weight"])
    size = m * n
    act = [_elementwise("activation", size, 2), _elementwise("activation, grad", size, 3)]
    return [*_linear(m, k, n), *act, _elementwise("sum of bias", size, 1)]


def _linear_glu(inputs: dict[str, Any]) -> list[Pass]:
    (m, k), n = inputs["x"].shape, len(inputs["gate_weight"])
    size = m * n
    between = [_elementwise("silu", size, 2), _elementwise("mul", size, 3)]
    between += [_elementwise("mul, grad", size, 3)] * 2
    between += [_elementwise("silu, grad", size, 3), _elementwise("add of grads", m * k, 3)]
    return [*_linear(m, k, n), *_linear(m, k, n), *between]


def _loss(size: int) -> list[Pass]:
    forward = [_elementwise("log_softmax", size, 2)]
    backward = [_elementwise("nll_loss, grad", size, 1), _elementwise("log_softmax, grad", size, 3)]
    return forward + backward


def _cross_entropy(inputs: dict[str, Any]) -> list[Pass]:
    return _loss(inputs["input"].numel())


def _linear_cross_entropy(inputs: dict[str, Any]) -> list[Pass]:
    (m, k), n = inputs["input"].shape, len(inputs["linear_weight"])
    return [*_linear(m, k, n), *_loss(m * n)]


def _attention(inputs: dict[str, Any]) -> list[Pass]:
    batch, heads, queries, size = inputs["query"].shape
    keys = inputs["key"].shape[2]
    scores = heads * batch * queries * keys
    products = [_matmul("product of tiles", queries, size, keys, batch * heads)] * 6
    softmax = [_elementwise("scale and mask", scores, 2), _elementwise("softmax", scores, 2)]
    softmax += [_elementwise("softmax, grad", scores, 3), _elementwise("scale, grad", scores, 2)]
    return products + softmax


def _rope(inputs: dict[str, Any]) -> list[Pass]:
    size = inputs["x"].numel()
    steps = [("mul", 2), ("neg", 1), ("cat", 2), ("mul", 2), ("add", 3)]
    return [_elementwise(what, size, n) for what, n in steps * 2]


def _layer_norm(inputs: dict[str, Any]) -> list[Pass]:
    size = inputs["input"].numel()
    backward = [_elementwise("layer_norm, grad", size, 3), _elementwise("grad of weight", size, 2)]
    return [_elementwise("layer_norm", size, 2), *backward]


def _rms_norm(inputs: dict[str, Any]) -> list[Pass]:
    size = inputs["input"].numel()
    forward = [("square", 2), ("mean", 1), ("mul by rsqrt", 2), ("mul by weight", 2)]
    backward = [("mul by weight, grad", 2), ("grad of weight", 3), ("mul by rsqrt, grad", 2)]
    backward += [("grad of rsqrt", 2), ("square, grad", 3), ("add of grads", 3)]
    return [_elementwise(what, size, n) for what, n in forward + backward]


def _adamw(inputs: dict[str, Any]) -> list[Pass]:
    size = sum(p.numel() for p in inputs["params"])
    steps = [("mul_ decay", 2), ("lerp_", 3), ("mul_", 2), ("addcmul_", 3), ("sqrt", 2)]
    steps += [("div_", 2), ("add_", 2), ("addcdiv_", 4)]
    return [_elementwise(what, size, n) for what, n in steps]


SEQUENCES: dict[str, Callable[[dict[str, Any]], list[Pass]]] = {
    "linear_act": _linear_act,
    "linear_glu": _linear_glu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "rope": _rope,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "adamw_step_": _adamw,
}
