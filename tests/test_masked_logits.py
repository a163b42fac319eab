"""Logits that are huge, or infinite to stand for a mask, in both cross entropies, everywhere."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import pyfast
from bench.devices import emulated, emulated_backends

HERE = ["cpp", "torch", *emulated_backends()]
CLASSES = 200  # several tiles, and lanes that see nothing but masks


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    with pyfast.using(backend) if backend in ("cpp", "torch") else emulated(backend):
        yield


def losses(op: str, bias: torch.Tensor, target: torch.Tensor, **settings: float) -> tuple:
    """(ours, in float64) for each row of logits that are small but for the bias."""
    x, weight = torch.randn(target.numel(), 8), torch.randn(bias.numel(), 8)
    settings["reduction"] = "none"
    if op == "cross_entropy":
        found = pyfast.cross_entropy(x @ weight.t() + bias, target, **settings)
    else:
        found = pyfast.linear_cross_entropy(x, weight, target, linear_bias=bias, **settings)
    wide = x.double() @ weight.double().t() + bias.double()
    return found, F.cross_entropy(wide, target, **settings)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("backend", HERE)
def test_target_itself_may_be_masked(op, backend) -> None:
    """Sums over all classes of differences from the target's logit would overflow."""
    bias = torch.zeros(CLASSES)
    bias[7] = -1e37
    with running(backend):
        found, truth = losses(op, bias, torch.tensor([7, 0, 199]), label_smoothing=0.1)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("backend", HERE)
def test_most_classes_may_be_ruled_out(op, backend) -> None:
    bias = torch.full((CLASSES,), -torch.inf)
    bias[[3, 160]] = -1000.0
    with running(backend):
        found, truth = losses(op, bias, torch.tensor([3, 160, 3]))
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("classes", [CLASSES, 1031])
@pytest.mark.parametrize("backend", HERE)
def test_large_logits_lose_no_digits(op, classes, backend) -> None:
    """Whole numbers, which float32 holds: neighbours of their log-sum-exp lie 1/16 apart there."""
    x, weight = (torch.randint(-1, 2, (n, 8)).float() for n in (3, classes))
    bias, target = torch.full((classes,), -1e6), torch.tensor([0, classes - 1, 5])
    found = []
    for context, wide in ((running(backend), False), (contextlib.nullcontext(), True)):
        a, w, b = ((t.double() if wide else t.clone()).requires_grad_() for t in (x, weight, bias))
        with context:
            if op == "cross_entropy" or wide:
                function = F.cross_entropy if wide else pyfast.cross_entropy
                loss = function(a @ w.t() + b, target, reduction="none", label_smoothing=0.1)
            else:
                settings = {"reduction": "none", "label_smoothing": 0.1, "linear_bias": b}
                loss = pyfast.linear_cross_entropy(a, w, target, **settings)
            loss.backward(torch.tensor([1.0, 2.0, 3.0], dtype=loss.dtype))
        found.append([loss.detach(), a.grad, b.grad])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)
