"""The CUDA C++ kernels cost what tests/cuda_budgets.json says, and no more than Triton's."""

import pytest
import torch

import pyfast
from pyfast import backend
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import emulated

pytest.importorskip("triton", reason="the budgets, and cuobjdump, are Triton's")

from tests import cuda_budgets, triton_budgets
from tests.cuda_budgets import BUDGETS

pytestmark = needs_emulator

# Counters are those of one compiler; another may spend other instructions.
PINNED = "13.0"
pinned = pytest.mark.skipif(
    not getattr(backend.extension(), "nvcc", "").startswith(PINNED),
    reason=f"counted with nvcc {PINNED}",
)


@pinned
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_counters_are_those_recorded_and_no_worse_than_tritons(budget) -> None:
    rows = cuda_budgets.counted(budget)
    assert rows == cuda_budgets.recorded()[budget.name]["run"], (
        f"if this is meant: python -m tests.cuda_budgets '{budget.name}'"
    )
    assert not triton_budgets.excesses(budget, rows)
    both = rows, triton_budgets.recorded()[budget.name]["run"]
    ours, theirs = (cuda_budgets.moved(cuda_budgets.compared(budget.name, r)) for r in both)
    # The derivative of linear_act, and its column sums, are launches of their own: Triton's
    # products take it on their operands on capability 8, read those once for every tile, and move
    # more.
    more = {"launches": 2 if budget.large else 1}
    for name, value in ours.items():
        most = theirs[name] * cuda_budgets.STAYS.get(budget.name, 1.005) + more.get(name, 0)
        assert value <= most, (name, ours, theirs)


B, F = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [B, F], ids=str)
def test_cross_entropy_of_a_slice_asks_for_no_more_than_of_a_copy(dtype) -> None:
    """Of a padded vocabulary: every row of logits lies otherwise than that of its gradient."""
    wide, target, asked = torch.randn(8, 5056).to(dtype), torch.arange(8), []
    for x in (wide[:, :5003], wide[:, :5003].contiguous()):
        x.requires_grad_()
        with emulated(processors=1) as log, pyfast.using("cuda"):
            pyfast.cross_entropy(x, target).backward()
        (stats,) = [launch.stats for launch in log if "backward" in launch.name]
        asked.append(stats.load_sectors + stats.store_sectors)
        truth = x.detach().double().requires_grad_()
        torch.nn.functional.cross_entropy(truth, target).backward()
        eps = torch.finfo(dtype).eps
        assert (x.grad - truth.grad).abs().max() <= 2 * eps * truth.grad.abs().max()
    assert asked[0] <= 1.03 * asked[1]


def test_no_kernel_spills() -> None:
    found = cuda_budgets.resources()
    assert len(found) > 100
    spilling = {name: r for name, r in found.items() if r["STACK"] or r["LOCAL"]}
    assert not spilling
