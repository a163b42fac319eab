"""Facts of the machine for the JSON, and the settings of a run that need a new process."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

from pyfast import backend, doctor

# torch reads these once, when it starts.
ISA_SETTINGS = {
    "avx2": {
        "PYFAST_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
# What `taskset` does for a process, OpenMP does for each of its threads: a core of its own.
PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
THP_SETTING = "THP_MEM_ALLOC_ENABLE"  # torch then asks for huge pages in large allocations
_TOLD = ("PYFAST_", "OMP_", "MKL_", "ONEDNN_", "ATEN_", "KMP_", "THP_", "MALLOC_", "LD_PRELOAD")


def wanted_environment(isa: str | None, thp: str | None, pinned: bool = False) -> dict[str, str]:
    """The environment variables that the options --isa, --thp and --pinned stand for."""
    wanted = dict(ISA_SETTINGS[isa]) if isa else {}
    wanted |= PINNED if pinned else {}
    return wanted | ({THP_SETTING: "1" if thp == "on" else "0"} if thp else {})


def restart_with(wanted: Mapping[str, str]) -> None:
    """Begin again with these variables set, unless they are: libraries read them at the start."""
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def facts(isa: str | None = None, gpu: dict[str, object] | None = None) -> dict[str, object]:
    """Processor, GPU, software, settings, date and load, as JSON values."""
    found = doctor.examine()
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = re.search(r"\[(\w+)\]", enabled.read_text()) if enabled.exists() else None
    return {
        "cpu": found["cpu"]["name"],
        "gpu": gpu,
        "features": found["cpu"]["features"],
        "logical_cpus": found["cpu"]["logical_cpus"],
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "pyfast": backend.choose("linear_act", "cpu").why,
        "isa": isa or "best",
        "thp": "on" if os.environ.get(THP_SETTING) == "1" else "off",
        "huge_pages": pages[1] if pages else "unknown",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_TOLD)},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def headline(told: dict) -> list[str]:
    """Two lines about the machine for people."""
    load = " ".join(f"{value:.1f}" for value in told["load"])
    gpu = [", ".join(f"{name} {value}" for name, value in (told["gpu"] or {}).items())]
    return [
        *(gpu if told["gpu"] else []),
        f"{told['cpu']}, {told['logical_cpus']} CPUs, torch {told['torch']} "
        f"({told['torch_capability']}), load {load}",
        f"pyfast: {told['pyfast']}; huge pages asked for by torch's allocator: {told['thp']} "
        f"({THP_SETTING}; --thp on|off); system: {told['huge_pages']}",
    ]


def expect_folder(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """Refuse a file in a folder that is not there before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        parser.error(f"{flag} must be in a folder that exists; got {path}")


def finish(document: dict[str, object], path: Path | None) -> None:
    """Write the JSON object to `path`, if any, and print it as the last line."""
    if path is not None:
        write_whole(path, json.dumps(document) + "\n")
    print(json.dumps(document), flush=True)


def write_whole(path: Path, text: str) -> None:
    """Write all of the text or nothing."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
