"""Runs cases of pyfast.testing through the Triton kernels, on the emulator."""

from typing import Any

import torch

import pyfast
from pyfast.testing import Case
from tests.emulator.triton import Launch, emulated
from tests.run_case import assert_as_good_as_torch

# A kernel differs little from one 16-bit dtype to the other; wgmma comes with capability 9.0.
LANES = [(torch.float32, 80), (torch.bfloat16, 90), (torch.float16, 80)]


def runs(found: list[Case]) -> list[tuple[Case, torch.dtype, int]]:
    """The first case in every lane; each other in float32 and in one 16-bit lane, in turn."""
    lanes = [LANES] + [[LANES[0], LANES[1 + i % 2]] for i in range(len(found) - 1)]
    return [(case, *lane) for case, some in zip(found, lanes, strict=True) for lane in some]


def check(
    case: Case, dtype: torch.dtype, capability: int, change: Any = None, **options: Any
) -> list[Launch]:
    """Values and gradients are as good as torch's and no rule of memory is broken; the launches.

    With all that is approximate shifted, unless asked otherwise: tolerances hold there, too.
    """
    options = {"perturb": True} | options
    with emulated(capability, **options) as log, pyfast.using("triton"):
        assert_as_good_as_torch(case, dtype, change)
    assert log and {launch.binary.capability for launch in log} == {capability}
    return log


def check_twice(case: Case, dtype: torch.dtype, capability: int) -> None:
    """As it is, and again in another order of the warps with all that is approximate shifted."""
    check(case, dtype, capability, perturb=False)
    check(case, dtype, capability, order="random", seed=1)
