"""Prints as JSON what the first call of every operation takes, in a process of its own.

Scratch memory is kept from call to call: only a first call shows all of it. Each figure is the
bytes beyond what was resident before the call and beyond its results (outputs, what it saves for
the backward, gradients), forward and forward+backward.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

import pyfast
from bench.contestants import FORWARD, TRAINING
from bench.memory import reset_peak, resident
from pyfast.testing import (
    Case,
    adamw,
    attention,
    cross_entropy,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    norm,
    rope,
)
from pyfast.tolerance import call as outputs_of

THREADS = 2
CASES = [
    linear_act(1500, 512, 1000, "gelu_tanh"),
    linear_glu(1500, 512, 1000),
    cross_entropy(256, 30000),
    linear_cross_entropy(1024, 128, 40000),
    linear_cross_entropy(160, 128, 40000),
    attention(1, 4, 2048, 64, causal=True),
    attention(1, 8, 1, 64, tk=8192),
    norm("layer_norm", 4096, 1024, residual=True),
    norm("rms_norm", 4096, 1024),
    rope(1, 16, 2048, 128),
    adamw(((4000, 1000), (1000,)), max_norm=1.0),
]
TINY = [
    linear_act(5, 3, 4, "gelu_tanh"),
    linear_glu(5, 3, 4),
    cross_entropy(5, 7),
    linear_cross_entropy(5, 3, 7),
    attention(1, 1, 5, 3),
    norm("layer_norm", 5, 3, residual=True),
    norm("rms_norm", 5, 3),
    rope(1, 1, 5, 4),
    adamw(((3, 2),)),
]


def extra_of(call: Callable[[], tuple[Tensor, ...]], known: list[Tensor]) -> int | None:
    """Bytes of one call beyond its results; None where the system does not tell."""
    sizes: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    if not reset_peak():
        return None
    before = resident()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        results = call()
    peak = resident("VmHWM")
    for result in results:
        keep(result)
    for tensor in known:  # was there before
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return peak - before - sum(sizes.values())


def first_calls(case: Case, dtype: torch.dtype) -> dict[str, int | None]:
    """The figure of each direction."""
    inputs = case.inputs(dtype)
    function = getattr(pyfast, case.op)
    if not case.grads:
        return {"step": extra_of(lambda: (function(**inputs),), [])}
    live = {k: v.requires_grad_() if k in case.grads else v for k, v in inputs.items()}
    known = [value for value in live.values() if isinstance(value, Tensor)]
    leaves = [live[name] for name in case.grads]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs_of(function, live)

    found = {FORWARD: extra_of(forward, known)}
    weights = [torch.ones_like(out) for out in forward()]

    def training() -> tuple[Tensor, ...]:
        outs = outputs_of(function, live)
        return *outs, *torch.autograd.grad(outs, leaves, weights)

    return found | {TRAINING: extra_of(training, [*known, *weights])}


def main() -> None:
    torch.set_num_threads(THREADS)
    found = {}
    with pyfast.using("cpp"):
        for dtype in (torch.float32, torch.bfloat16):
            for case in TINY:  # what torch and the threads take once, whatever the sizes
                first_calls(case, dtype)
            for case in CASES:
                found[f"{case} {dtype}"] = first_calls(case, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
