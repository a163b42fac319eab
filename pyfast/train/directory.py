"""Where a run lives: choosing, opening and checking its directory."""

import json
import re
from pathlib import Path
from typing import BinaryIO

from pyfast.train import checkpoint
from pyfast.train.config import TrainConfig

RUNS = Path("runs")
RUN_FILE = "run.json"
LOCK_FILE = ".lock"


def open_run(config: TrainConfig, name: str) -> tuple[Path, BinaryIO | None]:
    """The directory of a new run (made here), or of the run to resume (checked here), and its lock.

    Raises ValueError when a new run would overwrite another, when there is nothing to resume, when
    the configuration is not the one the run began with, and when another process trains there.
    """
    if config.run.resume:
        return _reopen(config, name)
    if config.run.dir is None:
        run_dir = _make_next(name)
    else:
        run_dir = Path(config.run.dir).expanduser()
        if (run_dir / RUN_FILE).exists() or checkpoint.steps_saved(run_dir):
            raise ValueError(
                f"train: run.dir must be a new directory; got {run_dir}, which holds a run; "
                f"resume it (--resume {run_dir}) or name another"
            )
        with checkpoint.disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
    lock = locked(run_dir)
    checkpoint.write_atomically(run_dir / RUN_FILE, _json(config, run_dir))
    return run_dir, lock


def locked(run_dir: Path) -> BinaryIO | None:
    """Keep other processes out of `run_dir` until the result is closed or the process ends.

    ValueError if another has it. None where the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    with checkpoint.disk_errors(run_dir):
        file = (run_dir / LOCK_FILE).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"train: run.dir must not be in use; got {run_dir}, where another process trains"
            ) from None
    return file


def newest_run(name: str) -> Path:
    """The run with the highest number among runs/<name>-*; ValueError if there is none."""
    found = [path for path in _numbered(name) if (path / RUN_FILE).exists()]
    if not found:
        raise ValueError(f"train: run.dir must be given to resume; got no {RUNS / name}-* here")
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _reopen(config: TrainConfig, name: str) -> tuple[Path, BinaryIO | None]:
    run_dir = Path(config.run.dir).expanduser() if config.run.dir else newest_run(name)
    if not (run_dir / RUN_FILE).is_file():
        raise ValueError(
            f"train: run.dir must hold a run to resume; got {run_dir} without {RUN_FILE}; "
            "start it without --resume"
        )
    stored = TrainConfig.load(run_dir / RUN_FILE)
    _expect_same(stored, config)
    lock = locked(run_dir)
    checkpoint.remove_leftovers(run_dir)
    return run_dir, lock


def _expect_same(stored: TrainConfig, config: TrainConfig) -> None:
    """Length, place and reporting may change between sessions; what decides the numbers may not."""
    old, new = stored.to_dict(), config.to_dict()
    fixed = [("run", key) for key in ("seed", "dtype")]
    fixed += [(name, key) for name in ("data", "model", "optim") for key in old[name]]
    for section, key in fixed:
        if old[section][key] != new[section][key]:
            raise ValueError(
                f"train: {section}.{key} must be {json.dumps(old[section][key])} as when the run "
                f"began; got {json.dumps(new[section][key])}; drop it, or start another run"
            )


def _make_next(name: str) -> Path:
    """Make runs/<name>-<n>, n one above the highest there is; two processes get two directories."""
    with checkpoint.disk_errors(RUNS):
        RUNS.mkdir(exist_ok=True)
        number = max((int(p.name.rsplit("-", 1)[1]) for p in _numbered(name)), default=0)
        while True:
            number += 1
            path = RUNS / f"{name}-{number:03}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path


def _numbered(name: str) -> list[Path]:
    return [p for p in RUNS.glob(f"{name}-*") if re.fullmatch(rf"{re.escape(name)}-\d+", p.name)]


def _json(config: TrainConfig, run_dir: Path) -> bytes:
    values = config.to_dict()
    values["run"] |= {"dir": str(run_dir), "resume": False}
    return (json.dumps(values, indent=2) + "\n").encode()
