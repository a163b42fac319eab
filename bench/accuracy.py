"""The error of every operation against float64, beside torch's own error in the same dtype.

    python -m bench.accuracy [OP ...] [--dtypes float32 bfloat16 float16] [--json FILE]

Cases, inputs and truth are those of the tests (pyfast/testing.py). An error is the largest
difference from the float64 reference, relative to the largest value of it. The table has the worst
of each operation, for outputs and for gradients (of AdamW: what it steps); the last line of stdout
is one JSON object with a row per tensor.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import errors, machine
from bench.contestants import STEP, TRAINING, contestants, copied
from bench.devices import OURS
from pyfast import backend
from pyfast.testing import Case, cases

DTYPES = ("float32", "bfloat16", "float16")
TORCH = "eager"


def measure(case: Case, dtype: str) -> Iterator[dict[str, Any]]:
    """One row per output and gradient: our error and torch's."""
    direction = TRAINING if case.grads else STEP
    inputs = case.inputs(getattr(torch, dtype))
    exact = errors.truth(case, inputs, direction)
    binders = contestants(case)
    ours, theirs = (binders[name](copied(inputs), direction)() for name in (OURS, TORCH))
    for (tensor, mine), (_, other), (_, true) in zip(ours, theirs, exact, strict=True):
        yield {
            "op": case.op,
            "case": case.name,
            "dtype": dtype,
            "tensor": tensor,
            "kind": "gradient" if tensor.startswith("grad_") else "output",
            "rel_err": errors.relative_error(mine, true.double()),
            "torch_rel_err": errors.relative_error(other, true.double()),
        }


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with our largest error for each operation, dtype and kind."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["kind"])
        if key not in found or row["rel_err"] > found[key]["rel_err"]:
            found[key] = row
    return list(found.values())


def line(row: dict[str, Any]) -> str:
    """One line of the table for people."""
    text = f"{row['op']:22}{row['dtype']:10}{row['kind']:10}{row['rel_err']:10.1e}"
    return f"{text}{row['torch_rel_err']:10.1e}  {row['tensor']} of {row['case']}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__.split("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(backend.OPS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object here too")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in backend.OPS:
            parser.error(f"OP must be one of {', '.join(backend.OPS)}; got {op}")
    machine.expect_folder(parser, "--json", options.json)
    return options


def main() -> None:
    options = parse_arguments()
    told = machine.facts()
    print("\n".join(machine.headline(told)))
    print(f"{'worst error':22}{'dtype':10}{'of':10}{'ours':>10}{'torch':>10}  where")
    rows: list[dict[str, Any]] = []
    for op in options.ops or backend.OPS:
        for dtype in options.dtypes:
            found = [row for case in cases(op) for row in measure(case, dtype)]
            print("\n".join(map(line, worst(found))), flush=True)
            rows += found
    machine.finish({"bench": "accuracy", "machine": told, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
