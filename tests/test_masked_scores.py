"""Attention of rows that a mask holds to the lowest float throughout, on every backend."""

import contextlib

import pytest
import torch

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
