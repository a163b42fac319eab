"""Run a Triton script on CPU tensors: python -m tests.emulator FILE.py [--arch 90] [ARGS...]."""

from __future__ import annotations

import argparse
import runpy
import sys
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
    """Run the script; 0 if nothing was wrong, 1 if a kernel broke a rule, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("file", type=Path, help="a script that launches Triton kernels")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=80, help="compile for this")
    parser.add_argument("--order", choices=list(ORDERS), default="greedy", help="of the warps")
    parser.add_argument("--seed", type=int, default=0, help="of --order random")
    parser.add_argument("--perturb", action="store_true", help="move approximate results")
    options, rest = parser.parse_known_args(argv)
    try:
        from .triton import emulated
    except ImportError as error:
        print(f"emulator: triton must be installed; got: {error}", file=sys.stderr)
        return 2
    own = sys.argv
    sys.argv = [str(options.file), *rest]
    code = 0
    with emulated(
        options.arch, order=options.order, seed=options.seed, perturb=options.perturb
    ) as log:
        try:
            runpy.run_path(str(options.file), run_name="__main__")
        except (Violation, Unsupported) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1 if isinstance(error, Violation) else 2
        finally:
            sys.argv = own
    print(table(log))
    return code


if __name__ == "__main__":
    sys.exit(main())
