"""Kills tiny runs with SIGKILL and resumes them: python killed_run.py DATA FOLDER < JSON list.

Each entry is {"at": "file operation" or "second", "point": number, "settings": {...}}; run number i
lives in FOLDER/i. Every run is killed at its point, then resumed to its end. One process imports
everything and forks for each session, which then costs tenths of a second; it computes on one
thread, because others would not survive the fork.
"""

import json
import os
import signal
import sys
import time
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
        killed += in_child(lambda e=entry, d=run_dir: run(data, d, e, resume=False), entry)
        resume = (run_dir / "run.json").exists()  # else killed before there was a run
        if in_child(lambda e=entry, d=run_dir, r=resume: run(data, d, e, resume=r), None):
            sys.exit(f"run {number} failed when resumed")
    print(killed)


def run(data: Path, run_dir: Path, entry: dict, resume: bool) -> None:
    """One session; the first one dies at the entry's file operation."""
    if entry["at"] == "file operation" and not resume:
        die_at_file_operation(run_dir, entry["point"])
    fit(tiny_config(data, run_dir, run_resume=resume, **entry["settings"]))


def in_child(work, entry: dict | None) -> bool:
    """Do `work` in a forked process; True if it was killed or failed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
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
