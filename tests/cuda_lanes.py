"""Runs cases of pyfast.testing through the CUDA C++ kernels, on the emulator."""

from typing import Any

import pytest
import torch

import pyfast
from pyfast.testing import Case
from tests.emulator import cuda
from tests.emulator.cuda import Launch, emulated
from tests.run_case import assert_as_good_as_torch

# sm_80's code runs on every newer GPU, sm_90a's on Hopper; the 16-bit dtypes differ in conversions.
LANES = [(torch.float32, 80), (torch.bfloat16, 90), (torch.float16, 80)]


needs_emulator = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def check(
    case: Case, dtype: torch.dtype, capability: int, change: Any = None, **options: Any
) -> list[Launch]:
    """Values and gradients are as good as torch's and no rule of memory is broken; the launches."""
    with emulated(capability, **options) as log, pyfast.using("cuda"):
        assert_as_good_as_torch(case, dtype, change)
    assert {launch.binary.capability for launch in log} <= {capability}
    return log


def check_twice(case: Case, dtype: torch.dtype, capability: int) -> None:
    """And again in another order of the warps, with all that is approximate shifted."""
    check(case, dtype, capability)
    check(case, dtype, capability, order="random", seed=1, perturb=True)
