"""Runs a case of pyfast.testing, and keeps the calls of torch.ops.pyfast it makes on the way."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast.testing import Case


def each_tensor(inputs: dict[str, Any], change: Any) -> dict[str, Any]:
    """`inputs` with change(name, tensor) for every tensor, also in lists."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        return [changed(name, v) for v in value] if isinstance(value, list) else value

    return {name: changed(name, value) for name, value in inputs.items()}


def results(case: Case, function: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the gradient of each input of case.grads, or what the step has written."""
    inputs = each_tensor(inputs, lambda name, t: t.detach().clone())
    for name in case.grads:
        inputs[name].requires_grad_()
    out = function(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not case.grads:
        written = ("params", "exp_avgs", "exp_avg_sqs")
        return outs + [t for name in written for t in inputs.get(name, ())]
    torch.autograd.backward(outs, [cotangent(o) for o in outs])
    return [o.detach() for o in outs] + [inputs[name].grad for name in case.grads]


def cotangent(out: Tensor) -> Tensor:
    """The same gradient of the output, up to its rounding, for every dtype."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return values.bfloat16().to(out.dtype)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of a pyfast operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pyfast":
            self.calls.append((func, torch.utils._pytree.tree_map(detached, args)))
        return func(*args, **(kwargs or {}))


def detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def recorded(case: Case) -> list[tuple[Any, tuple]]:
    """One call of each torch.ops.pyfast operation that forward and backward of the case make."""
    with Recorder() as recorder:
        results(case, getattr(pyfast, case.op), case.inputs(torch.float32))
    assert recorder.calls
    return list({call[0]: call for call in recorder.calls}.values())
