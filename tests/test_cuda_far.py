"""Offsets past 2**31 elements in the CUDA kernels: a few elements, gigabytes apart.

Of what is read: results are packed, and as large as their memory.
"""

from typing import Any

import pytest
import torch

import pyfast
from pyfast import testing
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import emulated
from tests.run_case import assert_as_good_as_torch

pytestmark = needs_emulator
triton_far = pytest.importorskip("tests.test_triton_far", reason="needs triton")

B, F = torch.bfloat16, torch.float32
# (case, dtype, {argument: the dimension whose stride is far}); tiles by mma.sync and by FMA. Far
# rows of the operands of products are far rows of tensor maps on capability 9.0.
FORWARD = [
    (testing.attention(4, 1, 4, 16), B, {"query": 0}),
    (testing.attention(1, 4, 4, 16), F, {"key": 1}),
    (testing.attention(1, 4, 4, 80), B, {"value": 1}),
    (testing.attention(1, 2, 4, 16), B, {"query": 2, "key": 2}),
    (testing.attention(1, 2, 66, 16), F, {"query": 2, "value": 2}),
    (testing.attention(1, 2, 4, 16, mask="bool"), B, {"attn_mask": 2}),
    (testing.attention(1, 2, 66, 16, mask="bool"), B, {"attn_mask": 2}),
    (testing.attention(1, 2, 4, 16, mask="bool"), B, {"attn_mask": 3}),
    (testing.linear_act(4, 24, 8, "relu"), B, {"weight": 0}),
    (testing.linear_glu(4, 24, 8), B, {"x": 0}),
    (testing.linear_glu(4, 24, 8), B, {"up_weight": 0}),
]
BOTH = [
    (testing.linear_act(66, 24, 8, "relu"), B, {"x": 0}),
    (testing.linear_act(4, 24, 8, "relu"), F, {"x": 0}),
    (testing.attention(1, 2, 4, 16, causal=True), B, {"key": 2}),
    (testing.attention(1, 2, 66, 80, causal=True), B, {"key": 2, "value": 2}),
    (testing.attention(1, 2, 66, 16, mask="additive"), B, {"query": 2, "attn_mask": 2}),
    (testing.attention(1, 2, 4, 200), B, {"value": 2}),
    (testing.attention(4, 2, 4, 200), F, {"value": 0, "key": 2}),
]


def moved(dims: dict[str, int]) -> Any:
    return lambda name, t: triton_far.far(t, dims[name]) if name in dims else t


def lanes(cases: list[tuple]) -> list[tuple]:
    """Each on both capabilities; of float32 they have one code."""
    return [(*case, capability) for case in cases for capability in (80, 90)[: 1 + (case[1] == B)]]


@pytest.mark.parametrize(("case", "dtype", "dims", "capability"), lanes(FORWARD), ids=str)
def test_offsets_pass_32_bits(case, dtype, dims, capability) -> None:
    inputs = case.inputs(dtype)
    truth = getattr(pyfast.reference, case.op)(**inputs)
    inputs = {name: moved(dims)(name, value) for name, value in inputs.items()}
    with emulated(capability), pyfast.using("cuda"), torch.no_grad():
        ours = getattr(pyfast, case.op)(**inputs)
    torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("case", "dtype", "dims", "capability"), lanes(BOTH), ids=str)
def test_offsets_of_gradients_pass_32_bits(case, dtype, dims, capability) -> None:
    assert set(dims) <= set(case.inputs(dtype))
    with emulated(capability), pyfast.using("cuda"):
        assert_as_good_as_torch(case, dtype, moved(dims))
