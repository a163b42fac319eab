"""Promises of rope beyond its cases: strides, its inverse, leading dimensions, errors."""

import pytest
import torch

import pyfast
from pyfast import reference


def _tables(length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rates = 10000.0 ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * rates
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [2, 6, 64, 90])  # one pair, less than a vector, whole ones, a tail
def test_rope_reads_strided_views_in_place(size, interleaved):
    heads, length = 3, 5
    fused = torch.randn(2, length, 3 * heads * size)
    x = fused.view(2, length, 3 * heads, size)[:, :, heads : 2 * heads].transpose(1, 2)
    cos, sin = _tables(2 * length, size)
    cos, sin = cos[::2], sin[::2]  # rows of a larger table
    out = pyfast.rope(x, cos, sin, interleaved=interleaved)
    expected = reference.rope(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_gradient_is_the_inverse_rotation(interleaved):
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64, requires_grad=True)
    out = pyfast.rope(x, *_tables(7, 16), interleaved=interleaved)
    out.backward(out.detach())
    torch.testing.assert_close(x.grad, x.detach())


@pytest.mark.parametrize(
    "shape", [(7, 8), (3, 7, 8), (2, 2, 3, 7, 8), (0, 3, 7, 8), (0, 2, 3, 7, 8)]
)
def test_rope_takes_any_leading_dimensions(shape):
    x = torch.randn(shape)
    cos, sin = _tables(7, 8)
    torch.testing.assert_close(pyfast.rope(x, cos, sin), reference.rope(x, cos, sin))


def test_rope_refuses_what_does_not_fit():
    x, (cos, sin) = torch.randn(1, 2, 4, 6), _tables(4, 6)
    with pytest.raises(
        ValueError, match=r"rope: x must end in an even head size; got \[1, 2, 4, 5\]"
    ):
        pyfast.rope(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"rope: sin must be \[T=4, D/2=3\]; got \[3, 3\]"):
        pyfast.rope(x, cos, sin[:3])
    with pytest.raises(TypeError, match="rope: cos must be float32"):
        pyfast.rope(x, cos.bfloat16(), sin)
    with pytest.raises(ValueError, match="rope: cos must not require a gradient"):
        pyfast.rope(x, cos.clone().requires_grad_(), sin)


def test_rope_guards_direct_calls():
    x, (cos, sin) = torch.randn(1, 2, 4, 6), _tables(4, 6)
    for arguments in (
        (x[0], cos, sin),
        (x[..., :5], cos, sin),
        (x, cos[:2], sin),
        (x, cos, sin.double()),
        (x.long(), cos, sin),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.pyfast.rope(*arguments, False, False)
