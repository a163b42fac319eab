"""The benchmarks run, are fair in their order, and end in one JSON line."""

import json
import sys

import pytest

from bench import ops, timing, train
from pyfast.testing import cases

TINY = "--steps 6 --batch-size 2 --context-length 16 --vocab-size 300"
TINY += " --n-layer 2 --n-head 2 --n-embd 32"


def test_interleave_takes_turns_and_turns_round() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.interleave(calls, rounds=3, warmup=1, repeat=False)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert all(len(times[name].samples) == 3 for name in calls)


def test_interleave_repeats_short_calls() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    times = timing.interleave({"short": call}, rounds=2, warmup=1)
    assert count > 100
    assert times["short"].median < timing.MIN_SAMPLE


def test_ratio_is_paired_round_by_round() -> None:
    slow, quick = timing.Timing((2.0, 4.0, 8.0)), timing.Timing((1.0, 2.0, 4.0))
    assert timing.ratio(slow, quick) == (2.0, 2.0, 2.0)


def test_bench_train_curves_agree(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *TINY.split()])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exit_.value.code == 0
    for dtype in ("float32", "bfloat16"):
        losses = result[dtype]["losses"]["pyfast"]
        assert result[dtype]["agree"] and len(losses) == 6 and losses[-1] < losses[0]


def test_bench_train_refuses_too_few_steps(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "3"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--steps must be more than 3, the untimed first ones; got 3" in capsys.readouterr().err


def test_bench_ops_prints_rows_and_json(monkeypatch, capsys) -> None:
    arguments = "rope adamw_step_ --rounds 1 --dtypes float32"
    monkeypatch.setattr(ops, "cases", lambda op: cases(op)[:1])
    monkeypatch.setattr(ops, "ceilings", lambda dtype: {"gigabytes_per_s": 1.0, "gigaflops": 1.0})
    monkeypatch.setattr(sys, "argv", ["ops", *arguments.split()])
    ops.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["op"], row["direction"]) for row in result["rows"]}
    assert rows == {("rope", "forward"), ("rope", "backward"), ("adamw_step_", "forward")}
