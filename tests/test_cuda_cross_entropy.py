"""cross_entropy in CUDA C++: hostile targets, large logits, views, rows of several blocks."""

import math
import re

import pytest
import torch

import pyfast
from tests.cuda_lanes import needs_emulator
from tests.emulator import nvcc
from tests.emulator.cuda import ROOT, emulated

pytestmark = needs_emulator


@pytest.fixture
def on_cuda():
    with emulated() as log, pyfast.using("cuda"):
        yield log


def test_cross_entropy_of_a_target_that_is_no_class_is_nan(on_cuda) -> None:
    """The host cannot know without waiting; nothing is read out of bounds for it."""
    x = torch.randn(4, 37, requires_grad=True)
    target = torch.tensor([3, 37, -1, 2**62])
    weight = torch.rand(37)
    for given in (None, weight):
        x.grad = None
        loss = pyfast.cross_entropy(x, target, given, reduction="none", label_smoothing=0.1)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, True, True]
        assert x.grad.isnan().any(1).tolist() == [False, True, True, True]


def test_cross_entropy_keeps_the_digits_of_large_logits(on_cuda) -> None:
    x = torch.randn(3, 77) - 1000.0
    x[:, 5:40] = -math.inf
    target = torch.tensor([0, 1, 70])
    ours = pyfast.cross_entropy(x, target, reduction="none")
    truth = pyfast.reference.cross_entropy(x.double(), target, reduction="none")
    assert torch.allclose(ours.double(), truth, rtol=1e-5)
    ignored = pyfast.cross_entropy(x, torch.full((3,), -100))
    assert ignored.isnan()  # the mean of nothing, as in torch


def test_cross_entropy_reads_a_slice_in_place(on_cuda) -> None:
    """Rows of a larger matrix, each at another distance from a sector than its gradient."""
    wide = torch.randn(5, 301)
    x = wide[:, 3:136].requires_grad_()
    target = torch.tensor([0, 5, 132, -100, 7])
    pyfast.cross_entropy(x, target, reduction="none").sum().backward()
    (truth,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target, reduction="sum"), x)
    assert torch.allclose(x.grad, truth, atol=1e-6)


def test_cross_entropy_splits_long_rows(on_cuda) -> None:
    """Past 65536 classes a row has a block for each part; one kernel more joins them."""
    x, target = torch.randn(2, 65537), torch.tensor([65536, 4])
    loss = pyfast.cross_entropy(x, target, reduction="none")
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(x, target, reduction="none"))
    assert [(launch.name, launch.grid[:2]) for launch in on_cuda] == [
        ("cross_entropy_forward_kernel", (2, 2)),
        ("cross_entropy_join_kernel", (1, 1)),
    ]


def test_cross_entropy_streams_its_gradient(on_cuda) -> None:
    """16 bytes at once wherever rows begin, past the caches: a gradient of logits fills them."""
    x = torch.randn(3, 1001, dtype=torch.bfloat16, requires_grad=True)
    pyfast.cross_entropy(x, torch.tensor([5, 0, 1000])).backward()
    (backward,) = [launch for launch in on_cuda if "backward" in launch.name]
    assert backward.stats.store_sectors <= 3 * (1001 * 2 // 32 + 5)
    text = ptx_of("cross_entropy")
    kernel = text[text.index(backward.binary.mangled) :]
    kernel = kernel[: kernel.index("\n}")]
    assert "st.global.cs.v4" in kernel and re.search(r"ld\.global(\.nc)?\.v4", kernel)


def ptx_of(file: str) -> str:
    flags = ["--expt-relaxed-constexpr", "-std=c++20"]
    return nvcc.compile_ptx(ROOT / "csrc" / "cuda" / f"{file}.cu", "sm_80", flags)
