"""Compile the C++ extension: ninja, one object per file, metal once per instruction set.

Used by setup.py, by `python -m pyfast.build` (in place, for development) and by the compile on first use.
Imports nothing from pyfast, and torch only to find its headers.
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TORCH_TARGET = "0x020d000000000000"  # the stable ABI of torch 2.13
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused-function", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {  # never -march=native: what is built here must run elsewhere
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512.split(),
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16".split(),
}
MATMUL_METAL = {"linear_act", "linear_glu", "linear_cross_entropy", "attention"}  # have an AMX form


def source_dir() -> Path:
    """csrc/ inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


def source_hash() -> str:
    """Identifies the C++ sources and flags; a built extension carries the hash it was built from."""
    digest = hashlib.sha256(repr((CXX_FLAGS, ISA_FLAGS, TORCH_TARGET)).encode())
    root = source_dir()
    for path in sorted(p for p in root.rglob("*") if p.suffix in {".cpp", ".h"}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def isas() -> list[str]:
    """The instruction sets to compile for on this machine's architecture."""
    return list(ISA_FLAGS) if platform.machine() in {"x86_64", "AMD64"} else ["generic"]


def objects() -> Iterator[tuple[Path, str, list[str]]]:
    """(source, object name, extra flags) of every object file."""
    root = source_dir()
    for source in [root / "bindings.cpp", *sorted((root / "cpu").glob("*.cpp"))]:
        flags = [f'-DPYFAST_SOURCE_HASH=\\"{source_hash()}\\"'] if source.stem == "bindings" else []
        yield source, f"{source.stem}.o", flags
    for source in sorted((root / "cpu" / "metal").glob("*.cpp")):
        for isa in isas():
            if isa != "amx" or source.stem in MATMUL_METAL:
                yield source, f"{source.stem}.{isa}.o", [f"-DPYFAST_ISA={isa}", *ISA_FLAGS[isa]]


def build(library: Path, build_dir: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile what changed and link `library`; objects and the ninja log stay in `build_dir`."""
    import ninja
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    includes = [source_dir(), source_dir() / "cpu", torch_dir / "include", pybind11.get_include()]
    includes.append(__import__("sysconfig").get_paths()["include"])
    flags = [*CXX_FLAGS, *extra_flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-isystem{path}" if "torch" in str(path) else f"-I{path}" for path in includes]
    libs = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10"
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out.tmp {libs} {' '.join(extra_flags)} && mv $out.tmp $out",
    ]
    names = []
    for source, name, own in objects():
        names.append(name)
        lines += [f"build {name}: compile {_escape(source)}"]
        lines += [f"  flags = {' '.join([*map(str, flags), *own])}"]
    lines += [f"build {_escape(library.resolve())}: link {' '.join(names)}", ""]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines))
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build_dir)]
    if "MAX_JOBS" in os.environ:
        command += ["-j", os.environ["MAX_JOBS"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"build: the C++ extension must compile; got\n{done.stdout[-4000:]}")
    return library


def library_name() -> str:
    """The file name CPython imports the extension from."""
    return "_C" + __import__("sysconfig").get_config_var("EXT_SUFFIX")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    print(build(here / library_name(), here.parent / "build" / "objects"), file=sys.stderr)
