"""The attention of the CPU where its rows, strips, panels and runs of keys end, on every level."""

from collections.abc import Iterator

import pytest

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case, attention
from pyfast.tolerance import check_case

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

ISAS = backend.extension().supported_isas() if backend.extension() else []
FEW = [  # queries: keys are read as they lie
    attention(1, 2, 1, 40, tk=300),
    attention(2, 2, 2, 24, tk=33, mask="additive"),
    attention(1, 4, 3, 17, kv=2, tk=70),
    attention(1, 2, 7, 80, tk=530, mask="bool"),
    attention(1, 2, 10, 64, tk=5, causal=True),
    attention(2, 1, 12, 72, causal=True),
    attention(1, 6, 13, 33, kv=2, tk=300, mask="additive"),
    attention(1, 1, 16, 256, tk=31),
    attention(2, 3, 21, 16, tk=290, causal=True),
    attention(1, 8, 30, 20, kv=1, tk=45),
    attention(1, 2, 64, 48, tk=129, mask="bool"),
]
MANY = [
    attention(2, 2, 65, 24, tk=130, mask="bool"),
    attention(1, 1, 83, 256, causal=True),
    attention(1, 12, 33, 32, kv=1, tk=140),
    attention(1, 3, 200, 72, tk=97, mask="additive"),
    attention(1, 4, 150, 40, kv=2, tk=300, causal=True),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backend.extension().isa()
    backend.select_isa(request.param)
    yield request.param
    backend.select_isa(before)


@pytest.mark.parametrize("case", FEW + MANY, ids=str)
def test_attention_is_right_at_its_edges(case: Case, isa: str) -> None:
    with pyfast.using("cpp"):
        for dtype in testing.DTYPES:
            check_case(case, dtype)
