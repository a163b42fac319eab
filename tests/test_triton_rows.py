"""Norms and cross entropies in Triton, on the emulator: what their cases leave open."""

import math
from collections.abc import Iterator

import pytest
import torch

import pyfast
from pyfast import testing

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import emulated
from tests.triton_lanes import check


@pytest.fixture
def on_triton() -> Iterator[None]:
    with emulated(), pyfast.using("triton"):
        yield


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norms_of_long_rows_keep_the_digits_of_float32(op) -> None:
    """Too wide for registers, where 16 bits would hide much."""
    check(testing.norm(op, 3, 8195, residual=True), torch.float32, 80)


def test_cross_entropy_programs_take_several_tiles() -> None:
    """33 tiles of 256 rows for the 16 programs of one processor."""
    log = check(testing.cross_entropy(8210, 2), torch.float32, 80, processors=1)
    assert [launch.grid[0] for launch in log if "tile" in launch.name] == [16, 16]


def test_cross_entropy_of_a_target_that_is_no_class_is_nan(on_triton) -> None:
    """The host cannot know without waiting; nothing is read out of bounds for it."""
    x = torch.randn(4, 37, requires_grad=True)
    target = torch.tensor([3, 37, -1, 2**62])
    for weight in (None, torch.ones(80)[:37]):
        x.grad = None
        loss = pyfast.cross_entropy(x, target, weight, reduction="none", label_smoothing=0.1)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, True, True]
        assert x.grad.isnan().any(1).tolist() == [False, True, True, True]


def test_cross_entropy_keeps_the_digits_of_large_logits(on_triton) -> None:
    x = torch.randn(3, 77) - 1000.0
    x[:, 5:40] = -math.inf
    target = torch.tensor([0, 1, 70])
    ours = pyfast.cross_entropy(x, target, reduction="none", label_smoothing=0.0)
    truth = pyfast.reference.cross_entropy(x.double(), target, reduction="none")
    assert torch.allclose(ours.double(), truth, rtol=1e-5)
    ignored = pyfast.cross_entropy(x, torch.full((3,), -100))
    assert ignored.isnan()  # the mean of nothing, as in torch


def test_cross_entropy_reads_a_slice_in_place(on_triton) -> None:
    """Rows of a larger matrix, and gradients that are one number stretched over the rows."""
    wide = torch.randn(5, 300)
    x = wide[:, 3:136].requires_grad_()
    target = torch.tensor([0, 5, 132, -100, 7])
    pyfast.cross_entropy(x, target, reduction="none").sum().backward()
    (truth,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target, reduction="sum"), x)
    assert torch.allclose(x.grad, truth, atol=1e-6)
