"""The page of a run of bench.gpu: what passed, what the counters say, who was quicker."""

from collections.abc import Iterable
from typing import Any

from bench import report
from bench.devices import OURS, is_ours

Document = dict[str, Any]


def page(found: Document) -> str:
    """Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in found["gpu"].items())
    title = "A dry run on the emulator: its times say nothing" if found["dry_run"] else "A GPU run"
    lines = [f"# {title}", "", f"{facts}; {found['date']}; sources {found['revision']}.", ""]
    lines += ["| step | outcome | seconds |", "|---|---|---|"]
    for name, told in found["steps"].items():
        lines.append(f"| {name} | {outcome(told)} | {told.get('seconds', '')} |")
    for name, told in found["steps"].items():
        if told.get("status"):
            lines += ["", f"## {name} failed", "", "```", told["tail"][-2000:], "```"]
    results = found["results"]
    if results.get("counters"):
        lines += counted(results["counters"])
    if results.get("ops"):
        lines += timed(results["ops"])
    return "\n".join(lines) + "\n"


def outcome(told: Document) -> str:
    """One cell for what became of a step."""
    if "left_out" in told:
        return f"left out: {told['left_out']}"
    last = (told["tail"].strip().splitlines() or [""])[-1]
    words = last if len(last) < 100 and "|" not in last else ""
    return f"failed ({told['status']})" if told["status"] else f"passed {words}".strip()


def counted(document: Document) -> list[str]:
    """ncu beside the emulator, launch by launch."""
    lines = ["", "## Counters: the GPU's over the emulator's"]
    for backend, told in document["backends"].items():
        names = [n for n in (told["rows"] or [{}])[0] if n not in ("kernel", "grid", "us")]
        lines += ["", f"### {backend}", "", *(f"- {p}" for p in told["problems"]), ""]
        lines += [f"| kernel | us | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
        for row in told["rows"]:
            cells = [_quotient(*row.get(name, (0, 0))) for name in names]
            lines.append(f"| `{row['kernel']}` | {row['us']:.1f} | {' | '.join(cells)} |")
    return lines


def _quotient(gpu: float, emulator: float) -> str:
    if gpu == emulator:
        return "same"
    return f"{gpu / emulator:.3f}" if emulator else f"{gpu:.0f} / 0"


def timed(document: Document) -> list[str]:
    """Each measurement: everyone's time, the quickest of the others over the quickest of ours."""
    lines = ["", "## Times", "", "In ms; in bold who was quickest.", ""]
    lines += ["| operation | dtype | direction | ratio | ceiling | contestants |", "|" + "---|" * 6]
    below = []
    for rows in grouped(document["rows"]):
        ours = min((r for r in rows if is_ours(r["backend"])), key=lambda r: r["ms"], default=None)
        theirs = [r for r in rows if not is_ours(r["backend"])]
        if ours is None or not theirs:
            continue
        best = min(theirs, key=lambda r: r["ms"])
        told = [(r["ms"], f"{r['backend']} {r['ms']:g}") for r in rows]
        quickest = min(told)[0]
        cells = ", ".join(f"**{text}**" if ms == quickest else text for ms, text in told)
        auto = next((r for r in rows if r["backend"] == OURS), ours)
        ratio = best["ms"] / auto["ms"]
        head = f"| `{ours['op']}` {ours['case']} | {ours['dtype']} | {ours['direction']}"
        share = f"{auto['pct_of_ceiling']:.0f}% of {auto['binds']}"
        lines.append(f"{head} | {ratio:.2f} | {share} | {cells} |")
        if ratio < 1:
            below.append((ratio, f"{head} | {ratio:.2f} of {best['backend']} |"))
    lines += ["", f"### Below 1: {len(below)} rows", ""]
    if below:
        lines += ["| operation | dtype | direction | ratio |", "|" + "---|" * 4]
        lines += [text for _, text in sorted(below)]
    failures = document["failures"]
    lines += ["", "### Left out", ""] if failures else []
    lines += [f"- {f['case']}: {f['backend']}: {f['why']}" for f in failures]
    return lines


def grouped(rows: Iterable[Document]) -> list[list[Document]]:
    """Rows of one measurement together."""
    groups: dict[tuple, list[Document]] = {}
    for row in rows:
        key = tuple(row[name] for name in report.KEY if name in row)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
