"""From times to rows: ratios between contestants, and the share of the ceiling that binds."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.ceilings import binding, peak_rate
from bench.contestants import Call
from bench.devices import OURS, is_ours
from bench.timing import Timing, ratio


@dataclass(frozen=True)
class Job:
    """One measurement: contestants by name on the same inputs, and what the work must cost."""

    op: str
    case: str
    direction: str
    dtype: str
    shape: str
    threads: int
    bytes: int  # that must move at least once
    flops: int
    calls: dict[str, Call]
    rel_err: dict[str, float] = field(default_factory=dict)
    rel_err_case: str = ""  # where the errors come from another case
    peak: dict[str, int | None] = field(default_factory=dict)  # bytes of one call


def best_torch(times: Mapping[str, Timing]) -> str | None:
    """The quickest contestant that is not ours; None if there is none."""
    torch_names = [name for name in times if not is_ours(name)]
    return min(torch_names, key=lambda name: times[name].median, default=None)


def rows(job: Job, times: Mapping[str, Timing], ceiling: dict) -> list[dict[str, Any]]:
    """One row per contestant; `ceiling` is what was measured for the job's thread count."""
    best = best_torch(times)
    binds, least = binding(job.bytes, job.flops, job.dtype, ceiling)
    loop = peak_rate(ceiling, job.dtype)
    found = []
    for name, timing in times.items():
        share = ratio(times[best], timing) if best else (math.nan,) * 3
        peak, error = job.peak.get(name), job.rel_err.get(name)
        rate = job.flops / timing.median / 1e9
        found.append(
            {
                "op": job.op,
                "case": job.case,
                "direction": job.direction,
                "dtype": job.dtype,
                "shape": job.shape,
                "backend": name,
                "threads": job.threads,
                "ms": _rounded(1e3 * timing.median),
                "ms_quartiles": [_rounded(1e3 * s) for s in timing.quartiles],
                "rounds": len(timing.samples),
                "best_torch": best,
                "ratio_to_best_torch": _rounded(share[0]),
                "ratio_quartiles": [_rounded(s) for s in share[1:]],
                "bytes": job.bytes,
                "flops": job.flops,
                "binds": binds,
                "pct_of_ceiling": _rounded(100 * least / timing.median),
                "pct_of_peak": _rounded(100 * rate / loop[1]) if loop else None,
                "peak_loop": loop[0] if loop else None,
                "peak_mb": None if peak is None else round(peak / 1e6, 3),
                "rel_err": _rounded(error),
                "rel_err_case": job.rel_err_case or job.case,
            }
        )
    return found


def _rounded(value: float | None) -> float | None:
    """Four digits; None for what is not a number, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def line(found: list[dict[str, Any]]) -> str:
    """One line for people: ours against the best of torch, and the other contestants' ratios."""
    by_name = {row["backend"]: row for row in found}
    ours, best = by_name[OURS], by_name.get(found[0]["best_torch"])
    label = f"{ours['op']} {ours['case']}"
    text = f"{label[:47]:48}{ours['direction']:17}{ours['dtype']:9}{ours['threads']} thr "
    text += f"{ours['ms']:9.4g} ms "
    if best is not None:
        low, high = ours["ratio_quartiles"]
        ratio_text = f"{ours['ratio_to_best_torch']:.2f}x"
        text += f"{ratio_text:>7} ({low:.2f} to {high:.2f}) of {best['backend']:<10}"
    text += f"{ours['pct_of_ceiling']:4.0f}% of {ours['binds']:<7}"
    pairs = [row for row in (ours, best) if row is not None]
    if all(row["peak_mb"] is not None for row in pairs):
        text += " MB " + " / ".join(f"{row['peak_mb']:.4g}" for row in pairs)
    if all(row["rel_err"] is not None for row in pairs):
        text += "  err " + " / ".join(f"{row['rel_err']:.1e}" for row in pairs)
    others = [row for row in found if row is not ours and row is not best]
    told = [f"{row['backend']} {row['ratio_to_best_torch']:.2f}x" for row in others]
    return text + (f"  [{', '.join(told)}]" if told else "")


def summary(found: list[dict[str, Any]]) -> str:
    """How many of our rows win, lose, and by how much in the middle."""
    ratios = [r["ratio_to_best_torch"] for r in found if r["backend"] == OURS]
    ratios = [r for r in ratios if r is not None]
    if not ratios:
        return "no row has a torch contestant"
    losing = sum(r < 1 for r in ratios)
    middle = statistics.median(ratios)
    return (
        f"{len(ratios)} rows: {len(ratios) - losing} at or above the best of torch, "
        f"{losing} below; median {middle:.2f}x"
    )
