"""Hostile calls of the CUDA C++ rooms, below the doors: they raise or answer, and break no rule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast import backend
from tests.cuda_lanes import needs_emulator

pytestmark = needs_emulator
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("op", sorted(backend._cuda))
def test_hostile_calls_break_no_rule_of_memory(op: str) -> None:
    """What reaches a kernel is run on the emulator, where one bad access ends the script."""
    command = [sys.executable, "-m", "tests.hostile_calls", "--device", "emulator", op]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *_, last = done.stdout.rstrip().splitlines() or [""]
    assert done.returncode == 0, f"{last}\n{done.stderr[-2000:]}"
    raised, answered = map(int, re.findall(r"\d+", last))
    assert raised > 100 and answered > 20
