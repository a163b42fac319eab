"""The CUDA C++ kernels cost what tests/cuda_budgets.json says, and no more than Triton's."""

import pytest
import torch

import pyfast
from pyfast import backend, testing
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import Launch, emulated
from tests.run_case import results

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


def moved_once(case: testing.Case, dtype: torch.dtype, capability: int) -> None:
    """Of each large launch: bytes move once through a small cache, and sectors are used whole."""
    cache = triton_budgets.CACHE
    with emulated(capability, processors=1, cache_bytes=cache) as log, pyfast.using("cuda"):
        results(case, getattr(pyfast, case.op), case.inputs(dtype))

    def least(launch: Launch) -> int:
        return launch.stats.distinct_read + launch.stats.distinct_written

    for launch in log:
        if least(launch) * 50 < sum(map(least, log)):
            continue
        moved = launch.stats.dram_read + launch.stats.dram_written
        assert moved <= 1.02 * least(launch), launch.name
        assert launch.stats.sector_efficiency >= 0.97, launch.name
        assert launch.stats.bank_factor <= 1.05, launch.name


# Whole sectors but for one element, odd, a sector and a half past 1000; and the vocabulary of GPT-2
# with one class more.
B, H, F = torch.bfloat16, torch.float16, torch.float32
NORMS = [("layer_norm", 1001, B), ("rms_norm", 991, F), ("layer_norm", 990, H)]
NORMS += [("rms_norm", 1007, B), ("layer_norm", 1030, B)]
LOSSES = [(16, 991, F), (16, 1003, H), (16, 4097, B), (3, 50258, B)]


@pytest.mark.parametrize(("op", "cols", "dtype"), NORMS, ids=str)
def test_norms_of_any_length_move_their_bytes_once(op, cols, dtype) -> None:
    moved_once(testing.norm(op, 512, cols), dtype, 80 if dtype == F else 90)


@pytest.mark.parametrize(("rows", "cols", "dtype"), LOSSES, ids=str)
def test_cross_entropy_of_any_length_moves_its_bytes_once(rows, cols, dtype) -> None:
    moved_once(testing.cross_entropy(rows, cols), dtype, 80 if dtype == F else 90)


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
