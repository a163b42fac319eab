"""Turn the JSON of the bench into a page: bench/REPORT.md with two pictures beside it.

    python -m bench.report OPS.json [AGAIN.json ...] [TRAIN.json ...] [--out bench/REPORT.md]

Files of bench.ops with the same settings (instruction set, huge pages) are runs of the same bench:
each row is then the worse of its medians. Files with other settings get their own section. Only
ratios are told: times of one machine on one day say nothing elsewhere.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.ceilings import matmul_rate
from bench.devices import OURS
from bench.machine import write_whole

Row = dict[str, Any]
OUT = Path(__file__).with_name("REPORT.md")
PICTURES = ("speedup.svg", "roofline.svg")
KEY = ("isa", "thp", "op", "case", "dtype", "direction", "threads")
HEAD = "operation | case | dtype | direction | threads | ratio | of | ceiling | memory | error"


def paired(document: Row) -> list[Row]:
    """Our rows of one bench.ops document, each with its settings and its best torch contestant."""
    told = document["machine"]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in document["rows"]:
        row = row | {"isa": told["isa"], "thp": told["thp"]}
        groups.setdefault(tuple(row[k] for k in KEY), {})[row["backend"]] = row
    found = []
    for group in groups.values():
        ours = group.get(OURS)
        if ours is None or ours["ratio_to_best_torch"] is None:
            continue
        ceiling = document["ceilings"][str(ours["threads"])]
        ridge = matmul_rate(ceiling, ours["dtype"]) / ceiling["copy_gb_per_s"]
        intensity = ours["flops"] / max(1, ours["bytes"]) / ridge
        found.append(ours | {"torch": group[ours["best_torch"]], "intensity": intensity})
    return found


def worse(documents: Iterable[Row]) -> list[Row]:
    """Rows of all documents; of rows measured more than once, the one with the lowest ratio."""
    found: dict[tuple, Row] = {}
    for document in documents:
        for row in paired(document):
            key = tuple(row[k] for k in KEY)
            known = found.get(key)
            if known is None or row["ratio_to_best_torch"] < known["ratio_to_best_torch"]:
                found[key] = row
    return list(found.values())


def losing(rows: Iterable[Row]) -> list[Row]:
    """Rows below 1, the worst first."""
    below = [row for row in rows if row["ratio_to_best_torch"] < 1]
    return sorted(below, key=lambda row: row["ratio_to_best_torch"])


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, one line per row."""
    lines = [f"| {HEAD} |", "|" + "---|" * len(HEAD.split("|"))]
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = [
            f"`{row['op']}`",
            row["case"],
            row["dtype"],
            row["direction"],
            str(row["threads"]),
            f"{row['ratio_to_best_torch']:.2f} ({low:.2f} to {high:.2f})",
            row["best_torch"],
            f"{row['pct_of_ceiling']:.0f}% of {row['binds']}",
            _memory(row),
            _error(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _memory(row: Row) -> str:
    """Our extra memory of one call over that of the best torch contestant."""
    mine, other = row["peak_mb"], row["torch"]["peak_mb"]
    if mine is None or other is None:
        return "-"
    return f"{mine / other:.2f}x" if max(mine, other) >= 0.1 and other else "small"


def _error(row: Row) -> str:
    mine, other = row["rel_err"], row["torch"]["rel_err"]
    return "-" if mine is None or other is None else f"{mine:.0e} / {other:.0e}"


def machine_lines(document: Row) -> list[str]:
    """What one run ran on."""
    told, lines = document["machine"], []
    lines.append(f"- `{told['command']}` on {told['date']}, load {told['load']}")
    lines.append(
        f"  - {told['cpu']}, {told['logical_cpus']} CPUs, torch {told['torch']} "
        f"({told['torch_capability']}), pyfast: {told['pyfast']}"
    )
    lines.append(
        f"  - instruction set: {told['isa']}; huge pages in torch's allocator: {told['thp']} "
        f"(system: {told['huge_pages']}); environment: {told['environment'] or 'nothing set'}"
    )
    if told["load"][0] > told["logical_cpus"]:
        lines.append("  - the machine was busy with other work: take these ratios as a hint only")
    return lines


def by_operation(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: the median and the least ratio of each operation."""
    lines = ["| operation | dtype | rows | median | least | below 1 |", "|" + "---|" * 6]
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), []).append(row["ratio_to_best_torch"])
    for (op, dtype), ratios in groups.items():
        below = sum(r < 1 for r in ratios)
        middle = f"{statistics.median(ratios):.2f} | {min(ratios):.2f}"
        lines.append(f"| `{op}` | {dtype} | {len(ratios)} | {middle} | {below} |")
    return lines


def training(document: Row) -> list[str]:
    """Lines about one bench.train document."""
    sizes = f"{document['model']}, batch {document['batch_size']}, "
    sizes += f"{document['context_length']} tokens, {document['threads']} threads"
    lines = ["", f"### {sizes}", "", *machine_lines(document), ""]
    for dtype in document["dtypes"]:
        result = document[dtype]
        middle, low, high = result["ratio"]
        text = f"- {dtype}: {middle:.2f} ({low:.2f} to {high:.2f}) of {result['contestant']}"
        if "shares" in result:
            parts = [f"{p:g}% of {k}" for k, p in result["shares"][OURS].items()]
            mine, other = (result["peak_mb"][n] for n in (OURS, result["contestant"]))
            text += f"; {', '.join(parts)}"
            text += f"; peak memory {mine / other:.2f}x" if mine and other else ""
        verdict = {True: "agree", False: "DISAGREE", None: "were not judged"}[result["agree"]]
        lines.append(f"{text}; the loss curves {verdict}")
    return lines


def page(ops: Sequence[Row], trained: Sequence[Row], pictures: Sequence[str]) -> str:
    """The whole report."""
    rows = worse(ops)
    below = losing(rows)
    lines = ["# Benchmark report", "", *INTRODUCTION, "", "## The runs", ""]
    for document in ops:
        lines += machine_lines(document)
    lines += ["", "## In short", "", f"{len(rows)} rows, {len(below)} of them below 1.", ""]
    lines += by_operation(rows)
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem}]({picture})"]
    lines += ["", "## Where we lose", ""]
    lines += table(below) if below else ["No row is below 1."]
    if trained:
        lines += ["", "## Whole training steps"]
        for document in trained:
            lines += training(document)
    for isa, thp in dict.fromkeys((row["isa"], row["thp"]) for row in rows):
        title = f"## Every row: instruction set {isa}, huge pages {thp}"
        chosen = [row for row in rows if (row["isa"], row["thp"]) == (isa, thp)]
        lines += ["", title, "", *table(chosen)]
    failures = [f for document in ops for f in document["failures"]]
    if failures:
        lines += ["", "## Left out", ""]
        lines += [f"- {f['case']}: {f['backend']}: {f['why']}" for f in failures]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "Made by `python -m bench.report` from the runs named below. A ratio is the time of the",
    "quickest torch contestant over ours, taken round by round in the same run, median and",
    "quartiles: above 1 we are quicker. The ceiling is the larger of bytes over the bandwidth of a",
    "copy and FLOPs over the rate of a matmul, both measured in the same run; the percentage is",
    "how near we come (over 100%: the data stayed in cache, or the machine was busier while the",
    "ceiling was measured). Memory is our extra peak of one call over torch's; errors are ours and",
    "torch's, against float64. Believe ratios within one run only, and none from a busy machine.",
)


def write(documents: Sequence[Row], out: Path) -> None:
    """The page, and its pictures beside it where there are rows to draw."""
    ops = [d for d in documents if d["bench"] == "ops"]
    trained = [d for d in documents if d["bench"] == "train"]
    rows = worse(ops)
    drawn: list[str] = []
    if rows:
        first = (rows[0]["isa"], rows[0]["thp"], max(row["threads"] for row in rows))
        shown = [row for row in rows if (row["isa"], row["thp"], row["threads"]) == first]
        for name, draw in zip(PICTURES, (plots.speedups, plots.roofline), strict=True):
            write_whole(out.with_name(name), draw(shown))
            drawn.append(name)
    write_whole(out, page(ops, trained, drawn))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    options = parser.parse_args(arguments)
    documents = []
    for path in options.files:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"FILE must be JSON of the bench; got {path}: {error}")
        if not isinstance(document, dict) or document.get("bench") not in ("ops", "train"):
            parser.error(f"FILE must be JSON of bench.ops or bench.train; got {path}")
        documents.append(document)
    write(documents, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
