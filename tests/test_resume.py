"""A run is the same every time, and survives what happens to runs."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast.train import LanguageModelling, fit, loop, report
from tests.small_fit import names, numbers, prepared, tiny_config, write_text

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of text, tokenised once for the whole module."""
    with prepared(tmp_path_factory.mktemp("resume")) as folder:
        yield folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Charts take most of the time of a tiny run."""
    monkeypatch.setattr(report, "write", lambda run_dir: None)


@pytest.mark.parametrize("threads", [1, 2])
def test_fit_gives_the_same_bits_twice(tmp_path, data, threads):
    for name in ("a", "b"):
        fit(tiny_config(data, tmp_path / name, run_threads=threads, run_steps=5))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    fit(tiny_config(data, tmp_path / "c", run_threads=threads, run_steps=5, run_seed=1))
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


@pytest.mark.little_work  # as the other process, which has no conftest
def test_fit_killed_at_any_moment_resumes_to_the_same_bits(tmp_path, data):
    settings = {
        "gpt": {},
        "llama": {
            "model_model_type": "llama",
            "run_dtype": "bfloat16",
            "optim_accumulate": 2,
            "run_patience": 3,
        },
    }
    for name, values in settings.items():
        fit(tiny_config(data, tmp_path / name, **values))
    draw = random.Random()  # other moments every time: none may fail
    kills = [("file operation", n) for n in draw.sample(range(1, 70), 6)]
    kills += [("second", draw.uniform(0.0, 0.4)) for _ in range(2)]
    kinds = [draw.choice(list(settings)) for _ in kills]
    entries = [
        {"at": at, "point": point, "settings": settings[kind]}
        for (at, point), kind in zip(kills, kinds, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed_run.py", data, tmp_path / "killed"],
        input=json.dumps(entries),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, (entries, done.stderr[-3000:])
    assert int(done.stdout) > 0
    for number, kind in enumerate(kinds):
        run_dir = tmp_path / "killed" / str(number)
        assert numbers(run_dir) == numbers(tmp_path / kind), entries[number]
        assert names(run_dir) == names(tmp_path / kind), entries[number]


def test_fit_resumes_where_it_was_interrupted(tmp_path, data, monkeypatch):
    """Ctrl-C saves, says how to go on, and cuts no step in two."""
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started us in the background
    fit(tiny_config(data, tmp_path / "whole"))
    monkeypatch.setattr(LanguageModelling, "batch", _signalling(LanguageModelling.batch, at=6))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 7; go on with --resume .*cut"):
        fit(tiny_config(data, tmp_path / "cut"))
    assert signal.getsignal(signal.SIGINT) is before
    assert "checkpoint-7" in names(tmp_path / "cut")
    monkeypatch.undo()
    fit(tiny_config(data, tmp_path / "cut", run_resume=True))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_fit_resumed_remembers_its_best_and_its_patience(tmp_path, data, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.1])  # of steps 0, 2, 4, 6 and, resumed, 8
    monkeypatch.setattr(LanguageModelling, "validate", lambda *_: {"loss": next(losses)})
    settings = {"run_patience": 2, "run_val_every": 2, "run_steps": 100}
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelling, "batch", _signalling(LanguageModelling.batch, at=6))
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_config(data, tmp_path / "run", **settings))
    before = json.loads((tmp_path / "run" / "checkpoint-7" / "state.json").read_text())["seconds"]
    result = fit(tiny_config(data, tmp_path / "run", run_resume=True, **settings))
    assert (result.step, result.val_loss, result.history[-1]["step"]) == (4, 3.0, 8)
    assert result.history[-1]["seconds"] > before > 0.0  # the time limit counts all sessions


def _signalling(batch, at):
    def batch_and_signal(task, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(task, step)

    return batch_and_signal


def test_fit_resume_of_a_finished_run_changes_nothing(tmp_path, data):
    first = fit(tiny_config(data, tmp_path / "run"))
    second = fit(tiny_config(data, tmp_path / "run", run_resume=True))
    assert (first.step, first.val_loss) == (second.step, second.val_loss)
    assert first.history == second.history


def test_fit_resume_can_lengthen_a_run(tmp_path, data):
    fit(tiny_config(data, tmp_path / "run"))
    result = fit(tiny_config(data, tmp_path / "run", run_resume=True, run_steps=15))
    assert [record["step"] for record in result.history] == list(range(16))


def test_fit_resume_refuses_other_settings_and_other_data(tmp_path, data):
    fit(tiny_config(data, tmp_path / "run", run_steps=4))
    with pytest.raises(
        ValueError, match=r"optim\.lr must be 0\.01 as when the run began; got 0\.1"
    ):
        fit(tiny_config(data, tmp_path / "run", run_resume=True, optim_lr=0.1))
    moved = write_text(tmp_path / "text")
    fit(tiny_config(moved, tmp_path / "other", run_steps=4))
    (moved / "0.txt").write_text("something else")
    with pytest.raises(ValueError, match="data must be what the run began with"):
        fit(tiny_config(moved, tmp_path / "other", run_resume=True))


def test_fit_refuses_to_overwrite_and_to_resume_nothing(tmp_path, data, monkeypatch):
    fit(tiny_config(data, tmp_path / "run", run_steps=1))
    with pytest.raises(ValueError, match=r"run\.dir must be a new directory; got .*run, which"):
        fit(tiny_config(data, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"run\.dir must hold a run to resume; got .*none without"):
        fit(tiny_config(data, tmp_path / "none", run_resume=True))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be given to resume; got no runs/train-\* here"):
        fit(tiny_config(data, None, run_resume=True))


def test_fit_numbers_new_runs_and_resumes_the_newest(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = fit(tiny_config(data, None, run_steps=1))
        assert result.run_dir == Path(f"runs/train-00{number}")
    result = fit(tiny_config(data, None, run_steps=2, run_resume=True))
    assert (result.run_dir, result.step) == (Path("runs/train-002"), 2)


def test_fit_full_disk_while_logging_is_one_sentence(tmp_path, data, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    batch = LanguageModelling.batch

    def fill(task, step):
        if step == 5:
            fill.disk()
        return batch(task, step)

    class Metrics(loop.Metrics):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            fill.disk = lambda: setattr(self, "_file", Full())

    monkeypatch.setattr(loop, "Metrics", Metrics)
    monkeypatch.setattr(LanguageModelling, "batch", fill)
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl must be writable; got No space left"):
        fit(tiny_config(data, tmp_path / "run"))
    monkeypatch.undo()
    fit(tiny_config(data, tmp_path / "run", run_resume=True))
    fit(tiny_config(data, tmp_path / "whole"))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
