"""What the Triton kernels may cost: exact counters of calls, kept in tests/budgets.json.

`python -m tests.triton_budgets [WORD ...]` records the counters anew, of the budgets whose name
holds a word, or of all; the reviewed diff of the file is what a change costs or saves. To add a
budget, add a `Budget` to BUDGETS.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pyfast
from pyfast import testing
from tests.emulator.triton import Launch, compiled, emulated
from tests.run_case import results

FILE = Path(__file__).with_name("budgets.json")
COMPILED_FOR = 80, 90, 100  # capabilities whose registers are kept
CACHE = 64 * 1024  # bytes that are not read again: far less than any level 2, more than a row
SECTOR = 32
COUNTERS = (
    *("load_bytes", "load_sectors", "store_bytes", "store_sectors"),
    *("distinct_read", "distinct_written", "dram_read", "dram_written", "warp_instructions"),
    *("shared_load_waves", "shared_load_ideal", "shared_store_waves", "shared_store_ideal"),
    *("mma_flops", "special_ops", "barriers", "atomic_operations"),
)
# Per kernel: what moves through memory with a small cache and what warps ask for in whole sectors,
# both per byte that must move; waves through shared memory per wave without bank conflicts.
LIMITS = {"moved": 1.02, "asked": 1.05, "banks": 1.05}


@dataclass(frozen=True)
class Budget:
    """One call whose launches are counted.

    `more` has higher limits by kernel, with the reason beside them where they are written;
    `processors` are few, so that a program has as many rows as it has of a real size on a GPU.
    """

    name: str
    capability: int  # it is run for
    call: Callable[[], Any]
    more: dict[str, dict[str, float]] = field(default_factory=dict)
    processors: int = 1


def case_budget(case: testing.Case, dtype: torch.dtype, **settings: Any) -> Budget:
    """Forward and backward of a case."""
    name = f"{case} {str(dtype).removeprefix('torch.')}"
    call = functools.partial(_forward_and_backward, case, dtype)
    return Budget(name, RUN_FOR[dtype], call, **settings)


def _forward_and_backward(case: testing.Case, dtype: torch.dtype) -> None:
    results(case, getattr(pyfast, case.op), case.inputs(dtype))


def adamw_budget(
    name: str, dtypes: tuple[torch.dtype, ...], master: bool, **settings: Any
) -> Budget:
    """A step of two parameters, one of them small; dtypes of parameter, gradient and moments."""

    def call() -> None:
        make = testing.Maker(torch.float32)
        sizes = (400, 410), (777,)
        lists = [[make.normal(*s).to(t) for s in sizes] for t in (*dtypes, dtypes[-1])]
        lists[3] = [v.abs() for v in lists[3]]
        masters = [p.float() for p in lists[0]] if master else None
        pyfast.adamw_step_(*lists, 3, masters=masters, **settings)

    return Budget(f"adamw_step_/{name}", RUN_FOR[dtypes[0]], call)


F, B = torch.float32, torch.bfloat16
RUN_FOR = {F: 80, B: 90}
# The statistics of 8 rows share a sector. Every warp asks for those of its row, all but the first
# from the cache beside it; and the programs of neighbouring rows, which the model runs one after
# another, each write it anew.
STATISTICS = {
    "norm_forward_kernel": {"moved": 1.04},
    "norm_backward_kernel": {"moved": 1.03, "asked": 1.09},
}
# 768, 1000: rows of whole sectors and not; 1023: odd. 512 rows on one processor: 64 or 128 for each
# program, as of 100,000 rows on a large GPU. 50257: GPT-2's, odd. 5 classes in 8 are one sector.
BUDGETS = [
    case_budget(testing.norm("layer_norm", 512, 768), B, more=STATISTICS),
    case_budget(testing.norm("layer_norm", 512, 1000, residual=True), B, more=STATISTICS),
    case_budget(testing.norm("rms_norm", 512, 1023), B, more=STATISTICS),
    case_budget(testing.norm("rms_norm", 512, 768, residual=True), F, more=STATISTICS),
    case_budget(testing.cross_entropy(3, 50257), B),
    case_budget(testing.cross_entropy(3, 50257, label_smoothing=0.1), F),
    case_budget(testing.cross_entropy(3, 32000), B),
    case_budget(testing.rope(2, 4, 32, 64), B),
    case_budget(testing.rope(2, 4, 32, 128, interleaved=True), F),
    adamw_budget("float32", (F, F, F), False),
    adamw_budget("bfloat16 with masters, clipped", (B, B, F), True, max_norm=1.0),
]


def budget(name: str) -> Budget:
    """The budget of this name."""
    return next(b for b in BUDGETS if b.name == name)


def counted(budget: Budget) -> list[dict[str, Any]]:
    """The counters of each launch, in order."""
    machine = emulated(budget.capability, processors=budget.processors, cache_bytes=CACHE)
    with machine as log, pyfast.using("triton"):
        budget.call()
    return [_row(launch) for launch in log]


def _row(launch: Launch) -> dict[str, Any]:
    counters = {name: getattr(launch.stats, name) for name in COUNTERS}
    return {"kernel": launch.name, "grid": list(launch.grid)} | {
        name: value for name, value in counters.items() if value
    }


def static(budget: Budget, capability: int) -> list[dict[str, Any]]:
    """Registers, stack and shared memory of each kernel that is launched, once each."""
    with compiled(capability, processors=budget.processors) as log, pyfast.using("triton"):
        budget.call()
    rows = []
    for launch in log:
        resources = launch.binary.resources()
        row = {"kernel": launch.name, "warps": launch.binary.num_warps}
        row |= {name.lower(): resources[name] for name in ("REG", "STACK", "LOCAL")}
        row["shared"] = launch.binary.shared
        if row not in rows:
            rows.append(row)
    return rows


def excesses(budget: Budget, rows: list[dict[str, Any]]) -> list[str]:
    """What exceeds its limit; kernels that move less than a 50th of the call do not count."""
    found = []
    total = sum(_compulsory(row) for row in rows)
    for row in rows:
        if _compulsory(row) * 50 < total:
            continue
        limits = LIMITS | budget.more.get(row["kernel"], {})
        for name, value in _ratios(row).items():
            if value > limits[name]:
                found.append(f"{row['kernel']}: {name} {value:.3f}, at most {limits[name]}")
    return found


def _compulsory(row: dict[str, Any]) -> int:
    return row.get("distinct_read", 0) + row.get("distinct_written", 0)


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    def total(*names: str) -> int:
        return sum(row.get(name, 0) for name in names)

    least = max(1, _compulsory(row))
    waves = total("shared_load_waves", "shared_store_waves")
    return {
        "moved": total("dram_read", "dram_written") / least,
        "asked": SECTOR * total("load_sectors", "store_sectors") / least,
        "banks": waves / max(1, total("shared_load_ideal", "shared_store_ideal")),
    }


def recorded() -> dict[str, Any]:
    """What the file holds: {name: {"run": rows, "compiled for 80": rows, ...}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(words: list[str]) -> None:
    """Count anew and write the file; budgets that are gone leave it."""
    kept = recorded()
    for b in BUDGETS:
        if b.name not in kept or not words or any(word in b.name for word in words):
            kept[b.name] = {"run": counted(b)}
            kept[b.name] |= {f"compiled for {c}": static(b, c) for c in COMPILED_FOR}
            told = excesses(b, kept[b.name]["run"])
            print(b.name, told or "within its limits", flush=True)
    FILE.write_text(_text({b.name: kept[b.name] for b in BUDGETS}))


def _text(content: dict[str, Any]) -> str:
    """One launch a line, so that a diff shows what changed."""
    lines = []
    for name, parts in content.items():
        sections = [
            f'  "{part}": [\n   ' + ",\n   ".join(map(json.dumps, rows)) + "\n  ]"
            for part, rows in parts.items()
        ]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(sections) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    record(sys.argv[1:])
