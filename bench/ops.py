"""Time every operation against plain torch on the cases of bench/cases.py, all in one run.

    python -m bench.ops [OP ...] [--quick] [--device cuda] [--dtypes float32 bfloat16]
                        [--threads 1 2] [--isa avx2] [--thp on|off] [--pinned] [--no-compile]
                        [--json FILE]

Contestants (bench/contestants.py) take turns; times are medians. A ratio is the quickest torch
contestant's time over one's own, paired round by round, with its quartiles: above 1 is quicker.
`forward+backward` is a training step's share: both, with fresh gradients each time. Ours is what a
user gets: where `auto` leaves little work to torch, the row shows what the detour costs. Rows where
we lose are printed like the others. Memory is the extra of one call (bench/memory.py); the error is
that of outputs and gradients against float64. The last line of stdout is one JSON object, a row
per contestant.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, devices, errors, machine, memory, mlp, rows, timing
from bench.cases import cases, error_case
from bench.contestants import (
    COMPILE,
    STEP,
    TRAINING,
    at_most,
    contestants,
    copied,
    directions,
)
from bench.devices import OURS, is_ours
from pyfast import backend
from pyfast.testing import Case

COMPILE_SECONDS = 120  # a compilation that takes longer is given up, and that is noted
ROUNDS = 15
QUICK_SECONDS, FULL_SECONDS, DRY_SECONDS = 0.5, 4.0, 0.02  # of rounds, per measurement
HOPELESS = 8  # a contestant of torch's that is so many times slower than the quickest is left out
OPS = (*backend.OPS, mlp.OP)
DTYPES = ("float32", "bfloat16", "float16")
Inputs = dict[str, Any]


class Bench:
    """One run: its options, the ceilings of each thread count, and the rows so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = devices.DEVICES[options.device]()
        self.machine = machine.facts(options.isa, self.device.facts())
        self.ceilings: dict[int, dict] = {}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []

    def run(self) -> None:
        """All measurements; each line is printed as soon as it is known."""
        options = self.options
        print("\n".join(machine.headline(self.machine)))
        for threads in options.threads:
            torch.set_num_threads(threads)
            ceiling = self.measure_ceilings(threads)
            self.ceilings[threads] = ceiling
            print(ceilings.sentence(ceiling), flush=True)
        for dtype in options.dtypes:
            for op in options.ops or OPS:
                if op != mlp.OP:
                    for case in cases(op, options.quick, options.device):
                        label = f"{case} {dtype}"
                        self.attempt(label, functools.partial(self.measure_case, case, dtype))
                elif dtype == "float32":
                    self.attempt(mlp.OP, self.measure_mlp)
        print(rows.summary(self.rows))

    def measure_ceilings(self, threads: int) -> dict[str, Any]:
        """Of the processor, or of the GPU."""
        options = self.options
        if options.device == "cpu":
            return ceilings.measure_ceilings(options.dtypes, threads, options.isa)
        return ceilings.gpu_ceilings(options.dtypes, threads, self.device)

    def attempt(self, label: str, measure: Callable[[], None]) -> None:
        """Measure; on a GPU, where nobody watches, one that fails does not stop the others."""
        try:
            measure()
        except Exception as error:
            if self.options.device == "cpu":
                raise
            self.note(label, OURS, told(error))

    def measure_case(self, case: Case, dtype: str) -> None:
        """Every thread count and direction of one case."""
        compile, quick = self.options.compile, self.options.quick
        device = self.device
        binders = contestants(case, compile=compile, chunkings=not quick, device=device)
        inputs = device.put(case.inputs(getattr(torch, dtype)))
        twin = error_case(case)
        exact = None
        if twin is case:
            exact = errors.truth(case, inputs, TRAINING if case.grads else STEP)
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            for direction in directions(case):
                known = {} if twin is case else self.twin_errors(twin, dtype)
                calls = {name: bind(inputs, direction) for name, bind in binders.items()}
                moved, flops = work(case, direction, dtype)
                job = rows.Job(
                    op=case.op,
                    case=case.name,
                    direction=direction,
                    dtype=dtype,
                    shape=shape_of(inputs),
                    threads=threads,
                    bytes=moved,
                    flops=flops,
                    calls=calls,
                    rel_err=known,
                    rel_err_case=twin.name,
                )
                self.measure(job, exact)

    def twin_errors(self, twin: Case, dtype: str) -> dict[str, float]:
        """The contestants' errors on the small twin of a case that changes its inputs."""
        inputs = self.device.put(twin.inputs(getattr(torch, dtype)))
        exact = errors.truth(twin, inputs, STEP)
        found = {}
        found_there = contestants(twin, compile=self.options.compile, device=self.device)
        for name, bind in found_there.items():
            values = self.first_call(f"{twin} {dtype}", name, bind(copied(inputs), STEP))
            if values is not None:
                found[name] = errors.worst_error(values, exact)
        return found

    def measure_mlp(self) -> None:
        """The small MLP's training step."""
        exact = mlp.truth()
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            self.measure(mlp.job(threads, self.options.compile, self.device), exact)

    def measure(self, job: rows.Job, exact: errors.Named | None) -> None:
        """Errors, times and memory of one job's contestants; the rows are kept and told."""
        for name, call in list(job.calls.items()):
            values = self.first_call(label_of(job), name, call)
            if values is None:
                del job.calls[name]
            elif exact is not None:
                job.rel_err[name] = errors.worst_error(values, exact)
            del values
        if OURS not in job.calls:
            return
        seconds = QUICK_SECONDS if self.options.quick else FULL_SECONDS
        seconds = DRY_SECONDS if self.options.device == "emulator" else seconds
        self.drop_hopeless(job, seconds)
        times = timing.interleave(job.calls, rounds=ROUNDS, budget=seconds, device=self.device)
        job.peak.update((name, self.device.extra_peak(call)) for name, call in job.calls.items())
        found = rows.rows(job, times, self.ceilings[job.threads])
        self.rows += found
        print(rows.line(found), flush=True)

    def drop_hopeless(self, job: rows.Job, seconds: float) -> None:
        """Leave out, and note, what could not win and would take longer than all rounds may."""
        if sum(not is_ours(name) for name in job.calls) < 2:
            return
        paces = {name: timing.once(call, self.device) for name, call in job.calls.items()}
        least = min(pace for name, pace in paces.items() if not is_ours(name))
        for name, pace in paces.items():
            if not is_ours(name) and pace > max(HOPELESS * least, seconds):
                del job.calls[name]
                self.note(label_of(job), name, f"{pace / least:.0f} times slower than the best")

    def note(self, label: str, name: str, why: str) -> None:
        """Tell of a contestant that is left out, and keep it for the JSON."""
        self.failures.append({"case": label, "backend": name, "why": why})
        print(f"{label}: {name} left out: {why}", flush=True)

    def first_call(self, label: str, name: str, call: Any) -> errors.Named | None:
        """What the first call computes; None, noted, if a compiler fails or takes too long.

        On a GPU any contestant may fail: other libraries refuse what they were not made for.
        """
        if name != COMPILE and self.options.device == "cpu":
            return call()
        try:
            with at_most(COMPILE_SECONDS), warnings.catch_warnings(action="ignore"):
                return call()
        except Exception as error:
            self.note(label, name, told(error))
            return None

    def document(self) -> dict[str, Any]:
        """The JSON object of the run."""
        return {
            "bench": "ops",
            "quick": self.options.quick,
            "machine": self.machine,
            "ceilings": self.ceilings,
            "failures": self.failures,
            "rows": self.rows,
        }


def told(error: Exception) -> str:
    """One line of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def label_of(job: rows.Job) -> str:
    """What names a measurement."""
    return f"{job.op} {job.case} {job.direction} {job.dtype} {job.threads} threads"


def work(case: Case, direction: str, dtype: str) -> tuple[int, int]:
    """Bytes that must move and FLOPs of one call."""
    parts = slice(2) if direction == TRAINING else slice(1)
    return sum(case.elements[parts]) * getattr(torch, dtype).itemsize, sum(case.flops[parts])


def shape_of(inputs: Inputs) -> str:
    """The shapes of the tensors among the inputs: "x[32,64] weight[64,64]"."""
    words = []
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            words.append(f"{name}{list(value.shape)}".replace(" ", ""))
        elif name == "params":
            count = sum(p.numel() for p in value)
            words.append(f"{len(value)} tensors of {count} elements")
    return " ".join(words)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES[:2]))
    parser.add_argument(
        "--device", choices=devices.DEVICES, default="cpu", help="emulator: a dry run of cuda"
    )
    every = torch.get_num_threads()
    parser.add_argument(
        "--threads", nargs="+", type=int, help="thread counts; default: 1 and all (quick: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller cases, no slow contestants"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="take torch.compile as well"
    )
    parser.add_argument("--isa", choices=list(machine.ISA_SETTINGS), help="hold everyone to it")
    parser.add_argument("--pinned", action="store_true", help="every thread on a core of its own")
    parser.add_argument("--thp", choices=["on", "off"], help="huge pages in torch's allocator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object here too")
    options = parser.parse_args(arguments)
    if options.threads is None:
        all_only = options.quick or options.device != "cpu"
        options.threads = [every] if all_only else sorted({1, every})
    if options.compile is None:
        options.compile = not options.quick
    for op in options.ops:
        if op not in OPS:
            parser.error(f"OP must be one of {', '.join(OPS)}; got {op}")
    if min(options.threads) < 1:
        parser.error(f"--threads must be at least 1; got {min(options.threads)}")
    machine.expect_folder(parser, "--json", options.json)
    return options


def main() -> None:
    options = parse_arguments()
    machine.restart_with(machine.wanted_environment(options.isa, options.thp, options.pinned))
    if options.compile:
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1  # no worker processes beside the timing
    memory.settle_allocator()
    bench = Bench(options)
    bench.run()
    machine.finish(bench.document(), options.json)


if __name__ == "__main__":
    main()
