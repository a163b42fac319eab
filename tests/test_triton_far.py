"""Offsets past 2**31 elements: tensors of few elements whose strides span gigabytes, never touched.

Strides fit into 32 bits, and so do indices; only their product does not. Capability 8.0 alone: the
maps of 9.0 hold 64 bits by themselves.
"""

import resource
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import testing, triton_rooms

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import emulated
from tests.run_case import assert_as_good_as_torch

FAR = 2**30 + 64  # elements; two steps of it pass 2**31
LESS = 2**25 + 64  # of many steps: the 64 of a tile pass it
B = torch.bfloat16


def far(t: Tensor, dim: int) -> Tensor:
    """The same values, FAR elements, or LESS, between indices of `dim`, the others packed."""
    near = t.movedim(dim, 0).contiguous()
    apart = FAR if len(near) <= 4 else LESS
    there = torch.empty_strided(near.shape, [apart, *near.stride()[1:]], dtype=t.dtype)
    return there.copy_(near).movedim(0, dim)


# (case, {argument: the dimension whose stride is far}); 3 or 4 along each, or more than a tile has.
FORWARD: list[tuple[testing.Case, dict[str, int]]] = [
    (testing.rope(1, 2, 4, 16), {"x": 2}),
    (testing.rope(1, 4, 2, 16), {"x": 1}),
    (testing.rope(4, 1, 2, 16, interleaved=True), {"x": 0}),
    (testing.linear_act(8, 4, 8, "relu"), {"x": 1}),
    (testing.linear_act(8, 66, 8, "relu"), {"x": 1, "weight": 1}),
    (testing.linear_glu(4, 24, 8), {"x": 0}),
    (testing.linear_glu(4, 24, 8), {"up_weight": 0}),
    (testing.linear_glu(4, 66, 8), {"x": 1, "gate_weight": 1, "up_weight": 1}),
    (testing.linear_cross_entropy(4, 24, 40), {"input": 0}),
    (testing.attention(4, 1, 4, 16), {"query": 0}),
    (testing.attention(1, 4, 4, 16), {"key": 1}),
    (testing.attention(1, 2, 4, 16, mask="bool"), {"attn_mask": 2}),
]
BOTH = [
    (testing.cross_entropy(4, 40), {"input": 0}),
    (testing.linear_act(4, 24, 8, "relu"), {"x": 0}),
    (testing.linear_act(66, 24, 8, "relu"), {"x": 0}),
    (testing.attention(1, 2, 4, 16, causal=True), {"key": 2}),
]


@pytest.mark.parametrize(("case", "dims"), FORWARD, ids=str)
def test_offsets_pass_32_bits(case, dims) -> None:
    inputs = case.inputs(B)
    truth = getattr(pyfast.reference, case.op)(**inputs)
    inputs |= {name: far(inputs[name], dim) for name, dim in dims.items()}
    with emulated(), pyfast.using("triton"), torch.no_grad():
        ours = getattr(pyfast, case.op)(**inputs)
    torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("case", "dims"), BOTH, ids=str)
def test_offsets_of_gradients_pass_32_bits(case, dims) -> None:
    def change(name: str, t: Tensor) -> Tensor:
        return far(t, dims[name]) if name in dims else t

    assert set(dims) <= set(case.inputs(B))
    with emulated(), pyfast.using("triton"):
        assert_as_good_as_torch(case, B, change)


def test_offsets_of_results_pass_32_bits() -> None:
    """A part of a larger matrix as the result; products alone, as no door asks for one."""
    product = triton_rooms._module("gradient_product")
    a, b = torch.randn(4, 24), torch.randn(24, 8)
    out = far(torch.full((4, 8), float("nan")), 0)
    with emulated():
        product.gradient_product(a, None, "none", b, out)
    torch.testing.assert_close(out, a @ b, atol=1e-4, rtol=1e-4)


def test_far_tensors_take_no_memory() -> None:
    """Nor does what the emulator knows of each of their words."""

    def resident() -> Any:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = resident()
    test_offsets_pass_32_bits(*FORWARD[0])
    assert resident() - before < 1 << 20
