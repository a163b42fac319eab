"""Compiles the engine on demand and calls it through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ENGINE = Path(__file__).resolve().parent / "engine"
# No contraction: a * b + c is two roundings unless the kernel says fma. Rounding modes are
# switched at run time. The library stays on the machine that built it and may use all it has.
FLAGS = "-std=c++20 -O2 -march=native -ftree-vectorize -fvect-cost-model=dynamic -fPIC"
FLAGS += " -ffp-contract=off -frounding-math -fno-trapping-math -fno-math-errno"
FLAGS += " -fno-strict-aliasing -Wall -Wextra"
COLD = ("api", "decoder", "inline", "operands", "parser", "report", "setup")  # not worth -O2


class Tensor(ctypes.Structure):
    """One tensor the kernel may touch; see EmulatorTensor in engine/api.cpp."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("element", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("initialised", ctypes.c_void_p),
    ]


class Launch(ctypes.Structure):
    """What a launch needs; see EmulatorLaunch in engine/api.cpp."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("perturb", ctypes.c_uint32),
        ("check", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint64),
        ("budget", ctypes.c_uint64),
        ("l2_bytes", ctypes.c_uint64),
        ("params", ctypes.c_char_p),
        ("param_bytes", ctypes.c_uint64),
        ("tensors", ctypes.POINTER(Tensor)),
        ("tensor_count", ctypes.c_uint64),
    ]


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None if there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def cache_dir() -> Path:
    """Where compiled engines and PTX are kept: beside the compiled kernels of pyfast."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PYFAST_CACHE") or Path(home, "pyfast")) / "emulator"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return platform.processor().encode()


def build() -> Path:
    """The engine as a shared library, compiled if the sources, flags or processor are new.

    Objects are cached one by one, so that a changed file costs its own compilation.

    Raises:
        RuntimeError: there is no compiler, or the sources do not compile.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("emulator: a C++ compiler must be there; got none (set CXX)")
    flags = shlex.split(FLAGS)
    sources = sorted(ENGINE.glob("*.cpp"))
    machine = repr((command, flags, COLD)).encode() + _processor()
    keys = [_digest(machine, *(p.read_bytes() for p in _included(source))) for source in sources]
    library = cache_dir() / f"engine-{_digest(*(key.encode() for key in keys))}.so"
    if library.exists():
        return library
    with locked(cache_dir() / "lock"), tempfile.TemporaryDirectory() as staging:
        objects = cache_dir() / "objects"
        objects.mkdir(exist_ok=True)
        targets = [objects / f"{s.stem}-{key}.o" for s, key in zip(sources, keys, strict=True)]
        missing = [pair for pair in zip(sources, targets, strict=True) if not pair[1].exists()]
        _compile([*command, *flags], missing, Path(staging))
        _run([*command, "-shared", *map(str, targets), "-o", f"{library}.tmp"])
        os.replace(f"{library}.tmp", library)
    return library


def _compile(command: list[str], pairs: list[tuple[Path, Path]], staging: Path) -> None:
    """Objects of sources, by way of a precompiled header when there are many."""
    shutil.copytree(ENGINE, staging, dirs_exist_ok=True)
    if len(pairs) > 4:
        header = staging / "machine.h"
        _run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])

    def one(pair: tuple[Path, Path]) -> None:
        source, target = pair
        level = ["-O1"] if source.stem in COLD else []
        own = ["-include", "machine.h", "-c", str(staging / source.name), "-o", f"{target}.tmp"]
        _run([*command, *level, f"-I{staging}", *own])
        os.replace(f"{target}.tmp", target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, pairs))


def _included(source: Path) -> list[Path]:
    """The file and all headers of the engine it includes, directly or not."""
    found, queue = {source}, [source]
    while queue:
        for name in re.findall(r'#include "(.+)"', queue.pop().read_text()):
            if (header := ENGINE / name) not in found:
                found.add(header)
                queue.append(header)
    return sorted(found)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "error" in line]
        first = told[0] if told else f"exit status {done.returncode}"
        raise RuntimeError(f"emulator: the engine must compile; got: {first}")


@functools.cache
def load() -> ctypes.CDLL:
    """The engine, compiled and loaded once."""
    engine = ctypes.CDLL(str(build()))
    text = ctypes.c_char_p
    message = ctypes.POINTER(text)
    engine.emulator_load.restype = ctypes.c_void_p
    engine.emulator_load.argtypes = [text, message]
    engine.emulator_free.argtypes = [ctypes.c_void_p]
    engine.emulator_free.restype = None
    engine.emulator_describe.restype = text
    engine.emulator_describe.argtypes = [ctypes.c_void_p]
    engine.emulator_launch.argtypes = [
        ctypes.c_void_p,
        text,
        ctypes.POINTER(Launch),
        ctypes.POINTER(ctypes.c_uint64),
        message,
    ]
    engine.emulator_profile.restype = text
    engine.emulator_profile.argtypes = [ctypes.c_void_p, text]
    return engine
