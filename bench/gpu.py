"""Everything there is to learn from a CUDA machine, in one unattended command: `make gpu`.

    python -m bench.gpu [--only STEP ...] [--dry-run] [--out FOLDER]

The tests of every backend on the GPU; the same under compute-sanitizer, where it is found; Nsight
Compute's counters beside the emulator's, where ncu is found; `bench.ops` against all contestants.
A step that fails does not stop the others. Writes <gpu>-<date>.json and a page of that name into
bench/results/. A dry run walks through all of it on the CPU with the emulator, a few small calls
each. Exit status: 0 if no step failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import counters, devices, gpu_page, machine

ROOT = Path(__file__).resolve().parents[1]
OUT, DRY_OUT = ROOT / "bench" / "results", ROOT / "build" / "gpu-dry-run"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_device.py", "--device")
MINUTE = 60  # seconds
TAIL = 4000  # characters of a step's output that are kept


@dataclass
class Step:
    """One command, and why it is left out where it is."""

    name: str
    command: list[str]
    minutes: int
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None  # the JSON it writes


def steps(dry: bool, folder: Path) -> Iterator[Step]:
    """All steps in order; files they write go to `folder`."""
    lane = "emulator" if dry else "cuda"
    python = sys.executable
    yield Step("doctor", [python, "-m", "pyfast", "doctor", "--json"], 5)
    yield Step("tests", [python, *PYTEST, lane], 60)
    for tool in SANITIZERS:
        wrapper = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        missing = "" if shutil.which(wrapper[0]) or dry else "compute-sanitizer is not found"
        # in a dry run the emulator is the sanitizer, and one call is enough
        words = "accurate and rope" if dry else "accurate and not sizes and bfloat16 and not torch"
        command = [*([] if dry else wrapper), python, *PYTEST, lane, "-k", words]
        # a cached allocation hides what lies beyond a tensor
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step(f"sanitizer {tool}", command, 60, missing, alone)
    missing = "" if shutil.which("ncu") or dry else "ncu is not found"
    file = folder / "counters.json"
    command = [python, "-m", "bench.counters", "--json", str(file), *["--dry-run"] * dry]
    yield Step("counters", command, 60, missing, result=file)
    file = folder / "ops.json"
    command = [python, "-m", "bench.ops", "--device", lane, "--json", str(file)]
    command += ["--quick", "--dtypes", "bfloat16"] if dry else ["--dtypes", "bfloat16", "float32"]
    yield Step("ops", command, 180, result=file)


def run(step: Step, environment: dict[str, str]) -> dict[str, Any]:
    """What became of a step; its output is shown as it comes."""
    if step.missing:
        print(f"== {step.name}: left out: {step.missing}", flush=True)
        return {"left_out": step.missing}
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    start, tail = time.perf_counter(), ""
    child = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | environment | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = threading.Timer(MINUTE * step.minutes, child.kill)
    watch.start()
    try:
        for line in child.stdout or ():
            print(line[:400], end="" if len(line) <= 400 else "...\n", flush=True)
            tail = (tail + line)[-TAIL:]
        status = child.wait()
    finally:
        watch.cancel()
    seconds = round(time.perf_counter() - start, 1)
    return {"command": step.command, "status": status, "seconds": seconds, "tail": tail}


def read(path: Path | None) -> Any:
    """What a step has written, if it came so far."""
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def revision() -> str:
    """Of the sources, with a plus if they were changed since."""
    command = ["git", "describe", "--always", "--dirty=+"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def dry_environment() -> dict[str, str]:
    """Steps of a dry run take the CUDA kernels where PYFAST_CUDA=1 asks for them."""
    asked = os.environ.get("PYFAST_CUDA") == "1" and "PYFAST_EXTENSION" not in os.environ
    return {"PYFAST_EXTENSION": counters.stand_in()} if asked else {}


def file_stem(gpu: str, moment: datetime) -> str:
    """nvidia-h100-80gb-hbm3-2026-01-31."""
    return f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{moment:%Y-%m-%d}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, by the emulator")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="the steps with these words")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    environment = dry_environment() if dry else {}
    os.environ |= environment
    try:
        facts = devices.DEVICES["emulator" if dry else "cuda"]().facts()
    except RuntimeError as error:
        parser.error(f"{error}; --dry-run needs none")
    out = (options.out or (DRY_OUT if dry else OUT)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    moment = datetime.now(timezone.utc)
    found: dict[str, Any] = {"bench": "gpu", "dry_run": dry, "gpu": facts, "revision": revision()}
    found |= {"date": f"{moment:%Y-%m-%d %H:%M UTC}", "steps": {}, "results": {}}
    target = out / f"{file_stem(facts['name'], moment)}.json"
    for step in steps(dry, out):
        if options.only and not any(word in step.name for word in options.only):
            continue
        if step.result is not None:
            step.result.unlink(missing_ok=True)
        found["steps"][step.name] = run(step, environment)
        found["results"][step.name] = read(step.result)
        machine.write_whole(target, json.dumps(found) + "\n")  # what is known so far
        machine.write_whole(target.with_suffix(".md"), gpu_page.page(found))
    for step in steps(dry, out):
        if step.result is not None:
            step.result.unlink(missing_ok=True)
    failed = [name for name, told in found["steps"].items() if told.get("status")]
    words = f"failed: {', '.join(failed)}" if failed else "all well"
    print(f"{target.with_suffix('.md')}: {words}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
