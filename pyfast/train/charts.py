"""Charts of a run as inline SVG; their colours are the page's CSS variables, which suits dark mode.

Needs matplotlib (the `train` extra), which is imported when a chart is drawn.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Stand-ins that matplotlib accepts as colours; each becomes a CSS variable in the finished SVG.
_INK, _GRID, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404"
_CSS = {_INK: "--ink-soft", _GRID: "--line", _FIRST: "--first", _SECOND: "--second"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, readable when scaled
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, and its points in order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def line_chart(name: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """An <svg> element with one or two lines. `name` must be unique in a page: it makes the ids."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no windows, no global state
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")  # inches: a phone's width
        axes = figure.subplots()
        for line, colour in zip(lines, (_FIRST, _SECOND), strict=False):
            few = line.dots or len(line.x) == 1  # a single point draws no line
            axes.plot(
                line.x, line.y, color=colour, marker="o" if few else "", ms=3.5, label=line.name
            )
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=0 if from_zero else None)
        if len(lines) > 1:
            axes.legend(frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Drop what only a file needs (prologue, fixed size, fonts) and bring in the page's colours."""
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg [^>]*>", f'<svg {view_box} role="img" aria-label="{name}">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
