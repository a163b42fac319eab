"""Registration of an operation: its fake (shapes without data) and its gradient, once, for two callers.

Measured per small call, forward and backward: a formula registered with torch.library costs about 60 us
more than a `torch.autograd.Function` that calls the op below autograd. Eager calls take the Function,
traced ones (torch.compile, export) and direct calls of torch.ops the registered formula; both run the same
`setup` and `gradients`. Double backward is refused by both (`once_differentiable`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pyfast import backend

_below_autograd = torch._C._AutoDispatchBelowAutograd


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """`fake(*args)` gives outputs of the right shape, dtype and device for op `name`."""
    if backend.extension() is not None:
        torch.library.register_fake(f"pyfast::{name}", fake)


def below_autograd(name: str) -> Callable[..., Any]:
    """Op `name` for callers that see to the gradient themselves: cheaper, and records nothing."""
    op = _overload(name)

    def call(*args: Any) -> Any:
        with _below_autograd():
            return op(*args)

    return call


def differentiable(
    name: str,
    setup: Callable[[Any, tuple, Any], None],
    gradients: Callable[..., Any],
    statistics: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Op `name` with autograd: `setup(ctx, inputs, output)` saves, `gradients(ctx, *grads)` answers.

    `statistics` lists the outputs that carry no gradient (what is kept for the backward only).
    """
    if backend.extension() is None:
        return _overload(name)
    op, formula = _overload(name), once_differentiable(gradients)
    torch.library.register_autograd(f"pyfast::{name}", formula, setup_context=setup)

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = op(*args)
        setup(ctx, args, output)
        ctx.mark_non_differentiable(*(output[i] for i in statistics))
        ctx.set_materialize_grads(False)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled():
            return function.apply(*args)
        with _below_autograd():
            return op(*args)

    return call


def _overload(name: str) -> Callable[..., Any]:
    if backend.extension() is not None:
        return getattr(torch.ops.pyfast, name).default

    def missing(*_: Any) -> Any:
        raise RuntimeError(f"{name}: pyfast._C must be built; got none; see `pyfast doctor`")

    return missing
