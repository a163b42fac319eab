"""Gradients of many rows: of a narrow layer block by block, of others in chunks, on the CPU."""

import pytest
import torch

from pyfast import backend, testing
from pyfast.tolerance import check_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# At the limits of what is narrow (1024 rows, a weight of 2^13) and beside them; three classes of 17
# features, whose lines are shorter than a vector; blocks of 96 to 98 rows, the last one short.
NARROW = {
    "three classes": testing.linear_act(2000, 17, 3, "none"),
    "one feature": testing.linear_act(1025, 1, 33, "tanh"),
    "transposed": testing.linear_act(1100, 120, 65, "gelu", flipped=True),
    "a whole block wide": testing.linear_act(1024, 256, 32, "relu", bias=False),
    "two weights": testing.linear_glu(1031, 50, 31, bias=True),
}
CHUNKS = {
    "a row too few": testing.linear_act(1023, 65, 33, "silu"),
    "too large a weight": testing.linear_act(2100, 129, 128, "gelu_tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NARROW, *CHUNKS])
def test_linear_gradients_of_many_rows(name: str, dtype: torch.dtype) -> None:
    with backend.using("cpp"):
        check_case((NARROW | CHUNKS)[name], dtype)
