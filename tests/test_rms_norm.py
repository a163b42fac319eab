"""What only rms_norm promises; tests/test_layer_norm.py has what both norms share."""

import pytest
import torch
import torch.nn.functional as F

import pyfast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rms_norm_without_eps_takes_torchs(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 2e-4, dtype=dtype)  # its square is about the eps of float32
    torch.testing.assert_close(pyfast.rms_norm(x, (8,)), F.rms_norm(x, (8,)))
    torch.testing.assert_close(pyfast.rms_norm(x, (8,), eps=1e-3), F.rms_norm(x, (8,), eps=1e-3))


def test_rms_norm_scales_to_a_mean_square_of_one() -> None:
    out = pyfast.rms_norm(torch.randn(5, 300) * 40 + 3, (300,))
    torch.testing.assert_close(out.square().mean(-1), torch.ones(5))


def test_rms_norm_gradient_is_orthogonal_to_its_input() -> None:
    # the output does not change with the length of x, so the gradient has no part along x
    x = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    pyfast.rms_norm(x, (50,), eps=0.0).backward(torch.randn(6, 50, dtype=torch.float64))
    torch.testing.assert_close((x * x.grad).sum(-1), torch.zeros(6, dtype=torch.float64))


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(pyfast.rms_norm(torch.zeros(3, 9), (9,)), torch.zeros(3, 9))
