"""torch.func's transforms and forward mode, which have no kernels: torch's results, never wrong."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import pyfast
from pyfast import reference

ROWS, WIDTH = 24, 32
WEIGHT = torch.linspace(-1, 1, WIDTH * WIDTH).sin().view(WIDTH, WIDTH)
CLASSES = torch.arange(ROWS)
ANGLES = torch.linspace(0, 3, ROWS * WIDTH // 2).view(ROWS, WIDTH // 2)
# (an operation, its plain-torch meaning) of x [ROWS, WIDTH]
PAIRS: dict[str, tuple[Callable, Callable]] = {
    name: (lambda x, f=f: f(pyfast, x), lambda x, f=f: f(reference, x))
    for name, f in {
        "linear_act": lambda api, x: api.linear_act(x, WEIGHT, act="gelu"),
        "linear_glu": lambda api, x: api.linear_glu(x, WEIGHT, WEIGHT.t()),
        "cross_entropy": lambda api, x: api.cross_entropy(x, CLASSES),
        "linear_cross_entropy": lambda api, x: api.linear_cross_entropy(x, WEIGHT, CLASSES),
        "layer_norm": lambda api, x: api.layer_norm(x, (WIDTH,)),
        "rms_norm": lambda api, x: api.rms_norm(x, (WIDTH,)),
        "rope": lambda api, x: api.rope(x, ANGLES.cos(), ANGLES.sin()),
    }.items()
}


def scalar(f: Callable, x: Tensor) -> Tensor:
    return f(x).pow(3).sum()


def forward_mode(f: Callable, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: scalar(f, x))(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack((x, 2 * x))),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "hessian": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: scalar(f, x))(x).square().sum()
    )(x),
    "forward_mode": forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", PAIRS)
def test_transform_gives_what_torch_gives(op: str, transform: str) -> None:
    ours, meaning = PAIRS[op]
    x = torch.randn(ROWS, WIDTH)
    got, expected = (TRANSFORMS[transform](f, x) for f in (ours, meaning))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_transform_compiles(transform: str) -> None:
    ours, meaning = PAIRS["linear_act"]
    x = torch.randn(ROWS, WIDTH)
    compiled = torch.compile(lambda x: TRANSFORMS[transform](ours, x), fullgraph=True)
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](meaning, x))


def test_transform_of_attention() -> None:
    q = torch.randn(1, 2, 9, 8)
    got, expected = (
        torch.func.grad(lambda q, f=f: f(q, q, q, is_causal=True).square().sum())(q)
        for f in (pyfast.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(got, expected)
