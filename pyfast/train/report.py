"""`report.html`: what a run did, on one self-contained page (no script, no outside address).

It is made from what the run directory holds, whatever that is so far: `metrics.jsonl`, `run.json`,
`samples.jsonl`, `evaluation.json`. Every string from there is escaped.
"""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from pyfast import __version__, backend
from pyfast.train.charts import Line, line_chart
from pyfast.train.checkpoint import write_atomically

REPORT_FILE = "report.html"
SAMPLES_FILE = "samples.jsonl"
EVALUATION_FILE = "evaluation.json"

# (title, names and keys of the lines, whether the axis starts at zero)
_CHARTS = (
    ("Loss", (("training", "train/loss"), ("validation", "eval/loss")), False),
    ("Validation accuracy", (("validation", "eval/accuracy"),), True),
    ("Tokens per second", (("tokens/s", "train/tokens_per_sec"),), True),
    ("Learning rate", (("learning rate", "train/lr"),), True),
    ("Gradient norm, before clipping", (("gradient norm", "train/grad_norm"),), True),
)
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2026;
  --ink-soft: #5d6470; --line: #e3e4e8; --first: #2f6fde; --second: #d9622b; --hit: 47 111 222; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e6e8ec;
  --ink-soft: #9aa2af; --line: #30343c; --first: #7aa7ff; --second: #ff9d68; --hit: 122 167 255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .25rem; }
p { margin: .25rem 0 0; }
.soft, th { color: var(--ink-soft); }
.grid, .numbers { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.numbers { margin-top: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; min-width: 0; }
.numbers b { display: block; font-size: 1.35rem; font-weight: 600; }
.numbers span, .card .soft { color: var(--ink-soft); font-size: .8rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink-soft); }
pre { margin: 0; overflow-x: auto; font: .8rem/1.5 ui-monospace, monospace; tab-size: 4; }
pre b { color: var(--first); font-weight: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
td, th { padding: .3rem .9rem .3rem 0; vertical-align: top; overflow-wrap: anywhere; }
.measures td, .measures th + th { text-align: right; padding: .3rem 0 .3rem .9rem; }
.confusion td { min-width: 1.8rem; padding: .4rem .1rem; text-align: center;
  border: 2px solid var(--card); }
.confusion td, .confusion th { overflow-wrap: normal; white-space: nowrap; }
.confusion thead th { padding: .3rem; writing-mode: vertical-rl; transform: rotate(180deg); }
footer { margin-top: 3rem; font-size: .8rem; color: var(--ink-soft); }
"""


def write(run_dir: str | Path) -> Path:
    """Write `report.html` into the run directory, whole or not at all, and return its path."""
    run_dir = Path(run_dir)
    config = _read_object(run_dir / "run.json")
    history = _history(read_lines(run_dir / "metrics.jsonl"))
    evaluation = _read_object(run_dir / EVALUATION_FILE)
    name = run_dir.resolve().name
    body = [
        f"<header><h1>{escape(name)}</h1>{_what(config, run_dir)}</header>",
        _numbers(history, evaluation),
        _section("Curves", _charts(history)),
        _evaluation(evaluation),
        _section("Samples", _samples(read_lines(run_dir / SAMPLES_FILE))),
        _section("Configuration", _configuration(config)),
        _section("What ran each operation", _backends(config)),
        f"<footer>Written by pyfast {escape(__version__)}.</footer>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} | pyfast</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{''.join(body)}\n</body></html>\n"
    )
    path = run_dir / REPORT_FILE
    write_atomically(path, page.encode())
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that was cut off by a crash is passed over."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _history(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Key -> (steps, values): finite numbers only, in order of steps, the last word per step."""
    series: dict[str, dict[float, float]] = {}
    for row in rows:
        step = row.get("step")
        if not _is_number(step):
            continue
        for key, value in row.items():
            if key != "step" and _is_number(value):
                series.setdefault(key, {})[step] = value
    return {key: (sorted(at), [at[step] for step in sorted(at)]) for key, at in series.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _what(config: dict[str, Any], run_dir: Path) -> str:
    model, data = config.get("model", {}), config.get("data", {})
    task = _read_object(run_dir / "task.json").get("task", "language modelling")
    words = [str(task), str(model.get("model_type", ""))]
    if model.get("init_from"):
        words[1] = f"from {model['init_from']}"
    if data.get("path"):
        words.append(f"on {data['path']}")
    return f'<p class="soft">{escape(", ".join(filter(None, words)))}</p>'


def _numbers(history: dict[str, tuple[list[float], list[float]]], evaluation: dict) -> str:
    """The handful of figures that people look for first."""
    found: list[tuple[str, str]] = []
    if history:
        found.append(("steps", f"{max(steps[-1] for steps, _ in history.values()):,.0f}"))
    for key, label in (("train/loss", "training loss"), ("eval/accuracy", "validation accuracy")):
        if key in history:
            found.append((label, f"{history[key][1][-1]:.3f}"))
    if "eval/loss" in history:
        found.append(("best validation loss", f"{min(history['eval/loss'][1]):.3f}"))
    if "train/tokens_per_sec" in history:
        speeds = sorted(history["train/tokens_per_sec"][1])
        found.append(("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    if "seconds" in history:
        minutes, seconds = divmod(round(history["seconds"][1][-1]), 60)
        found.append(("minutes", f"{minutes}:{seconds:02d}"))
    for key, label in (("accuracy", "test accuracy"), ("bits_per_byte", "bits per byte")):
        if _is_number(evaluation.get(key)):
            found.append((label, f"{evaluation[key]:.3f}"))
    cards = (f'<div class="card"><b>{v}</b><span>{escape(k)}</span></div>' for k, v in found)
    return f'<div class="numbers">{"".join(cards)}</div>' if found else ""


def _charts(history: dict[str, tuple[list[float], list[float]]]) -> str:
    cards = []
    for title, keys, from_zero in _CHARTS:
        lines = [
            Line(name, *history[key], dots=key.startswith("eval/"))
            for name, key in keys
            if key in history
        ]
        if not lines:
            continue
        svg = line_chart(title, lines, from_zero=from_zero)
        cards.append(f'<div class="card"><h3>{escape(title)}</h3>{svg}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _samples(samples: list[dict[str, Any]]) -> str:
    cards = []
    for sample in samples:
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        about = ", ".join(
            f"{key.replace('_', ' ')} {sample[key]}"
            for key in ("step", "temperature", "top_k", "top_p", "seed")
            if sample.get(key) is not None
        )
        cards.append(
            f'<div class="card"><pre><b>{escape(prompt)}</b>{escape(text)}</pre>'
            f'<p class="soft">{escape(about)}</p></div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _configuration(config: dict[str, Any]) -> str:
    cards = []
    for section, values in config.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        rows = "".join(
            f"<tr><th>{escape(str(key))}</th><td>{escape(_shown(value))}</td></tr>"
            for key, value in pairs
        )
        cards.append(f'<div class="card"><h3>{escape(section)}</h3><table>{rows}</table></div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _backends(config: dict[str, Any]) -> str:
    """The choice at the time of writing, on the device of the run."""
    device = str(config.get("run", {}).get("device", "cpu")).split(":")[0]
    rows = "".join(
        f"<tr><th>{escape(op)}</th><td>{escape(choice.backend)}</td>"
        f"<td>{escape(choice.why)}</td></tr>"
        for op, on, choice in backend.describe()
        if on == device
    )
    return f'<div class="card scroll"><table>{rows}</table></div>' if rows else ""


def _evaluation(found: dict[str, Any]) -> str:
    """Per-class measures and the confusion matrix, as `pyfast evaluate` left them."""
    if "per_class" not in found:
        return ""
    measures = ("precision", "recall", "f1")
    head = "".join(f"<th>{name}</th>" for name in ("", *measures, "texts"))
    rows = [*found["per_class"].items(), ("macro average", found["macro"])]
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{row[measure]:.3f}</td>" for measure in measures)
        + f"<td>{row['support']}</td></tr>"
        for name, row in rows
    )
    table = f'<table class="measures"><tr>{head}</tr>{body}</table>'
    return _section(
        "On the test part",
        f'<div class="grid"><div class="card scroll"><h3>By class</h3>{table}</div>'
        f'<div class="card scroll"><h3>Confusion matrix</h3>{_confusion(found)}</div></div>',
    )


def _confusion(found: dict[str, Any]) -> str:
    """Rows are the true labels; a cell's shade is its share of the row."""
    names = list(found["per_class"])
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, counts in zip(names, found["confusion"], strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td style="background: rgb(var(--hit) / {0.6 * n / total:.2f})">{n or ""}</td>'
            for n in counts
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead>{"".join(rows)}</table>'
        '<p class="soft">Rows: the true label. Columns: the answer.</p>'
    )
