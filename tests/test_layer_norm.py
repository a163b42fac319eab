"""Promises of both norms beyond their cases: shapes, hard numbers, threads, mixed precision."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast

NORMS = ("layer_norm", "rms_norm")


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def backward(op: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Outputs and the gradients of x and weight; output gradients every dtype can hold."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = getattr(pyfast, op)(x, weight.shape, weight, residual=residual)
    outs = out if isinstance(out, tuple) else (out,)
    seed = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=seed).bfloat16().to(o.dtype) for o in outs]
    torch.autograd.backward(outs, grads)
    return [*(o.detach() for o in outs), x.grad, weight.grad]


@pytest.mark.parametrize("op", NORMS)
def test_norm_takes_several_dimensions_and_one_size(op: str) -> None:
    norm, plain = getattr(pyfast, op), getattr(F, op)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(norm(x, (4, 5)), plain(x, (4, 5)))
    torch.testing.assert_close(norm(x, 5), plain(x, (5,)))
    torch.testing.assert_close(norm(x[0, 0, 0], [5]), plain(x[0, 0, 0], (5,)))


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5)])
def test_norm_of_nothing_is_nothing(op: str, shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape[-1])
    out, grad_x, grad_weight = backward(op, torch.randn(shape), weight)
    assert out.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(shape[-1]))


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("rows", [1, 4, 63, 64, 67, 1023, 1024, 1027])
def test_norm_sums_weight_gradients_over_every_block_of_rows(op: str, rows: int) -> None:
    x, weight = torch.randn(rows, 19) + 1, torch.randn(19)
    _, grad_x, grad_weight = backward(op, x, weight)
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    seed = torch.Generator().manual_seed(3)
    getattr(F, op)(wide[0], (19,), wide[1]).backward(
        torch.randn(x.shape, generator=seed).bfloat16().double()
    )
    torch.testing.assert_close(grad_x, wide[0].grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_weight, wide[1].grad.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("cols", [1, 15, 16, 65, 20_000])  # the last: past the first-level cache
def test_norm_of_any_width_is_accurate(op: str, cols: int) -> None:
    x, weight = torch.randn(9, cols), torch.randn(cols)
    truth = getattr(F, op)(x.double(), (cols,), weight.double())
    error = (getattr(pyfast, op)(x, (cols,), weight) - truth).abs().max()
    assert error <= 2e-6 * truth.abs().max()


def test_layer_norm_keeps_its_digits_far_from_zero() -> None:
    x = torch.randn(8, 768) + 1e4  # a sum of squares in float32 would lose the variance
    truth = F.layer_norm(x.double(), (768,))
    ours = (pyfast.layer_norm(x, (768,)) - truth).abs().max()
    assert ours <= 2 * (F.layer_norm(x, (768,)) - truth).abs().max() + 1e-6


def test_layer_norm_of_a_constant_row_is_the_bias() -> None:
    bias = torch.randn(33)
    out = pyfast.layer_norm(torch.full((2, 33), 7.0), (33,), torch.randn(33), bias)
    torch.testing.assert_close(out, bias.expand(2, 33))


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cols", [1024, 1040, 1000])  # rows of whole vectors; of half
def test_norm_of_many_rows_gives_the_bits_of_a_few(op: str, dtype: torch.dtype, cols: int) -> None:
    """Results of more than 8 MB with their operands are written past the caches."""
    x, residual = torch.randn(2, 4500, cols, dtype=dtype)
    weight = torch.randn(cols, dtype=dtype)
    few = slice(4000, 4031)
    function = getattr(pyfast, op)
    for extra, rest in ((None, None), (residual, residual[few])):
        whole = function(x, cols, weight, residual=extra)
        part = function(x[few], cols, weight, residual=rest)
        pairs = [(whole, part)] if extra is None else zip(whole, part, strict=True)
        assert all(torch.equal(all_rows[few], some) for all_rows, some in pairs)


@pytest.mark.parametrize("op", NORMS)
def test_norm_keeps_nan_in_its_row(op: str) -> None:
    x = torch.randn(5, 40)
    x[2, 7] = torch.nan
    out = getattr(pyfast, op)(x, (40,))
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("op", NORMS)
def test_norm_adds_up_the_gradients_of_both_results(op: str) -> None:
    x, r = (torch.randn(6, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, dtype=torch.float64, requires_grad=True)
    total, out = getattr(pyfast, op)(x, (20,), weight, residual=r)
    torch.testing.assert_close(total, x + r)
    mixed = torch.randn(6, 20, dtype=torch.float64)

    def gradients(loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, [x, r, weight], retain_graph=True, allow_unused=True))

    only_sum, only_norm = gradients((total * mixed).sum()), gradients((out * mixed).sum())
    both = gradients(((total + out) * mixed).sum())
    assert torch.equal(only_sum[0], mixed) and torch.equal(only_sum[1], mixed)
    assert only_sum[2] is None
    for i in range(2):
        torch.testing.assert_close(both[i], only_sum[i] + only_norm[i])
    assert torch.equal(both[2], only_norm[2])


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_takes_float32_weights_beside_16_bit_input(op: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 33).to(dtype), torch.randn(33)
    out, grad_x, grad_weight = backward(op, x, weight)
    truth = backward(op, x.double(), weight.double())
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    for our, their in zip((out, grad_x), truth[:2], strict=True):
        torch.testing.assert_close(our.double(), their, rtol=eps, atol=eps)
    torch.testing.assert_close(grad_weight.double(), truth[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", NORMS)
def test_norm_adds_residuals_of_another_dtype_under_autocast(op: str) -> None:
    x, r = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        total, out = getattr(pyfast, op)(x, (8,), torch.ones(8), residual=r)
    assert total.dtype == out.dtype == torch.float32
    torch.testing.assert_close(total, x + r)
    with pytest.raises(TypeError, match=f"{op}: residual must have the dtype of input"):
        getattr(pyfast, op)(x, (8,), residual=r)


@pytest.mark.parametrize("op", NORMS)
def test_norm_gives_the_same_bits_on_any_number_of_threads(op: str, threads: Any) -> None:
    x, r, weight = torch.randn(1100, 33), torch.randn(1100, 33), torch.randn(33)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(backward(op, x, weight, r))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
