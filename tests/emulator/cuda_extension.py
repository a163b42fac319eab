"""The extension with a stand-in for the CUDA runtime: the objects of a CUDA build, linked to it.

Where PYFAST_CUDA=1 asks for CUDA and there is no GPU, tests/conftest.py has it loaded as pyfast._C,
whose CUDA kernels tests/emulator/cuda.py then runs. Imports nothing from pyfast, which would load
the extension on its way.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .library import _digest, cache_dir, compiler, locked

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
]


@functools.cache
def builder() -> ModuleType:
    """pyfast/build.py by its path."""
    spec = importlib.util.spec_from_file_location("pyfast_build", ROOT / "pyfast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Have pyfast load the extension with the stand-in, where PYFAST_CUDA=1 and no GPU is here."""
    asked = os.environ.get("PYFAST_CUDA") == "1" and "PYFAST_EXTENSION" not in os.environ
    if asked and "pyfast" not in sys.modules and not builder().cuda.gpus():
        os.environ["PYFAST_EXTENSION"] = str(build())


def build() -> Path:
    """The extension, compiled where it is not up to date; its kernels share the objects of `make`.

    Raises:
        RuntimeError: there is no nvcc or no C++ compiler, or the sources do not compile.
    """
    part = builder().cuda.part()
    library = stand_in(part.includes)
    runtime = (str(library), f"-Wl,-rpath,{library.parent}")
    linked = dataclasses.replace(part, runtime=runtime)
    folder = ROOT / "build"
    target = folder / "emulated_cuda" / builder().library_name()
    return builder().build(target, folder / "objects", cuda_part=linked)


def stand_in(cuda_headers: Path) -> Path:
    """The stand-in as a shared library, compiled if its sources are new."""
    command = compiler()
    if command is None:
        raise RuntimeError("emulator: a C++ compiler must be there; got none (set CXX)")
    torch_headers = Path(importlib.util.find_spec("torch").origin).parent / "include"
    sources = sorted(RUNTIME.glob("*.cpp"))
    contents = [path.read_bytes() for path in sorted(RUNTIME.iterdir())]
    command = [*command, *FLAGS, f"-isystem{cuda_headers}", f"-isystem{torch_headers}"]
    target = cache_dir() / f"libstand_in-{_digest(repr(command).encode(), *contents)}.so"
    with locked(cache_dir() / "lock"):
        if not target.exists():
            own = target.with_suffix(".tmp")
            done = subprocess.run(
                [*command, *sources, "-ldl", "-o", own], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"emulator: the stand-in must compile; got: {done.stderr[:500]}")
            os.replace(own, target)
    return target


if __name__ == "__main__":
    print(build())
