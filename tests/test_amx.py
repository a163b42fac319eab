"""The AMX kernels, with plain C++ in the place of the tile instructions where there are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast import backend, build

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import torch
from pyfast import backend
from pyfast.testing import attention, cases
from pyfast.tolerance import check_case

assert backend.extension().isa() == "amx", backend.extension().isa()
ops = ("linear_act", "linear_glu", "linear_cross_entropy", "attention")
checked = [case for op in ops for case in cases(op)]
checked += [
    attention(2, 2, 33, 24, tk=130, mask="additive"),
    attention(1, 1, 19, 256, causal=True),
    attention(1, 4, 150, 40, kv=2, tk=300, causal=True),
]
for case in checked:
    check_case(case, torch.bfloat16)
print(len(checked), "cases")
"""


@pytest.fixture(scope="module")
def emulated() -> Path:
    """An extension whose AMX level runs on every AVX-512 machine; it shares the other objects."""
    if backend.extension() is None or "avx512" not in backend.extension().supported_isas():
        pytest.skip("the AMX kernels around the tiles are AVX-512 code, which this machine lacks")
    if reason := build.blocker():
        pytest.skip(reason)
    library = ROOT / "build" / "emulated" / build.library_name()
    return build.build(library, ROOT / "build" / "objects", emulate_tiles=True)


def test_amx_kernels_are_as_good_as_torch(emulated: Path) -> None:
    environment = os.environ | {"PYFAST_EXTENSION": str(emulated), "PYFAST_CPU_ISA": "amx"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases" in done.stdout
