"""Run a Triton script without a GPU: python -m tests.emulator FILE.py [--arch 90] [ARGS...]."""

from __future__ import annotations

import argparse
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .module import ORDERS, Unsupported, Violation
from .stats import Stats

COLUMNS = (  # heading, value
    ("launches", lambda s: f"{s.launches}"),
    ("warp instr", lambda s: f"{s.warp_instructions:,}"),
    ("MB read", lambda s: f"{s.load_bytes / 1e6:.3f}"),
    ("MB written", lambda s: f"{s.store_bytes / 1e6:.3f}"),
    ("/compulsory", lambda s: f"{s.traffic_ratio:.2f}"),
    ("sector eff", lambda s: f"{s.sector_efficiency:.2f}"),
    ("bank factor", lambda s: f"{s.bank_factor:.2f}"),
    ("MMA MFLOP", lambda s: f"{s.mma_flops / 1e6:.1f}"),
    ("special ops", lambda s: f"{s.special_ops:,}"),
)


def table(log: Sequence[Any]) -> str:
    """Counters by kernel, in the order of their first launch."""
    kernels: dict[str, Stats] = {}
    for launch in log:
        if launch.stats is not None:
            kernels[launch.name] = kernels.get(launch.name, Stats()) + launch.stats
    rows = [["kernel", *(heading for heading, _ in COLUMNS)]]
    rows += [[name[:40], *(value(s) for _, value in COLUMNS)] for name, s in kernels.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; 0 if nothing was wrong, 1 if a kernel broke a rule or the script raised, 2 if
    it cannot be run.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("file", type=Path, help="a script that launches Triton kernels")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=80, help="compile for this")
    parser.add_argument("--order", choices=list(ORDERS), default="greedy", help="of the warps")
    parser.add_argument("--seed", type=int, default=0, help="of --order random")
    parser.add_argument("--perturb", action="store_true", help="move approximate results")
    options, rest = parser.parse_known_args(argv)
    if not options.file.is_file():
        parser.error(f"FILE must be a script; got {options.file}, which is not there")
    try:
        from .cuda_is_cpu import cuda_is_cpu
        from .triton import emulated
    except ImportError as error:
        print(f"emulator: triton must be installed; got: {error}", file=sys.stderr)
        return 2
    own = sys.argv
    sys.argv = [str(options.file), *rest]
    settings = {"order": options.order, "seed": options.seed, "perturb": options.perturb}
    try:
        with emulated(options.arch, **settings) as log, cuda_is_cpu(options.arch):
            code = _run(options.file)
    finally:
        sys.argv = own
    print(table(log))
    return code


def _run(file: Path) -> int:
    """The script as __main__; what it raises is told, without the frames that are not its own."""
    try:
        runpy.run_path(str(file), run_name="__main__")
    except (Violation, Unsupported) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, Violation) else 2
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        while frames and Path(frames[0].filename) != file:
            frames.pop(0)
        told = traceback.format_list(frames) + traceback.format_exception_only(error)
        print("Traceback (most recent call last):\n" + "".join(told), end="", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
