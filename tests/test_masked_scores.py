"""Attention of scores at the ends of what floats hold, on every backend: masked, and large."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from bench.devices import emulated, emulated_backends
from pyfast import reference

HERE = ["cpp", *emulated_backends()]


def running(backend: str) -> contextlib.AbstractContextManager:
    return pyfast.using(backend) if backend == "cpp" else emulated(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_attention_masked_by_the_lowest_float_averages(backend, dtype) -> None:
    """A finite mask stays finite, in any unit of the exponents: no row sees nothing."""
    q, k, v = (torch.randn(1, 1, 5, 16).to(dtype) for _ in range(3))
    mask = torch.zeros(5, 5).to(dtype)
    mask[1] = torch.finfo(dtype).min
    with running(backend):
        out = pyfast.attention(q, k, v, mask)
    truth = reference.attention(q, k, v, mask)
    torch.testing.assert_close(out, truth, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def formula(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | float = 0.0, *, scale: float
) -> Tensor:
    return (q @ k.mT * scale + attn_mask).softmax(-1) @ v


def results(function: Callable[..., Tensor], operands: list[Tensor], **options: Any) -> dict:
    """The output and the gradients, by name."""
    live = [t.detach().clone().requires_grad_() for t in operands]
    out = function(*live, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(out, live, weights.to(out.dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def large_operands(time: int, dtype: torch.dtype, large: float) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, time, 64, generator=make) for _ in range(3))
    return [t.to(dtype) for t in (large * q, large * k, v)]


def expect_as_good(ours: dict, theirs: dict, ideal: dict, truth: dict, dtype: torch.dtype) -> None:
    """Ours are as near to the truth as torch's to what is ideal for them."""
    for name, true in truth.items():
        torch_error = (theirs[name].double() - ideal[name]).abs().max()
        allowed = 2 * torch_error + 8 * torch.finfo(dtype).eps * true.abs().max()
        error = (ours[name].double() - true).abs().max()
        assert error <= allowed, f"{name}: {error:.3g}, may be {allowed:.3g}"


# On the CPU few float32 rows are taken one by one, in strips of 16, or as strips and a rest.
TIMES = [("cpp", 7), ("cpp", 48), ("cpp", 200), *((backend, 40) for backend in HERE)]


@pytest.mark.parametrize("scale", [0.25, 0.3])  # of which one rounds nothing
@pytest.mark.parametrize("large", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "time"), TIMES)
def test_attention_of_large_scores_keeps_the_digits(backend, time, dtype, large, scale) -> None:
    """Scores of 1e4 to 1e12: an exponent that is off by their ulp loses its whole row.

    What torch errs by is taken at a scale of 1/4: at 0.3 its own gradients of 1e4 are not finite,
    and those in float64 are no truth.
    """
    operands = large_operands(time, dtype, large)
    wide = [t.double() for t in operands]
    with running(backend):
        ours = results(pyfast.attention, operands, scale=scale)
    truth = results(formula, wide, scale=scale)
    theirs = results(reference.attention, operands, scale=0.25)
    ideal = results(formula, wide, scale=0.25)
    expect_as_good(ours, theirs, ideal, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "time"), TIMES)
def test_attention_adds_a_mask_to_large_scores(backend, time, dtype) -> None:
    """Scores of 1e8 in the mask, too, and one key hidden from all."""
    operands = large_operands(time, dtype, 1e4)
    wide = [t.double() for t in operands]
    mask = 1e8 * torch.randn(time, time, generator=torch.Generator().manual_seed(2))
    mask[:, 3] = -torch.inf
    hide = mask.to(dtype).float()
    with running(backend):
        ours = results(pyfast.attention, operands, attn_mask=hide.to(dtype), scale=0.3)
    truth = results(formula, wide, attn_mask=hide.double(), scale=0.3)
    theirs = results(reference.attention, operands, attn_mask=hide.to(dtype), scale=0.25)
    ideal = results(formula, wide, attn_mask=hide.double(), scale=0.25)
    expect_as_good(ours, theirs, ideal, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_attention_of_a_negative_scale_keeps_the_largest_score(backend, dtype) -> None:
    """It is that of the smallest product: exponents of the others' distance to another overflow."""
    operands = large_operands(200, dtype, 1e4)
    wide = [t.double() for t in operands]
    with running(backend):
        ours = pyfast.attention(*operands, is_causal=True, scale=-0.3)
    hidden = torch.full((200, 200), -torch.inf, dtype=torch.float64).triu(1)
    truth = formula(*wide, hidden, scale=-0.3)
    torch.testing.assert_close(ours.double(), truth, atol=1e-6, rtol=1e-6)  # one key's value
