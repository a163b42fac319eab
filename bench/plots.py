"""The two pictures of the report as SVG text: bars of speed-up, and a roofline."""

import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_COLOURS = {"float32": "#3465a4", "bfloat16": "#ce5c00", "float16": "#4e9a06"}
_STYLE = {"svg.fonttype": "none", "font.size": 8, "axes.axisbelow": True}
_METADATA = dict.fromkeys(("Date", "Creator"))  # the same rows give the same file


def speedups(rows: Sequence[Row]) -> str:
    """Horizontal bars of ratio_to_best_torch, a panel per direction, with a line at 1."""
    panels = [[r for r in rows if r["direction"] == "forward"]]
    panels.append([r for r in rows if r["direction"] != "forward"])
    height = 1.2 + 0.19 * max(map(len, panels))
    figure = _figure((11.5, height))
    for axes, title, found in zip(
        figure.subplots(1, 2), ("forward", "forward and backward, or a step"), panels, strict=True
    ):
        ratios = [r["ratio_to_best_torch"] for r in found]
        colours = [_COLOURS[r["dtype"]] for r in found]
        axes.barh(range(len(found)), [r - 1 for r in ratios], left=1, color=colours, height=0.7)
        axes.set_yticks(range(len(found)), [label(r) for r in found])
        axes.set_xscale("log")
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if _near(t, ratios)]
        axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axes.minorticks_off()
        axes.axvline(1.0, color="black", linewidth=1)
        axes.grid(axis="x", linewidth=0.5)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_title(title)
    _legend(figure, {row["dtype"] for row in rows})
    return _svg(figure)


def roofline(rows: Sequence[Row]) -> str:
    """Share of the matmul rate against FLOPs per byte, both relative to the machine's ridge.

    Below the ridge (left of 1) the copy's bandwidth is the roof, above it the matmul's rate.
    """
    figure = _figure((7.0, 4.6))
    axes = figure.subplots()
    xs = [row["intensity"] for row in rows] or [1.0]
    low, high = min([*xs, 0.01]) / 2, max([*xs, 10]) * 2
    axes.plot([low, 1, high], [low, 1, 1], color="black", linewidth=1.2)
    for row in rows:
        reached = min(1.0, row["intensity"]) * row["pct_of_ceiling"] / 100
        marker = "o" if row["direction"] == "forward" else "s"
        axes.plot(row["intensity"], reached, marker, color=_COLOURS[row["dtype"]], ms=4, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte, 1 = where copy and matmul take equally long")
    axes.set_ylabel("share of the matmul's rate")
    axes.set_title("pyfast under the ceilings (round: forward; square: with backward)")
    axes.grid(linewidth=0.5)
    _legend(figure, {row["dtype"] for row in rows})
    return _svg(figure)


def label(row: Row) -> str:
    """What names a bar."""
    return f"{row['op']} {row['case']}, {row['dtype']}"


def _near(tick: float, ratios: Sequence[float]) -> bool:
    return min([1.0, *ratios]) / 2 <= tick <= max([1.0, *ratios]) * 2


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no windows, no global state

    matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": "bench"})
    return Figure(figsize=size, layout="constrained")


def _legend(figure: Any, dtypes: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[name], label=name) for name in _COLOURS if name in dtypes]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=_METADATA)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(lines) + "\n"
