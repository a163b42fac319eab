"""Kernels of the rows that count, launched alone: products take whole steps of 64 of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.emulator import Module, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
SOURCE = Path(__file__).with_name("cuda") / "counted_rows.cu"
ROWS, DEPTH, PITCH, STEP = 150, 20, 24, 64
WARPS = 8


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE, "sm_90a"))


def launch(module: Module, name: str, args: list, rows: Tensor) -> None:
    """`rows`: count, then where each came from."""
    (kernel,) = [k for k in module.kernels if name in k]
    count, index = rows[:1].clone(), rows[1:].clone()
    addresses = (count.data_ptr(), index.data_ptr(), index.data_ptr())
    counted = b"".join(a.to_bytes(8, "little") for a in addresses)
    args = [counted if a is None else a for a in args]
    grid = -(-ROWS // WARPS)
    module.launch(kernel, grid, 32 * WARPS, args, reachable=[count, index])


@pytest.mark.parametrize("count", [0, 1, 37, 64, 65, 150])
def test_rows_that_count_are_followed_by_zeros_to_whole_steps(module: Module, count: int) -> None:
    """Without them a product of 64 rows at a time reads what was there before: here nan."""
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).int()
    rows = torch.cat((torch.tensor([count], dtype=torch.int32), index))
    x = torch.randn(ROWS, DEPTH).bfloat16()
    to = torch.full((ROWS, PITCH), float("nan")).bfloat16()
    cleared = torch.full((ROWS, PITCH), float("nan")).bfloat16()
    launch(module, "gather_rows", [to, PITCH, x, DEPTH, ROWS, DEPTH, None, False], rows)
    launch(module, "clear_rows", [cleared, PITCH * 2 // 16, ROWS, None], rows)
    last = min(ROWS, -(-count // STEP) * STEP)
    assert torch.equal(to[:count, :DEPTH], x[index[:count].long()])
    assert not to[:count, DEPTH:].any() and not to[count:last].any()
    assert to[last:].isnan().all()
    assert cleared[:count].isnan().all() and cleared[last:].isnan().all()
    assert not cleared[count:last].any()
