"""The Triton kernels cost what tests/budgets.json says, on any machine, to the byte."""

import dataclasses

import pytest
import torch

from pyfast import testing

triton = pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests import triton_budgets  # noqa: E402
from tests.triton_budget_cases import (  # noqa: E402
    BUDGETS,
    INTEGERS,
    LIMITS,
    WIDE,
    Budget,
    case_budget,
    linear_act_budget,
)

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
@pytest.mark.parametrize(
    ("budget", "capability"),
    [(b, c) for b in BUDGETS for c in b.compiled_for],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_binaries_are_those_recorded_and_none_spills(budget, capability) -> None:
    rows = triton_budgets.static(budget, capability)
    assert rows == triton_budgets.recorded()[budget.name][f"compiled for {capability}"]
    assert not triton_budgets.static_excesses(budget, capability, rows)


def test_limits_are_not_vacuous() -> None:
    """A kernel that reads twice what it must, or half sectors, or the same bank, is found."""
    row = {"kernel": "k", "distinct_read": 3200, "dram_read": 3200, "load_sectors": 100}
    row |= {"shared_load_waves": 10, "shared_load_ideal": 10}
    budget = Budget("made up", 80, lambda: None)
    assert not triton_budgets.excesses(budget, [row])
    for name in ("dram_read", "load_sectors", "shared_load_waves"):
        (found,) = triton_budgets.excesses(budget, [row | {name: 2 * row[name]}])
        assert found.startswith("k: ") and "2.000" in found
    budget = dataclasses.replace(budget, useful={"k": 100})
    assert not triton_budgets.excesses(budget, [row | {"mma_flops": 100}])
    (found,) = triton_budgets.excesses(budget, [row | {"mma_flops": 130}])
    assert found == "k: multiplied 1.300, at most 1"


def test_static_limits_are_not_vacuous() -> None:
    row = {"kernel": "k", "spilled": 0, "tensor": ["HGMMA"], "wide_loads": 1.0}
    row["integers_per_product"] = 2.0
    budget = Budget("made up", 90, lambda: None, useful={"k": 100})
    assert not triton_budgets.static_excesses(budget, 90, [row])
    worse = {"spilled": 1, "tensor": ["HMMA"], "wide_loads": 0.5, "integers_per_product": 5.0}
    for name, value in worse.items():
        assert len(triton_budgets.static_excesses(budget, 90, [row | {name: value}])) == 1


@pytest.mark.parametrize("capability", [80, 90])
def test_products_of_odd_sizes_load_16_bytes(capability) -> None:
    """No spill either, and at most 4 integer instructions: rows that begin anywhere are packed."""
    made = linear_act_budget(255, 257, 251, "silu", capability)
    rows = triton_budgets.static(made, capability)
    assert "pack_rows_kernel" in {row["kernel"] for row in rows}
    assert not triton_budgets.static_excesses(made, capability, rows)


@pytest.mark.parametrize(
    "case",
    [
        testing.linear_act(128, 96, 129, "gelu"),
        testing.linear_glu(128, 96, 129),
        testing.linear_cross_entropy(128, 96, 129),
    ],
    ids=str,
)
def test_float32_products_do_not_wait_for_banks(case) -> None:
    """Weights as they lie took 6.6 to 8.8 times the waves, tiles of 64 columns 1.14 to 1.21."""
    for large in (False, True):
        budget = case_budget(case, torch.float32, large=large)
        rows = triton_budgets.counted(budget)
        assert any("shared_load_waves" in row for row in rows)
        for row in rows:
            waves = row.get("shared_load_waves", 0) + row.get("shared_store_waves", 0)
            ideal = row.get("shared_load_ideal", 0) + row.get("shared_store_ideal", 0)
            assert waves <= LIMITS["banks"] * ideal, row


@pytest.mark.parametrize(
    "case",
    [
        testing.norm("layer_norm", 4, 8192, residual=True),  # the widest row kept in registers
        testing.norm("layer_norm", 4, 8191, residual=True),  # and one that may not be
        *(testing.norm("layer_norm", 4, cols, residual=True) for cols in (4097, 5000, 8177)),
        testing.norm("layer_norm", 4, 4097),
        testing.norm("rms_norm", 4, 8168, residual=True),
        testing.norm("layer_norm", 4, 4095, residual=True),  # the longest run
        testing.norm("layer_norm", 4, 501, residual=True),  # and one of two rows
        testing.cross_entropy(4, 50257, weighted=True, label_smoothing=0.1),
        testing.cross_entropy(40, 100, weighted=True, label_smoothing=0.1),
        testing.cross_entropy(40, 600, weighted=True, label_smoothing=0.1),
        testing.cross_entropy(40, 999, weighted=True, label_smoothing=0.1),
    ],
    ids=str,
)
def test_largest_kernels_do_not_spill(case) -> None:
    budget = case_budget(case, torch.bfloat16)
    rows = triton_budgets.static(budget, budget.capability)
    assert not triton_budgets.static_excesses(budget, budget.capability, rows)


# Stated, not within the bar of 4: masks and pointers of rows that are whole 16 bytes but no whole
# multiples of 16 elements, and dX of a gated layer, which reads two operands for each product.
FEW_ROWS = [
    (testing.linear_act(8, 1024, 4096, "gelu"), INTEGERS),
    (testing.linear_glu(8, 1024, 2048), INTEGERS),
    (testing.linear_cross_entropy(8, 512, 2048, bias=True), INTEGERS),
    (testing.linear_act(16, 768, 1000, "silu"), 5.8),
]


@pinned
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("case", "most"), FEW_ROWS, ids=str)
def test_products_of_few_rows_keep_their_warps_multiplying(case, most, capability) -> None:
    """A decoding step: integer instructions for each multiplication, no spill, wide loads."""
    budget = case_budget(case, torch.bfloat16)
    for row in triton_budgets.static(budget, capability):
        limit = 4.5 if row["kernel"] == "_glu_input_gradient_kernel" else most
        assert not row["spilled"], row
        if row["tensor"] and row["warps"] == 2:
            assert row["integers_per_product"] <= limit, row
            assert row["wide_loads"] >= WIDE, row
