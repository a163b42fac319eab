"""What Nsight Compute counts of our kernels on a GPU, beside what the emulator counts.

    python -m bench.counters [--backend cuda triton] [--dry-run] [--json FILE]

The calls are those of the budgets (tests/triton_budget_cases.py). Each backend plays them in a
process of its own under `ncu`; the emulator runs the same calls with as many multiprocessors. The
launches must be the same ones, in the same order and as large. In a dry run the emulator's
counters, written as ncu would write them, stand for the GPU's. The last line of stdout is one JSON
object.
"""

import argparse
import csv
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import pyfast
from bench import devices, machine

# The emulator's counter -> the metrics of ncu that add up to it.
METRICS = {
    "warp_instructions": ("smsp__inst_executed.sum",),  # PTX there, machine code here
    "load_sectors": (
        "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
        "l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts.sum",
    ),
    "store_sectors": ("l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",),
    "shared_load_waves": ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",),
    "shared_store_waves": ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",),
    "dram_read": ("dram__bytes_read.sum",),
    "dram_written": ("dram__bytes_write.sum",),
}
TIME = "gpu__time_duration.sum"  # nanoseconds
EXACT = ("load_sectors", "store_sectors")  # caches play no part in these
BACKENDS = ("cuda", "triton")
Launch = dict[str, Any]


def calls(dry: bool) -> list[tuple[Any, torch.dtype]]:
    """(case, dtype) of the budgets that are of one case; in a dry run the two smallest."""
    from tests.triton_budget_cases import BUDGETS

    found = [b.call.args for b in BUDGETS if isinstance(b.call, functools.partial)]
    return [args for args in found if args[0].op == "rope"] if dry else found


def play(backend: str, device: devices.Cpu, dry: bool) -> None:
    """Every call once; a second time nothing would be compiled, but ncu counts all alike."""
    for case, dtype in calls(dry):
        inputs = device.put(case.inputs(dtype))
        for name in case.grads:
            inputs[name].requires_grad_()
        out = getattr(pyfast, case.op)(**inputs)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


def emulate(backend: str, capability: int, processors: int, dry: bool) -> list[Launch]:
    """The launches of the calls, counted by the emulator."""
    log: list[Launch] = []
    with devices.emulated(backend, capability=capability, processors=processors) as launches:
        play(backend, devices.CPU, dry)
    for launch in launches:
        counted = {name: getattr(launch.stats, name) for name in METRICS}
        log.append({"kernel": launch.name, "grid": list(launch.grid), **counted})
    return log


def as_ncu_writes(log: list[Launch]) -> str:
    """Launches as the CSV of ncu."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    out.write("==PROF== Connected\n")
    metric = ("Metric Name", "Metric Unit", "Metric Value")
    writer.writerow(["ID", "Kernel Name", "Grid Size", *metric])
    for i, launch in enumerate(log):
        grid = f"({', '.join(map(str, launch['grid']))})"
        for name, metrics in METRICS.items():
            for metric in metrics:
                value = launch[name] if metric == metrics[0] else 0
                writer.writerow([i, launch["kernel"], grid, metric, "", f"{value:,}"])
        writer.writerow([i, launch["kernel"], grid, TIME, "ns", "1,000"])
    return out.getvalue()


def read_ncu(text: str) -> list[Launch]:
    """Launches of ncu's CSV (`--csv --print-units base`), in order."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, Launch] = {}
    for row in csv.DictReader(lines):
        grid = [int(n) for n in row["Grid Size"].strip("()").split(",")]
        start = {"kernel": row["Kernel Name"], "grid": grid, "metrics": {}}
        launch = found.setdefault(row["ID"], start)
        launch["metrics"][row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def compared(counted: list[Launch], emulated: list[Launch]) -> dict[str, Any]:
    """Each launch's counters as [GPU's, emulator's]; what differs, in words."""
    ours = {launch["kernel"] for launch in emulated}
    counted = [launch for launch in counted if launch["kernel"] in ours]
    rows, problems = [], []
    for there, here in zip(counted, emulated, strict=False):
        if (there["kernel"], there["grid"]) != (here["kernel"], here["grid"]):
            names = [f"{one['kernel']} {one['grid']}" for one in (there, here)]
            problems.append("launched {}, emulated {}".format(*names))
            break
        row: Launch = {"kernel": here["kernel"], "grid": here["grid"]}
        row["us"] = there["metrics"].get(TIME, 0) / 1e3
        for name, metrics in METRICS.items():
            known = [there["metrics"][m] for m in metrics if m in there["metrics"]]
            if known:
                row[name] = [sum(known), here[name]]
        rows.append(row)
        for name in EXACT:
            gpu, emulator = row.get(name, [0, 0])
            if abs(gpu - emulator) > 0.02 * max(gpu, emulator):
                problems.append(f"{here['kernel']}: {name} {gpu:.0f}, emulated {emulator}")
    if len(counted) != len(emulated):
        problems.append(f"{len(counted)} launches, emulated {len(emulated)}")
    return {"rows": rows, "problems": problems}


def count(backend: str, device: devices.Cpu, dry: bool) -> dict[str, Any]:
    """One backend on the GPU and on the emulator."""
    facts = device.facts()
    capability = 90 if facts["capability"] == "9.0" else 80
    own = [sys.executable, "-m", "bench.counters", "--backend", backend]
    own += ["--dry-run"] if dry else []
    environment = os.environ | {"PYFAST_BACKEND": "auto"}
    if backend == "cuda":
        environment |= {"PYFAST_EXTENSION": stand_in()}
    sizes = ["--emulate", str(capability), str(facts["processors"])]
    told = subprocess.run([*own, *sizes], env=environment, capture_output=True, text=True)
    if told.returncode:
        return {"rows": [], "problems": [f"the emulator: {told.stderr.strip()[-500:]}"]}
    emulated = json.loads(told.stdout.splitlines()[-1])
    if dry:
        return compared(read_ncu(as_ncu_writes(emulated)), emulated)
    metrics = ",".join([*(m for names in METRICS.values() for m in names), TIME])
    command = ["ncu", "--csv", "--print-units", "base", "--print-kernel-base", "function"]
    command += ["--target-processes", "all", "--metrics", metrics, *own, "--play"]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        return {"rows": [], "problems": [f"ncu: {(told.stdout + told.stderr).strip()[-500:]}"]}
    return compared(read_ncu(told.stdout), emulated)


def stand_in() -> str:
    """The extension whose CUDA kernels the emulator runs, built if it must be."""
    command = [sys.executable, "-m", "tests.emulator.cuda_extension"]
    environment = os.environ | {"PYFAST_CUDA": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"bench: the stand-in must compile; got {told.stderr.strip()[-500:]}")
    return told.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counters", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    inner = parser.add_mutually_exclusive_group()
    inner.add_argument("--play", action="store_true", help="only make the calls, under ncu")
    inner.add_argument("--emulate", nargs=2, type=int, metavar=("CAPABILITY", "PROCESSORS"))
    options = parser.parse_args()
    backend = options.backend[0]
    if options.emulate:
        print(json.dumps(emulate(backend, *options.emulate, options.dry_run)))
        return
    device = devices.DEVICES["emulator" if options.dry_run else "cuda"]()
    if options.play:
        with pyfast.using(backend):
            play(backend, device, options.dry_run)
        return
    if not options.dry_run and shutil.which("ncu") is None:
        parser.error("ncu must be on the PATH")
    chosen = [b for b in options.backend if not options.dry_run or b in devices.emulated_backends()]
    found = {b: count(b, device, options.dry_run) for b in chosen}
    for name, told in found.items():
        print(f"{name}: {len(told['rows'])} launches", *told["problems"], sep="\n  ")
    machine.finish({"bench": "counters", "backends": found}, options.json)


if __name__ == "__main__":
    main()
