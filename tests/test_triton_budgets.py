"""The Triton kernels cost what tests/budgets.json says, on any machine, to the byte."""

import pytest
import torch

from pyfast import testing

triton = pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests import triton_budgets  # noqa: E402
from tests.triton_budgets import BUDGETS, COMPILED_FOR  # noqa: E402

# Counters are those of one compiler; another may spend other instructions.
PINNED = "3.7"
pinned = pytest.mark.skipif(
    not triton.__version__.startswith(PINNED), reason=f"counted with triton {PINNED}"
)
each_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)


@pinned
@each_budget
def test_counters_are_those_recorded(budget) -> None:
    rows = triton_budgets.counted(budget)
    assert rows == triton_budgets.recorded()[budget.name]["run"], (
        f"if this is meant: python -m tests.triton_budgets '{budget.name}'"
    )
    assert not triton_budgets.excesses(budget, rows)


@pinned
@each_budget
@pytest.mark.parametrize("capability", COMPILED_FOR)
def test_registers_are_those_recorded_and_none_spill(budget, capability) -> None:
    rows = triton_budgets.static(budget, capability)
    assert rows == triton_budgets.recorded()[budget.name][f"compiled for {capability}"]
    assert not [row for row in rows if row["stack"] or row["local"]]


def test_limits_are_not_vacuous() -> None:
    """A kernel that reads twice what it must, or half sectors, or the same bank, is found."""
    row = {"kernel": "k", "distinct_read": 3200, "dram_read": 3200, "load_sectors": 100}
    row |= {"shared_load_waves": 10, "shared_load_ideal": 10}
    budget = triton_budgets.Budget("made up", 80, lambda: None)
    assert not triton_budgets.excesses(budget, [row])
    for name in ("dram_read", "load_sectors", "shared_load_waves"):
        (found,) = triton_budgets.excesses(budget, [row | {name: 2 * row[name]}])
        assert found.startswith("k: ") and "2.000" in found


@pytest.mark.parametrize(
    "case",
    [
        testing.norm("layer_norm", 4, 8192, residual=True),  # the widest row kept in registers
        testing.norm("layer_norm", 4, 8191, residual=True),  # and one that may not be
        testing.cross_entropy(4, 50257, weighted=True, label_smoothing=0.1),
    ],
    ids=str,
)
def test_largest_kernels_do_not_spill(case) -> None:
    budget = triton_budgets.case_budget(case, torch.bfloat16)
    rows = triton_budgets.static(budget, budget.capability)
    assert not [row for row in rows if row["stack"] or row["local"]]
