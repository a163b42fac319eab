"""Times of the Triton kernels on GPUs by a roofline over exact counters: a model, not measured.

    python -m bench.gpu_model [OP ...] [--gpu A100 H100 "RTX 4090"] [--json FILE]

The emulator runs forward and backward at two small sizes; counters of a kernel are straight lines
in the size, and are continued to the real one (WORKS). A kernel takes as long as the slowest of
memory, L2, tensor cores, special functions, shared memory and issue slots, each at the part of its
peak in EFFICIENCY, and a launch. Liger-Kernel's kernels are counted the same way where it is
installed; torch's unfused sequence is counted as bytes and FLOPs of its operators
(bench/torch_sequence.py), in its favour: neither L2 nor instructions hold it up. What every program
does once, whatever the size, is counted for one multiprocessor. Rows where we lose are printed like
the others. No number here was measured; the last line of stdout is one JSON object.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyfast
from bench import liger, machine, torch_sequence
from pyfast.testing import (
    Case,
    adamw,
    attention,
    cross_entropy,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    norm,
    rope,
)
from tests.emulator import Stats

LABEL = "model, not measured"
LAUNCH = 3e-6  # seconds, one after the other on a stream
WAVE = 128  # bytes that shared memory of a multiprocessor moves in a cycle


class Gpu(NamedTuple):
    """Published peaks; that of L2 is no vendor's, and the least certain."""

    capability: int  # whose code is counted
    processors: int
    clock: float  # Hz, boost
    memory: float  # bytes per second
    l2: float
    tensor: float  # FLOP per second, dense bfloat16 with float32 sums


GPUS = {
    "A100": Gpu(80, 108, 1.41e9, 2039e9, 4500e9, 312e12),
    "H100": Gpu(90, 132, 1.755e9, 3350e9, 5500e9, 989e12),
    "RTX 4090": Gpu(80, 128, 2.52e9, 1008e9, 5000e9, 165e12),
}
# The part of a peak that good kernels reach. To be fitted once there are measurements.
EFFICIENCY = {"memory": 0.92, "l2": 0.8, "tensor": 0.75, "special": 0.9, "shared": 0.9}
EFFICIENCY["issue"] = 0.8
# Why a row is behind, where it is by design.
NOTES = {
    "cross_entropy": "Liger writes the gradient over the logits in its forward pass, whose second"
    " read of them the model takes from L2; ours leaves its inputs as they are, and reads them"
    " again in the backward pass.",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A call at a real size, and the two small ones it is continued from."""

    op: str
    case: Callable[[int], Case]
    size: int
    small: tuple[int, int]


WORKS = (
    Work("linear_act", lambda n: linear_act(n, 512, 2048, "gelu_tanh"), 8192, (128, 256)),
    Work("linear_glu", lambda n: linear_glu(n, 512, 1024), 8192, (128, 256)),
    Work("cross_entropy", lambda n: cross_entropy(n, 32000), 8192, (2, 4)),
    Work("linear_cross_entropy", lambda n: linear_cross_entropy(n, 256, 4096), 8192, (128, 256)),
    Work("attention", lambda n: attention(1, n, 512, 64, causal=True), 96, (1, 2)),
    Work("rope", lambda n: rope(n, 8, 512, 64), 16, (1, 2)),
    Work("layer_norm", lambda n: norm("layer_norm", n, 4096), 16384, (64, 128)),
    Work("rms_norm", lambda n: norm("rms_norm", n, 4096), 16384, (64, 128)),
    Work("adamw_step_", lambda n: adamw(((n, 1024),)), 1 << 17, (64, 128)),
)


def bounds(gpu: Gpu, stats: Stats) -> dict[str, float]:
    """Seconds that each resource needs for the counters of one launch."""
    cycles = gpu.processors * gpu.clock
    waves = stats.shared_load_waves + stats.shared_store_waves
    peaks = {
        "memory": stats.compulsory / gpu.memory,
        "l2": 32 * (stats.load_sectors + stats.store_sectors) / gpu.l2,
        "tensor": stats.mma_flops / gpu.tensor,
        "special": stats.special_ops / (16 * cycles),
        "shared": waves * WAVE / (WAVE * cycles),
        "issue": stats.warp_instructions / (4 * cycles),
    }
    return {name: seconds / EFFICIENCY[name] for name, seconds in peaks.items()}


def seconds(gpu: Gpu, stats: Stats) -> tuple[float, str]:
    """(time of one launch, what it waits for)."""
    found = bounds(gpu, stats)
    binding = max(found, key=found.__getitem__)
    return LAUNCH + found[binding], binding


def continued(first: Stats, second: Stats, sizes: tuple[int, int], size: int) -> Stats:
    """The counters at `size` on the line through those at two sizes."""
    steps = (size - sizes[0]) / (sizes[1] - sizes[0])

    def at(name: str) -> int:
        a, b = getattr(first, name), getattr(second, name)
        return max(0, round(a + (b - a) * steps))

    names = [f.name for f in dataclasses.fields(Stats) if f.type == "int"]
    return dataclasses.replace(first, **{name: at(name) for name in names})


def ours(case: Case) -> None:
    """Forward and backward of a case, in bfloat16."""
    inputs = case.inputs(torch.bfloat16)
    for name in case.grads:
        inputs[name].requires_grad_()
    with pyfast.using("triton"):
        out = getattr(pyfast, case.op)(**inputs)
        if case.grads:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


def launches(call: Callable[[Case], None], work: Work, capability: int) -> list[Stats]:
    """The counters of every launch at the real size, in order."""
    from tests.emulator.triton import emulated
    from tests.triton_budget_cases import large_tiles

    logs = []
    for small in work.small:
        with emulated(capability, processors=1) as log, large_tiles():
            call(work.case(small))
        logs.append([launch.stats for launch in log])
    pairs = zip(*logs, strict=True)
    return [continued(first, second, work.small, work.size) for first, second in pairs]


def rows(work: Work, gpus: list[str]) -> list[dict[str, Any]]:
    """A row for each GPU and contestant."""
    calls = {"pyfast": ours} | ({"liger": liger.CALLS[work.op]} if work.op in liger.CALLS else {})
    found, counted = [], {}
    for name in gpus:
        gpu = GPUS[name]
        for who, call in calls.items():
            key = who, gpu.capability
            counted[key] = counted.get(key) or launches(call, work, gpu.capability)
            times = [(*seconds(gpu, stats), stats.kernel) for stats in counted[key]]
            if who == "liger":
                beside = liger.passes(work.case(work.small[0]), gpu.processors)
                times += [(_pass_seconds(gpu, p), "memory", p.what) for p in beside]
            found.append(_row(work, name, who, sum(t for t, *_ in times), max(times)[1:]))
        passes = torch_sequence.passes(work.case(work.size))
        times = [(_pass_seconds(gpu, p), "tensor" if p.flops else "memory", p.what) for p in passes]
        found.append(_row(work, name, "torch unfused", sum(t for t, *_ in times), max(times)[1:]))
    return found


def _pass_seconds(gpu: Gpu, p: torch_sequence.Pass) -> float:
    memory = p.bytes / gpu.memory / EFFICIENCY["memory"]
    return LAUNCH + max(memory, p.flops / gpu.tensor / EFFICIENCY["tensor"])


def _row(work: Work, gpu: str, who: str, time: float, longest: tuple[str, str]) -> dict[str, Any]:
    return {
        "op": work.op,
        "case": work.case(work.size).name,
        "gpu": gpu,
        "who": who,
        "model_us": round(1e6 * time, 1),
        "longest": longest[1],
        "binds": longest[0],
        "label": LABEL,
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table for people."""
    text = f"{row['op'] + ' ' + row['case']:44}{row['gpu']:10}{row['who']:15}"
    return text + f"{row['model_us']:10.1f} us ({LABEL})  {row['binds']} of {row['longest']}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=summary)
    ops = [work.op for work in WORKS]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(ops)}")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object here too")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in ops:
            parser.error(f"OP must be one of {', '.join(ops)}; got {op}")
    machine.expect_folder(parser, "--json", options.json)
    return options


def main() -> None:
    options = parse_arguments()
    print(f"Forward and backward in bfloat16. Every time is a {LABEL}.")
    if not liger.CALLS:
        print("Liger-Kernel is not installed: its rows are left out.")
    found: list[dict[str, Any]] = []
    for work in WORKS:
        if work.op in (options.ops or [w.op for w in WORKS]):
            told = rows(work, options.gpu)
            print("\n".join(map(line, told)), flush=True)
            if work.op in NOTES and any(row["who"] == "liger" for row in told):
                print(f"    {NOTES[work.op]}")
            found += told
    machine.finish({"bench": "gpu_model", "label": LABEL, "rows": found}, options.json)


if __name__ == "__main__":
    main()
