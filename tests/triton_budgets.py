"""What the Triton kernels may cost: exact counters of calls, kept in tests/budgets.json.

`python -m tests.triton_budgets [WORD ...]` records the counters anew, of the budgets whose name
holds a word, or of all; the reviewed diff of the file is what a change costs or saves. To add a
budget, add a `Budget` to BUDGETS of tests/triton_budget_cases.py.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pyfast
from bench import sass
from tests.emulator.triton import Launch, compiled, emulated
from tests.triton_budget_cases import BUDGETS, INTEGERS, LIMITS, WIDE, Budget, large_tiles

FILE = Path(__file__).with_name("budgets.json")
CACHE = 64 * 1024  # bytes that are not read again: far less than any level 2, more than a row
SECTOR = 32
COUNTERS = (
    *("load_bytes", "load_sectors", "store_bytes", "store_sectors"),
    *("distinct_read", "distinct_written", "dram_read", "dram_written", "warp_instructions"),
    *("shared_load_waves", "shared_load_ideal", "shared_store_waves", "shared_store_ideal"),
    *("mma_flops", "special_ops", "barriers", "atomic_operations"),
)
STATIC = ("warps", "registers", "shared", "spilled", "occupancy", "tensor")
STATIC += ("integers_per_product", "wide_loads")
TENSOR = {80: "HMMA", 90: "HGMMA"}


def budget(name: str) -> Budget:
    """The budget of this name."""
    return next(b for b in BUDGETS if b.name == name)


def _tiles(budget: Budget) -> contextlib.AbstractContextManager:
    return large_tiles() if budget.large else contextlib.nullcontext()


def counted(budget: Budget) -> list[dict[str, Any]]:
    """The counters of each launch, in order."""
    machine = emulated(budget.capability, processors=budget.processors, cache_bytes=CACHE)
    with machine as log, pyfast.using("triton"), _tiles(budget):
        budget.call()
    return [_row(launch) for launch in log]


def _row(launch: Launch) -> dict[str, Any]:
    counters = {name: getattr(launch.stats, name) for name in COUNTERS}
    return {"kernel": launch.name, "grid": list(launch.grid)} | {
        name: value for name, value in counters.items() if value
    }


def static(budget: Budget, capability: int) -> list[dict[str, Any]]:
    """What bench.sass tells of each kernel that is launched, once each."""
    machine = compiled(capability, processors=budget.processors)
    with machine as log, pyfast.using("triton"), _tiles(budget):
        budget.call()
    rows = []
    for binary in dict.fromkeys(launch.binary for launch in log):
        told = sass.facts(binary.cubin, capability, binary.num_warps, binary.shared)
        row = {"kernel": binary.name} | {name: told[name] for name in STATIC}
        if row not in rows:
            rows.append(row)
    return rows


def excesses(budget: Budget, rows: list[dict[str, Any]]) -> list[str]:
    """What exceeds its limit; kernels that move less than a 50th of the call do not count.

    Products read their operands again for every tile, so only what they multiply has a limit.
    """
    found = []
    total = sum(_compulsory(row) for row in rows)
    for row in rows:
        if _compulsory(row) * 50 < total:
            continue
        limits = LIMITS | budget.more.get(row["kernel"], {})
        ratios = _ratios(row)
        if "mma_flops" in row:
            ratios = {"banks": ratios["banks"], "multiplied": _multiplied(budget, rows, row)}
        for name, value in ratios.items():
            if value > limits[name]:
                found.append(f"{row['kernel']}: {name} {value:.3f}, at most {limits[name]:g}")
    return found


def _multiplied(budget: Budget, rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    done = sum(r["mma_flops"] for r in rows if r["kernel"] == row["kernel"])
    return done / budget.useful[row["kernel"]]


def static_excesses(budget: Budget, capability: int, rows: list[dict[str, Any]]) -> list[str]:
    """Spills, and main loops of products that are not what they must be."""
    found = [f"{row['kernel']} spills" for row in rows if row["spilled"]]
    for row in rows:
        name, wanted = row["kernel"], TENSOR.get(capability)
        if name not in budget.useful:
            continue
        if wanted and row["tensor"] != [wanted]:
            found.append(f"{name}: {row['tensor']} in the main loop, not {wanted}")
        if (row["integers_per_product"] or 0) > INTEGERS:
            found.append(f"{name}: {row['integers_per_product']} integers, at most {INTEGERS}")
        if row["wide_loads"] < WIDE:
            found.append(f"{name}: {row['wide_loads']} of loads wide, at least {WIDE}")
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
            kept[b.name] |= {f"compiled for {c}": static(b, c) for c in b.compiled_for}
            told = excesses(b, kept[b.name]["run"])
            for c in b.compiled_for:
                told += static_excesses(b, c, kept[b.name][f"compiled for {c}"])
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
