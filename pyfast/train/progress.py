"""What a run says while it runs: metrics.jsonl for programs, a bar or lines for people."""

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from pyfast.train.checkpoint import disk_errors, write_atomically

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl of a run directory: one JSON object a line, one line a step."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Keep the records up to `step` (those of a resumed run) and append from there."""
        self.path = run_dir / METRICS
        self.records = [record for record in read_metrics(run_dir) if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.path, lines.encode())
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (closed by close)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record at once, so that a killed run has lost none."""
        line = (json.dumps(record) + "\n").encode()
        with disk_errors(self.path):
            while line:  # a disk with a little space left takes a part before it refuses
                line = line[self._file.write(line) :]
        self.records.append(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, up to the first line that a kill has cut short; [] without a file."""
    records: list[dict[str, Any]] = []
    try:
        lines = (run_dir / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


class Progress:
    """A tqdm bar on a terminal, else one line every `log_every` steps; on standard error.

    mode: "auto", "bar", "lines" or "none". Neither uses colour; NO_COLOR also turns the bar into
    lines, because a bar redraws itself with terminal codes.
    """

    def __init__(self, mode: str, step: int, total_steps: int, log_every: int) -> None:
        self.stream: TextIO = sys.stderr
        if mode == "auto":
            plain = os.environ.get("NO_COLOR") or not self.stream.isatty()
            mode = "lines" if plain else "bar"
        self.mode, self.log_every, self.bar = mode, log_every, None
        if mode == "bar":
            from tqdm import tqdm

            self.bar = tqdm(
                initial=step,
                total=total_steps,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar} {elapsed} < {remaining}{postfix}",
            )

    def step(self, record: dict[str, Any], total_steps: int, seconds_left: float | None) -> None:
        """Show the record of one step; `seconds_left` is None while nobody knows."""
        step = record["step"]
        if self.bar is not None:
            self.bar.total = total_steps
            self.bar.set_postfix_str(_measures(record), refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.mode == "lines":
            due = step % self.log_every == 0 or step == total_steps or "eval/loss" in record
            if due:
                left = f"  {_duration(seconds_left)} left" if seconds_left else ""
                self._write(f"step {step}/{total_steps}  {_measures(record)}{left}")

    def note(self, text: str) -> None:
        """Say one sentence, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        elif self.mode == "lines":
            self._write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def _measures(record: dict[str, Any]) -> str:
    """What the record holds, as in `loss 4.2131  1,234 tokens/s  val 4.3014  accuracy 0.8100`."""
    parts = []
    if "train/loss" in record:
        parts.append(f"loss {record['train/loss']:.4f}")
        parts.append(f"{record['train/tokens_per_sec']:,.0f} tokens/s")
    for key, value in record.items():
        if key.startswith("eval/"):
            name = key.removeprefix("eval/")
            parts.append(f"{'val' if name == 'loss' else name} {value:.4f}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
