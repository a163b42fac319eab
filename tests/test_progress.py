"""What a run says while it runs."""

import io
import json

import pytest

from pyfast.train import progress
from pyfast.train.progress import Metrics, Progress, read_metrics

RECORD = {"train/loss": 4.21312, "train/tokens_per_sec": 1234.4}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(monkeypatch):
    """show(mode, terminal) prints steps 1..10 and returns what standard error got."""

    def run(mode="auto", terminal=False):
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(progress.sys, "stderr", stream)
        shown = Progress(mode, step=0, total_steps=10, log_every=4)
        for step in range(1, 11):
            extra = {"eval/loss": 4.5, "eval/accuracy": 0.25} if step == 5 else {}
            shown.step({"step": step, **RECORD, **extra}, 10, 65.0 if step < 10 else 0.0)
        shown.note("a note")
        shown.close()
        return stream.getvalue()

    return run


def test_progress_without_a_terminal_is_a_line_per_interval(show, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show().splitlines() == [
        "step 4/10  loss 4.2131  1,234 tokens/s  1m05s left",
        "step 5/10  loss 4.2131  1,234 tokens/s  val 4.5000  accuracy 0.2500  1m05s left",
        "step 8/10  loss 4.2131  1,234 tokens/s  1m05s left",
        "step 10/10  loss 4.2131  1,234 tokens/s",
        "a note",
    ]


def test_progress_on_a_terminal_is_a_bar(show, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = show(terminal=True)
    assert "10/10" in text
    assert "loss 4.2131  1,234 tokens/s" in text
    assert "\r" in text


def test_progress_honours_no_color(show, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = show(terminal=True)
    assert "\r" not in text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 5


def test_progress_none_is_silent(show):
    assert show("none", terminal=True) == ""


def test_metrics_are_cut_to_the_step_that_goes_on(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "tra')
    assert len(read_metrics(tmp_path)) == 5
    metrics = Metrics(tmp_path, 2)
    metrics.append({"step": 3, "train/loss": 1.5})
    assert read_metrics(tmp_path) == [
        {"step": 0},
        {"step": 1},
        {"step": 2},
        {"step": 3, "train/loss": 1.5},
    ]
    metrics.close()
