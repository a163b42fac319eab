"""CUDA C++ to PTX, kept by content: the second time costs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .library import _digest, cache_dir


def available() -> bool:
    """Whether there is an nvcc."""
    return shutil.which("nvcc") is not None


def _with_headers(source: Path) -> list[Path]:
    """A file and all it includes in quotes, each once."""
    found = [source.resolve()]
    for path in found:  # grows on the way
        names = re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)
        found += [p for p in ((path.parent / n).resolve() for n in names) if p not in found]
    return found


def compile_ptx(source: Path, arch: str = "sm_90a", flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file, with line numbers.

    What it includes in quotes, and they in turn, counts as its content.

    Raises:
        RuntimeError: it does not compile.
    """
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-lineinfo", "-ptx", *flags]
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    parts = [p.name.encode() + p.read_bytes() for p in _with_headers(source)]
    key = _digest(nvcc, repr(command).encode(), *parts)
    target = cache_dir() / "ptx" / f"{source.stem}-{key}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        own = target.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([*command, source, "-o", own], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {source} must compile; got: {done.stderr.strip()[:500]}")
        os.replace(own, target)
    return target.read_text()
