"""The tolerance rule: a kernel may err twice as far from float64 as torch in the same dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pyfast
from pyfast import reference
from pyfast.testing import Case, Maker


def convert(case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with floating tensors in `dtype`."""
    return {
        name: value.detach().to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in case.constants
        else value
        for name, value in inputs.items()
    }


def call(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of one call, as a tuple."""
    out = function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(
    case: Case, function: Callable[..., Any], inputs: dict[str, Any]
) -> list[tuple[str, Tensor]]:
    """Outputs, and gradients of a fixed random weighting of them, with names for messages."""
    live = {
        name: value.detach().clone().requires_grad_() if name in case.grads else value
        for name, value in inputs.items()
    }
    outputs = call(function, live)
    make = Maker(torch.float32, seed=1)
    weights = [make.normal(*out.shape).to(out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, [live[name] for name in case.grads], weights)
    named = [(f"output {i}", out.detach()) for i, out in enumerate(outputs)]
    return named + [(f"grad_{name}", g) for name, g in zip(case.grads, grads, strict=True)]


def assert_as_good_as_torch(what: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """|ours - truth| <= 2 max|theirs - truth| + a few eps of max|truth|, element by element.

    `theirs` is torch in the same dtype, `truth` the same computation in float64. Raises
    AssertionError with the worst element otherwise.
    """
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, not {theirs.dtype}"
    if not truth.numel():
        return
    finite = truth.isfinite()
    same = torch.where(finite, torch.zeros_like(truth), truth).nan_to_num(nan=7e77)
    mine = torch.where(finite, torch.zeros_like(truth), ours.double()).nan_to_num(nan=7e77)
    assert torch.equal(same, mine), f"{what}: not finite in other places than the truth"
    if not finite.any():
        return
    error = torch.where(finite, (ours.double() - truth).abs(), torch.zeros_like(truth))
    torch_error = (theirs.double() - truth)[finite].abs().nan_to_num(nan=0.0).max()
    eps = torch.finfo(ours.dtype).eps
    floor = 64 if ours.dtype == torch.float64 else 8  # the truth rounds in float64 as well
    allowed = 2 * torch_error + floor * eps * truth[finite].abs().max()
    worst = error.nan_to_num(nan=float("inf")).argmax()
    at = [int(i) for i in torch.unravel_index(worst, truth.shape)]
    values = [float(t.flatten()[worst]) for t in (ours, theirs, truth)]
    assert error.flatten()[worst] <= allowed, (
        f"{what} {ours.dtype} {list(ours.shape)}: worst at {at}: ours {values[0]:.9g}, "
        f"torch {values[1]:.9g}, truth {values[2]:.9g}; allowed {float(allowed):.3g}"
    )


def check_case(case: Case, dtype: torch.dtype, inputs: dict[str, Any] | None = None) -> None:
    """Values and gradients of the door against the reference, by the tolerance rule."""
    inputs = case.inputs(dtype) if inputs is None else inputs
    plain = getattr(reference, case.op)
    ours = outputs_and_gradients(case, getattr(pyfast, case.op), inputs)
    theirs = outputs_and_gradients(case, plain, inputs)
    truth = outputs_and_gradients(case, plain, convert(case, inputs, torch.float64))
    for (name, mine), (_, other), (_, exact) in zip(ours, theirs, truth, strict=True):
        assert_as_good_as_torch(f"{case} {name}", mine, other, exact.double())
