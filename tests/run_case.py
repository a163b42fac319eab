"""Runs a case of pyfast.testing: against float64, on strided views, keeping the calls it makes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast import reference
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
    inputs = each_tensor(inputs, lambda _, t: same_layout(t))
    for name in case.grads:
        inputs[name].requires_grad_()
    out = function(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not case.grads:
        written = ("params", "exp_avgs", "exp_avg_sqs")
        return outs + [t for name in written for t in inputs.get(name, ())]
    torch.autograd.backward(outs, [cotangent(o) for o in outs])
    return [o.detach() for o in outs] + [inputs[name].grad for name in case.grads]


def same_layout(t: Tensor) -> Tensor:
    """A copy with the strides of `t`, gaps included."""
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return copy.copy_(t.detach())


def cotangent(out: Tensor) -> Tensor:
    """The same gradient of the output, up to its rounding, for every dtype."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return values.bfloat16().to(out.device, out.dtype)


def in_float64(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    def wide(name: str, t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() and name not in case.constants else t

    return each_tensor(inputs, wide)


def assert_as_good_as_torch(
    case: Case, dtype: torch.dtype, change: Any = None, slack: float = 0.0
) -> None:
    """|ours - truth| <= 2 max |torch - truth| + a few eps of (max |truth| + slack).

    `change(name, tensor)` prepares the inputs; `slack` is for sizes at which results may cancel.
    """
    inputs = each_tensor(case.inputs(dtype), change or (lambda _, t: t))
    plain = getattr(reference, case.op)
    ours = results(case, getattr(pyfast, case.op), inputs)
    theirs = results(case, plain, inputs)
    truths = results(case, plain, in_float64(case, inputs))
    for i, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        assert our.dtype == their.dtype and our.shape == their.shape
        if not our.numel():
            continue
        # in float64 torch's error cannot be measured against itself: allow for the order of sums
        floor = (64 if dtype == torch.float64 else 4) * torch.finfo(our.dtype).eps
        allowed = 2 * (their.double() - truth).abs().max() + floor * (truth.abs().max() + slack)
        error = (our.double() - truth).abs()
        at = int(error.argmax())
        same_nan = torch.equal(our.isnan(), truth.isnan()) and truth.isnan().any()
        assert error.max() <= allowed or same_nan, (
            f"{case} {dtype} result {i} at {at}: ours {our.flatten()[at]}, "
            f"torch {their.flatten()[at]}, truth {truth.flatten()[at]}"
        )


def strided(_: str, t: Tensor) -> Tensor:
    """The same values, every second element of each dimension of a larger tensor."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    big = t.new_zeros([2 * n for n in t.shape])
    view = big[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of a pyfast operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pyfast":
            left_out = func._schema.arguments[len(args) :]  # torch drops what is the default
            whole = (*args, *(argument.default_value for argument in left_out))
            self.calls.append((func, torch.utils._pytree.tree_map(detached, whole)))
        return func(*args, **(kwargs or {}))


def detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def recorded(case: Case) -> list[tuple[Any, tuple]]:
    """One call of each torch.ops.pyfast operation that forward and backward of the case make."""
    with pyfast.using("cpp"), Recorder() as recorder:
        results(case, getattr(pyfast, case.op), case.inputs(torch.float32))
    assert recorder.calls
    return list({call[0]: call for call in recorder.calls}.values())
