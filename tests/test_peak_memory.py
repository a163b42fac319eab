"""No operation takes more memory beyond its results than it says: measured, on its first call.

What each says stands in the docstring of its door, and here once more as a formula.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pyfast import backend
from tests.peak_of_calls import CASES, THREADS

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

ROOT = Path(__file__).resolve().parent.parent
MB = 1 << 20
SLACK = 11 * MB // 2  # a huge page at either end; statistics of rows, pages of torch's own
CHUNK = 1024  # rows of a linear layer's backward that are packed at a time


def packed(m: int, k: int, n: int) -> Callable[[str, int], int]:
    """Of a linear layer: copies of its operands; in the backward for 1024 rows at a time."""

    def most(direction: str, size: int) -> int:
        forward = size * (m * k + n * k)
        rows = min(m, CHUNK) + 128
        backward = size * (2 * rows * n + rows * k + n * k) + 4 * n * k
        return forward if direction == "forward" else max(forward, backward)

    return most


PROMISES: dict[str, Callable[[str, int], int]] = {
    "linear_act": packed(1500, 512, 1000),
    "linear_glu": packed(1500, 512, 2000),
    "cross_entropy": lambda direction, size: 0,
    "linear_cross_entropy": lambda direction, size: max(16 * MB, 1024 * 40000 * size // 8),
    "linear_cross_entropy/160x128->40000": lambda direction, size: 40 * MB,  # logits kept whole
    "attention": lambda direction, size: THREADS * (1 if direction == "forward" else 4) * MB,
    "layer_norm": lambda direction, size: 4 * 64 * 1024,
    "rms_norm": lambda direction, size: 4 * 64 * 1024,
    "rope": lambda direction, size: 0,
    "adamw_step_": lambda direction, size: 0,
}


@cache
def measured() -> dict[str, dict[str, int | None]]:
    run = [sys.executable, "-m", "tests.peak_of_calls"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_takes_no_more_than_it_says(case: object, dtype: str) -> None:
    for direction, extra in measured()[f"{case} torch.{dtype}"].items():
        if extra is None:
            pytest.skip("needs /proc/self/clear_refs")
        promise = PROMISES.get(str(case), PROMISES[case.op])
        most = promise(direction, 4 if dtype == "float32" else 2)
        assert extra <= most + SLACK, f"{direction}: {extra / MB:.1f} MB, not {most / MB:.1f}"


def test_every_operation_has_a_promise() -> None:
    assert {name.split("/")[0] for name in PROMISES} == set(backend.OPS)
    assert {case.op for case in CASES} == set(backend.OPS)
