"""Parameters and steps that the tests of the optimizer share."""

import torch

SHAPES = [(17, 5), (33,), (), (2, 3, 4)]  # odd sizes, a scalar, three dimensions


def parameters(dtype=torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def take_steps(optimizer, params, first: int, count: int) -> None:
    """Steps first..first+count-1 with gradients that depend only on the step."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def assert_same(ours, theirs, **tolerance) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
