"""The matrix products of the CPU where their panels, blocks and slices end, on every level."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case, linear_act, linear_cross_entropy, linear_glu
from pyfast.tolerance import check_case

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

ISAS = backend.extension().supported_isas() if backend.extension() else []
CASES = [
    linear_act(1, 1, 1, "none"),
    linear_act(2, 777, 300, "silu"),
    linear_act(3, 65, 257, "gelu", flipped=True),
    linear_act(4, 33, 65, "relu"),
    linear_act(5, 31, 70, "gelu"),
    linear_act(16, 97, 131, "silu"),
    linear_act(17, 64, 66, "none", bias=False),
    linear_act(32, 70, 1029, "gelu"),  # gradients of bfloat16 by pairs: up to 32 rows
    linear_act(33, 301, 65, "tanh", flipped=True),
    linear_act(64, 1025, 50, "none", bias=False),
    linear_act(65, 31, 257, "gelu_tanh"),
    linear_act(97, 513, 33, "none", flipped=True),
    linear_act(209, 1041, 300, "tanh"),
    linear_act(300, 65, 130, "silu"),
    linear_act(600, 1100, 17, "relu"),
    linear_act(150, 40, 3, "gelu"),  # short rows are joined
    linear_glu(3, 45, 300, bias=True),
    linear_glu(7, 130, 300, bias=True),
    linear_glu(29, 131, 133),
    linear_glu(97, 65, 129),
    linear_glu(131, 33, 65, "gelu_tanh"),
    # Narrow layers of many rows: at the limits, 1024 rows and 2^13 weights, and just beyond them.
    linear_act(2000, 17, 3, "none"),
    linear_act(1025, 1, 33, "tanh"),
    linear_act(1100, 120, 65, "gelu", flipped=True),
    linear_act(1024, 256, 32, "relu", bias=False),
    linear_glu(1031, 50, 31, bias=True),
    linear_act(1023, 65, 33, "silu"),
    linear_act(2100, 129, 65, "gelu_tanh"),
    # Few rows that count (the first never does): W is read as it lies.
    linear_cross_entropy(2, 77, 600, bias=True),
    linear_cross_entropy(4, 33, 301, weighted=True, label_smoothing=0.1),
    linear_cross_entropy(5, 33, 301),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backend.extension().isa()
    backend.select_isa(request.param)
    yield request.param
    backend.select_isa(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_is_right_at_its_edges(case: Case, isa: str) -> None:
    with pyfast.using("cpp"):
        for dtype in testing.DTYPES:
            check_case(case, dtype)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the flags are read from Linux")
def test_levels_follow_the_processor() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ("avx512_bf16" in ISAS) == ("avx512_bf16" in flags)
    assert ("avx2" in ISAS) == ("avx2" in flags)
