"""Registration of an operation: its fake (shapes without data) and its gradient, for two callers.

Measured per small call, forward and backward: a formula registered with torch.library costs about
60 us more than a `torch.autograd.Function` that calls the op below autograd. Eager calls take the
Function, traced ones (torch.compile, export) and direct calls of torch.ops the registered formula;
both run the same `setup` and `gradients`. Double backward is refused by both, in one sentence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast import backend

_below_autograd = torch._C._AutoDispatchBelowAutograd


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """`fake(*args)` gives outputs of the right shape, dtype and device for op `name`."""
    if backend.has_schemas():
        torch.library.register_fake(f"pyfast::{name}", fake)


def below_autograd(name: str) -> Callable[..., Any]:
    """Op `name` for callers that see to the gradient themselves: cheaper, and records nothing."""
    op = _overload(name)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        with _below_autograd():
            return op(*args)

    return call


def differentiable(
    name: str,
    setup: Callable[[Any, tuple, Any], None],
    gradients: Callable[..., Any],
    statistics: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Op `name` with autograd: `setup(ctx, inputs, output)` saves, `gradients(ctx, *grads)` works.

    `statistics` lists the outputs that carry no gradient (what is kept for the backward only).
    """
    if not backend.has_schemas():
        return _overload(name)
    op, formula = _overload(name), once(name, gradients)
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
        try:
            if torch.is_grad_enabled():
                for a in args:
                    if isinstance(a, Tensor) and a.requires_grad:
                        return function.apply(*args)
            with _below_autograd():
                return op(*args)
        except NotImplementedError:  # a sparse tensor that a door's quick look took for a dense one
            layouts = {a.layout for a in args if isinstance(a, Tensor)} - {torch.strided}
            if not layouts:
                raise
            got = layouts.pop()
            raise TypeError(f"{name}: every tensor must be dense; got {got}") from None

    return call


def once(name: str, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`gradients`, whose results refuse to be differentiated again; nothing in, nothing out."""

    def formula(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            return gradients(ctx, *grads)
        with torch.no_grad():  # create_graph=True
            results = gradients(ctx, *grads)
        results = results if isinstance(results, tuple) else (results,)
        words = f"{name}: order of the derivative must be 1, double backward is not offered; got 2"
        refuse = torch._C._functions.DelayedError(
            f'{words}; use pyfast.using("torch")', len(results)
        )
        known = [None if r is None else r.detach().requires_grad_() for r in results]
        refused = refuse(*known)
        return refused if isinstance(refused, tuple) else (refused,)

    return formula


def _overload(name: str) -> Callable[..., Any]:
    if backend.has_schemas():
        return getattr(torch.ops.pyfast, name).default

    def missing(*_: Any) -> Any:
        raise RuntimeError(f"{name}: pyfast._C must be built; got none; see `pyfast doctor`")

    return missing
