"""What the CUDA C++ kernels may cost: the calls and the limits of the Triton budgets, by backend.

`python -m tests.cuda_budgets [WORD ...]` records the counters anew in tests/cuda_budgets.json.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton

import pyfast
from tests import cuda_attention_budgets, cuda_linear_budgets, triton_budgets
from tests.emulator.cuda import emulated
from tests.emulator.cuda_extension import ROOT
from tests.triton_budgets import Budget, excesses

FILE = Path(__file__).with_name("cuda_budgets.json")
OPS = ("layer_norm", "rms_norm", "cross_entropy", "rope", "adamw_step_", "linear_act")
OPS += ("linear_glu", "linear_cross_entropy", "attention")
TILED = "linear_act/", "linear_glu/"  # whose launches are made in the tiles of large matrices
PRODUCTS = "gemm_kernel", "gemm_tma_kernel"
# The pass of the derivative moves 6 m n bytes. Triton's products on capability 9 take it on their
# operands, which at 256 of k one column of wide tiles reads, once; each 256 more read them again.
# The norm takes long rows of one alignment together, and reads the weight for each of the 16 there
# are; Triton takes neighbours as one run, and reads it once.
# Instructions have no limit. linear_glu takes 1.9 times Triton's: in the pass of the derivative
# 40 for 32 elements, 10 clocks to issue beside 21 of an H100's memory; and in the epilogue, with
# exact division, about as many clocks as the products of 256 of depth.
STAYS = {
    "linear_act/1024x256->256 relu sm_90": 1.09,
    "rms_norm/512x1023 bfloat16": 1.02,
} | cuda_attention_budgets.STAYS
# What is compared with Triton where a call as a whole cannot be: of linear_cross_entropy the two
# products that make logits. Its other ones split their depth at these sizes, where Triton is given
# the tiles of large ones; and what finds and gathers the rows are operators of torch there.
ALIKE = {"linear_cross_entropy": ("_logit_tiles_kernel", "_slab_kernel")}


def limited(budget: Budget) -> Budget:
    """A budget of Triton's with the limits of our kernels."""
    if budget.name.startswith(TILED):
        return cuda_linear_budgets.limited(budget)
    if budget.name.startswith("attention/"):
        return cuda_attention_budgets.limited(budget)
    if not budget.useful:
        return dataclasses.replace(
            budget, more={}
        )  # Triton's kernels of rows move more at odd sizes
    # On capability 9.0 the weight gradient, of few tiles, is the one that is not copied by TMA.
    # Beside it the bias gradient is made: on tensor cores, eight columns more of 256. A warp that
    # gathers a row, of 512 bytes only, asks for its place and for how many there are.
    total = sum(budget.useful.values())
    small = total // 4 if budget.capability == 90 else total
    useful = dict(zip(PRODUCTS, (small, total - small), strict=True))
    more = {PRODUCTS[0]: {"multiplied": 1 + 8 / 256 * total / 4 / small}}
    more["gather_rows_kernel"] = {"asked": 1.06}
    return dataclasses.replace(budget, useful=useful, more=more)


BUDGETS = [limited(b) for b in triton_budgets.BUDGETS if b.name.split("/")[0] in OPS]


def counted(budget: Budget) -> list[dict[str, Any]]:
    """The counters of each launch, in order."""
    if budget.name.startswith(TILED):
        return [triton_budgets._row(launch) for launch in cuda_linear_budgets.launches(budget)]
    cache = triton_budgets.CACHE
    machine = emulated(budget.capability, processors=budget.processors, cache_bytes=cache)
    with machine as log, pyfast.using("cuda"):
        budget.call()
    return [triton_budgets._row(launch) for launch in log]


def compared(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The launches that are held against Triton's: all, or those of ALIKE."""
    alike = ALIKE.get(name.split("/")[0])
    if alike is None:
        return rows
    own = [row for row in rows if row["kernel"] in PRODUCTS][: len(alike)]
    return own or [row for row in rows if row["kernel"] in alike]


def moved(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Of launches: bytes through memory, and sectors that warps ask for."""

    def total(*names: str) -> int:
        return sum(row.get(name, 0) for row in rows for name in names)

    return {
        "bytes": total("dram_read", "dram_written"),
        "sectors": total("load_sectors", "store_sectors"),
        "launches": len(rows),
    }


def resources() -> dict[str, dict[str, int]]:
    """REG, STACK, LOCAL and SHARED of every kernel for every architecture, as compiled."""
    found = {}
    for path in sorted((ROOT / "build" / "objects").glob("*.cuda.o")):
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        arch = ""
        for line in text.splitlines():
            if told := re.match(r"arch = (\w+)", line):
                arch = told[1]
            if told := re.match(r"\s*Function (\w+):", line):
                name = f"{path.stem} {arch} {told[1]}"
            if "REG:" in line:
                found[name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def recorded() -> dict[str, Any]:
    """What the file holds: {name: rows}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(words: list[str]) -> None:
    """Count anew and write the file; budgets that are gone leave it."""
    kept = recorded()
    for b in BUDGETS:
        if b.name not in kept or not words or any(word in b.name for word in words):
            kept[b.name] = {"run": counted(b)}
            told = excesses(b, kept[b.name]["run"])
            both = kept[b.name]["run"], triton_budgets.recorded()[b.name]["run"]
            ours, theirs = (moved(compared(b.name, rows)) for rows in both)
            print(b.name, told or "within its limits", ours, theirs, flush=True)
    FILE.write_text(triton_budgets._text({b.name: kept[b.name] for b in BUDGETS}))


if __name__ == "__main__":
    record(sys.argv[1:])
