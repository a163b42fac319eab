"""Errors against float64: the largest difference, relative to the largest value of the truth."""

from typing import Any

import torch
from torch import Tensor

from bench.contestants import STEP, bind, copied, our_adamw
from pyfast import reference
from pyfast.testing import Case
from pyfast.tolerance import convert

Named = list[tuple[str, Tensor]]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|, over the places where the truth is finite."""
    if not truth.numel():
        return 0.0
    finite = truth.isfinite()
    difference = (value.to(truth.device, torch.float64) - truth).abs()
    worst = float(torch.where(finite, difference, 0.0).max())
    largest = float(torch.where(finite, truth.abs(), 0.0).max())
    return worst / largest if largest else worst


def worst_error(values: Named, exact: Named) -> float:
    """The largest relative error of the values; `exact` may have more at its end."""
    pairs = zip(values, exact, strict=False)
    return max(relative_error(value, true.double()) for (_, value), (_, true) in pairs)


def truth(case: Case, inputs: dict[str, Any], direction: str) -> Named:
    """The reference in float64 on the same inputs: outputs, and gradients or stepped lists."""
    plain = getattr(reference, case.op)
    wide = convert(case, inputs, torch.float64)
    if direction != STEP:
        return bind(case, plain, wide, direction)()
    lists = {k: [t.double() for t in v] for k, v in copied(wide).items() if isinstance(v, list)}
    return our_adamw(wide | lists, plain)()
