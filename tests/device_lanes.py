"""Where tests/test_device.py runs: on a GPU, or (a dry run of it) on the emulator.

`pytest --device cuda|emulator`; without the option on a GPU where torch sees one, else nowhere.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from bench.devices import emulated
from pyfast import backend, cuda_rooms, reference, triton_rooms
from pyfast.testing import Case
from pyfast.tolerance import assert_as_good_as_torch
from tests.run_case import cotangent, each_tensor, in_float64, results

BACKENDS = ("auto", "cuda", "triton", "torch")


class Lane:
    """A device and the way to run a backend on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"

    @contextlib.contextmanager
    def using(self, chosen: str, op: str, dtype: torch.dtype) -> Iterator[None]:
        """Run `chosen` in this block; a backend that has no kernel for it skips with the reason."""
        if chosen == "auto" and self.name == "emulator":
            pytest.skip("on CPU tensors `auto` takes the C++ kernels")
        blocker = None
        if chosen == "cuda":
            blocker = cuda_rooms.blocker(op, dtype, backend._cuda)
        elif chosen == "triton":
            blocker = triton_rooms.blocker(op, dtype)
        if blocker:
            pytest.skip(blocker)
        on_emulator = self.name == "emulator" and chosen in ("cuda", "triton")
        with emulated(chosen) if on_emulator else pyfast.using(chosen):
            yield

    def put(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a case on the device, with their strides."""

        def placed(_: str, t: Tensor) -> Tensor:
            there = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
            return there.copy_(t)

        return each_tensor(inputs, placed)

    def run(self, case: Case, function: Any, inputs: dict[str, Any]) -> list[Tensor]:
        """Outputs and gradients, or what a step has written, on the CPU."""
        return [t.cpu() for t in results(case, function, inputs)]


def check(lane: Lane, case: Case, dtype: torch.dtype, chosen: str, change: Any = None) -> None:
    """By the tolerance rule: torch on the same device is its measure, float64 on the CPU the truth.

    What torch cannot do in this dtype there, it does on the CPU.
    """
    inputs = each_tensor(case.inputs(dtype), change or (lambda _, t: t))
    plain = getattr(reference, case.op)
    with lane.using(chosen, case.op, dtype):
        ours = lane.run(case, getattr(pyfast, case.op), lane.put(inputs))
    theirs = lane.run(case, plain, lane.put(inputs))
    truths = results(case, plain, in_float64(case, inputs))
    for i, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        assert_as_good_as_torch(f"{case} {chosen} result {i}", our, their, truth)


def gradients_like(outs: list[Tensor]) -> list[Tensor]:
    """The same gradients from above on every device."""
    return [cotangent(o).to(o.device) for o in outs]
