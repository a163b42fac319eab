"""Kills tiny runs with SIGKILL and resumes them: python killed_run.py DATA FOLDER < JSON list.

Each entry is {"at": "file operation" or "second", "point": number, "settings": {...}}; run number i
lives in FOLDER/i. Every run is killed at its point, then resumed to its end. One process imports
everything and forks for each session, which then costs tenths of a second; it computes on one
thread, because others would not survive the fork.
"""

import functools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from pyfast.train import fit, report
from tests.small_fit import tiny_config

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def main() -> None:
    data, folder = map(Path, sys.argv[1:])
    report.write = lambda run_dir: None  # charts take longer than the run
    fit(tiny_config(data, folder / "imports", run_steps=1))  # also what is imported late
    killed = 0
    for number, entry in enumerate(json.load(sys.stdin)):
        run_dir = folder / str(number)
        killed += in_child(functools.partial(first_session, data, run_dir, entry), entry)
        if in_child(functools.partial(second_session, data, run_dir, entry), None):
            sys.exit(f"run {number} failed when resumed")
    print(killed)


def first_session(data: Path, run_dir: Path, entry: dict) -> None:
    """A new run, killed at its point (from inside, if that is a file operation)."""
    if entry["at"] == "file operation":
        die_at_file_operation(run_dir, entry["point"])
    fit(tiny_config(data, run_dir, **entry["settings"]))


def second_session(data: Path, run_dir: Path, entry: dict) -> None:
    """To the end; from the beginning, if the kill came before there was a run."""
    resume = (run_dir / "run.json").exists()
    fit(tiny_config(data, run_dir, run_resume=resume, **entry["settings"]))


def in_child(work, entry: dict | None) -> bool:
    """Do `work` in a forked process; True if it was killed or failed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if entry is not None and entry["at"] == "second":
        time.sleep(entry["point"])
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] != 0


def die_at_file_operation(run_dir: Path, point: int) -> None:
    """SIGKILL this process just before its `point`-th change in the run directory."""
    left = [point]

    def watch(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(str(run_dir)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    main()
