"""The CUDA part of the extension: whether it is wanted, for which GPUs, and what nvcc is told.

torch's CUDAExtension refuses a CPU-only torch, but nvcc needs neither torch's CUDA build nor a GPU.
The rooms (csrc/cuda/*.cpp) are plain C++ and include torch; what nvcc compiles (csrc/cuda/*.cu with
kernels/cuda/) does not: with torch's headers a file would take it 13 s instead of 3. Imports
nothing from pyfast, like build.py, which loads it.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WITHOUT_GPU = ("80", "90a")  # the architectures where PYFAST_CUDA=1 and no GPU says which
OLDEST = 80  # has bf16 and cp.async
SPECIFIC = {90, 100, 103}  # GPUs whose own instructions (wgmma, tcgen05) need the suffix "a"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# A build that stays on the machine: line numbers, and PTX as text, which the emulator reads.
HERE = ["-lineinfo", "--no-compress"]
SHIPPED = ["--compress-mode=size"]
PTX = "+PTX"  # after an architecture: its PTX too, which the driver compiles for newer GPUs


@dataclass(frozen=True)
class CudaPart:
    """A build with CUDA: nvcc, the folder of the toolkit, the architectures ("80", "90a"), and what
    to link as the CUDA runtime.

    Where an architecture is "80+PTX", the build is to be shipped: only such ones have PTX, and all
    is compressed. Else each has its PTX.
    """

    nvcc: Path
    home: Path
    archs: tuple[str, ...]
    runtime: tuple[str, ...]

    @property
    def includes(self) -> Path:
        """Where cuda_runtime_api.h is."""
        return self.home / "include"

    @property
    def ships(self) -> bool:
        """Whether the build is for other machines, too."""
        return any(arch.endswith(PTX) for arch in self.archs)

    def flags(self) -> list[str]:
        """What nvcc is told, for all architectures."""
        found = [*FLAGS, *(SHIPPED if self.ships else HERE)]
        for arch in self.archs:
            number = arch.removesuffix(PTX)
            codes = [f"sm_{number}"]
            if arch != number or not self.ships:
                codes.append(f"compute_{number}")
            found.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
        return found

    def version(self) -> str:
        """Of nvcc, as 13.0.88."""
        told = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"V([\d.]+)", told.stdout)
        return found[1] if found else "unknown"


def part() -> CudaPart | None:
    """What PYFAST_CUDA and PYFAST_CUDA_ARCH ask for here; None: a build for the CPU only.

    Raises:
        RuntimeError: they ask for what is not there, or for nothing that exists.
    """
    wish = os.environ.get("PYFAST_CUDA", "auto")
    if wish not in {"auto", "0", "1"}:
        raise RuntimeError(f"build: PYFAST_CUDA must be auto, 0 or 1; got {wish!r}")
    nvcc, present = find_nvcc(), gpus()
    if wish == "0" or (wish == "auto" and not (nvcc and present)):
        return None
    if nvcc is None:
        hint = "put it on the PATH, or set CUDA_HOME"
        raise RuntimeError(f"build: PYFAST_CUDA=1 must find nvcc; got none; {hint}")
    asked = tuple(a for a in os.environ.get("PYFAST_CUDA_ARCH", "").split(";") if a)
    if wrong := [a for a in asked if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", a)]:
        rule = 'be numbers like "80;90a"'
        raise RuntimeError(f"build: PYFAST_CUDA_ARCH must {rule}; got {wrong[0]!r}")
    found = [next(home.glob("lib*/libcudart_static.a"), None) for home in _homes(nvcc)]
    static = next(filter(None, found), None)
    if static is None:
        raise RuntimeError(f"build: libcudart_static.a must be in CUDA_HOME; got only {nvcc}")
    runtime = (str(static), "-lrt", "-lpthread", "-ldl")
    return CudaPart(nvcc, static.parent.parent, asked or present or WITHOUT_GPU, runtime)


def _homes(nvcc: Path | None = None) -> list[Path]:
    """Where the toolkit may be; a distribution's nvcc on the PATH may only call the real one."""
    asked = os.environ.get("CUDA_HOME")
    own = [nvcc.parent.parent] if nvcc else []
    return [*([Path(asked)] if asked else []), *own, Path("/usr/local/cuda")]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, or where CUDA installs itself."""
    on_path = shutil.which("nvcc")
    places = [home / "bin" / "nvcc" for home in _homes()]
    places.insert(len(places) - 1, Path(on_path) if on_path else places[-1])
    return next((place.resolve() for place in places if place.exists()), None)


@functools.cache
def gpus() -> tuple[str, ...]:
    """The architectures of the GPUs of this machine that the kernels can run on."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        return ()
    numbers = {int(word.replace(".", "")) for word in re.findall(r"^\d+\.\d$", told.stdout, re.M)}
    return tuple(f"{n}{'a' * (n in SPECIFIC)}" for n in sorted(numbers) if n >= OLDEST)


def kernels_dir(source_dir: Path) -> Path:
    """kernels/cuda/, which lies beside csrc/ in a checkout and in the installed package alike."""
    return source_dir.parent / "kernels" / "cuda"


def digest(source_dir: Path, archs: tuple[str, ...]) -> bytes:
    """Identifies the CUDA sources and how they are compiled."""
    found = hashlib.sha256(repr((FLAGS, HERE, SHIPPED, archs)).encode())
    for folder in (source_dir / "cuda", kernels_dir(source_dir)):
        for path in sorted(folder.glob("*.*")):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.digest()


def facts(source_hash: str, part: CudaPart | None) -> str:
    """C++ that tells csrc/bindings.cpp what is being built."""
    told = {
        "source_hash": source_hash,
        "cuda_archs": ";".join(part.archs) if part else "",
        "nvcc": part.version() if part else "",
    }
    line = 'extern "C" const char* pyfast_{}() {{ return "{}"; }}\n'
    return "".join(line.format(name, fact) for name, fact in told.items())


def rule(part: CudaPart, compiler: str) -> list[str]:
    """The rule of build.ninja by which nvcc compiles a file."""
    flags = " ".join(part.flags())
    return [
        "rule nvcc",
        f"  command = '{part.nvcc}' -ccbin {compiler} {flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def objects(part: CudaPart, source_dir: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """(rule, source, object name, extra flags) of every object file of the CUDA part."""
    for source in sorted((source_dir / "cuda").glob("*.cpp")):
        yield "compile", source, f"{source.stem}.room.o", [f"-isystem{part.includes}"]
    for source in sorted((source_dir / "cuda").glob("*.cu")):
        yield "nvcc", source, f"{source.stem}.cuda.o", []
