"""Compile the C++ extension: ninja, one object per file, metal once per instruction set.

Used by setup.py, by `python -m pyfast.build` (in place, for development) and by the compile on
first use. Imports nothing from pyfast, and no torch: it only looks up where torch is. Its CUDA part
is in build_cuda.py.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TORCH_TARGET = "0x020d000000000000"  # the stable ABI of torch 2.13
TORCH_MINIMUM = (2, 13)
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused-function"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
X86 = {"x86_64", "AMD64"}
ISA_FLAGS = {  # never -march=native: what is built here must run elsewhere
    "generic": ["-O2"] if platform.machine() in X86 else [],  # there for processors of before 2013
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512.split(),
    "avx512_bf16": f"{AVX512} -mavx512bf16".split(),
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16".split(),
}
MATMUL_METAL = {"linear_act", "linear_glu", "linear_cross_entropy"}
MATMUL_METAL |= {"attention", "attention_backward", "attention_grad_mask"}
ROUNDING_METAL = {"adamw", "cross_entropy", "layer_norm", "rms_norm", "rope"}
# What multiplies or rounds bfloat16: levels of these files alone.
BF16_LEVELS = {"avx512_bf16": MATMUL_METAL | ROUNDING_METAL, "amx": MATMUL_METAL}
# Memory errors and undefined behaviour end the process; -O1 keeps the stack traces readable.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-omit-frame-pointer", "-g1", "-O1"]


def _beside(name: str) -> ModuleType:
    """Another file of this folder, by its path: importing the package would need torch."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"pyfast_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda = _beside("build_cuda")


def source_dir() -> Path:
    """csrc/ inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


def source_hash(cuda_archs: tuple[str, ...] = ()) -> str:
    """Identifies the sources and flags, those of CUDA too where they were built for `cuda_archs`;
    an extension carries the hash it was built from.
    """
    digest = hashlib.sha256(repr((CXX_FLAGS, ISA_FLAGS, TORCH_TARGET)).encode())
    root = source_dir()
    for path in sorted(p for p in root.rglob("*") if p.suffix in {".cpp", ".h"}):
        if path.parent != root / "cuda":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    if cuda_archs:
        digest.update(cuda.digest(root, cuda_archs))
    return digest.hexdigest()[:16]


def isas() -> list[str]:
    """The instruction sets to compile for on this machine's architecture."""
    return list(ISA_FLAGS) if platform.machine() in X86 else ["generic"]


def objects(emulate_tiles: bool = False) -> Iterator[tuple[Path, str, list[str]]]:
    """(source, object name, extra flags) of every object file of the CPU part."""
    root = source_dir()
    emulation = ["-DPYFAST_EMULATE_TILES"] if emulate_tiles else []
    for source in [root / "bindings.cpp", *sorted((root / "cpu").glob("*.cpp"))]:
        own = emulation if source.stem == "isa" else []
        yield source, f"{source.stem}{'.emulated' if own else ''}.o", own
    for source in sorted((root / "cpu" / "metal").glob("*.cpp")):
        for isa in isas():
            own, name = ISA_FLAGS[isa], f"{source.stem}.{isa}.o"
            if isa == "amx" and emulate_tiles:
                own, name = [*AVX512.split(), *emulation], f"{source.stem}.{isa}.emulated.o"
            if source.stem in BF16_LEVELS.get(isa, {source.stem}):
                yield source, name, [f"-DPYFAST_ISA={isa}", *own]


def blocker() -> str | None:
    """Why the extension cannot be compiled here, for people; None where it can."""
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only so far, not on {sys.platform}"
    for package in ("torch", "pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_MINIMUM:
        return f"torch is {version}, older than {'.'.join(map(str, TORCH_MINIMUM))}"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler ({_compiler()[0]})"
    if not _python_includes():
        return "Python.h is missing (on Debian it is in python3-dev)"
    return None


def build(
    library: Path,
    build_dir: Path,
    extra_flags: tuple[str, ...] = (),
    emulate_tiles: bool = False,
    cuda_part: "cuda.CudaPart | None" = None,
) -> Path:
    """Compile what changed and link `library`; objects and log.txt stay in `build_dir`.

    `emulate_tiles` puts plain C++ in the place of the AMX instructions: for tests elsewhere.
    Without `cuda_part` there are kernels for the CPU only.

    Raises:
        RuntimeError: what is needed is missing, or the sources do not compile.
    """
    if reason := blocker():
        raise RuntimeError(f"build: a C++ extension must be possible here; got: {reason}")
    import ninja

    build_dir = build_dir.resolve()  # ninja runs inside it
    build_dir.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    with locked(build_dir / "lock"):
        facts = build_dir / "facts.cpp"  # alone in its file: new facts cost a small compilation
        text = cuda.facts(source_hash(cuda_part.archs if cuda_part else ()), cuda_part)
        if not facts.exists() or facts.read_text() != text:
            facts.write_text(text)
        plan = _plan(library, facts, extra_flags, emulate_tiles, cuda_part)
        (build_dir / "build.ninja").write_text(plan)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build_dir)]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        log = build_dir / "log.txt"
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        told = [line for line in log.read_text().splitlines() if "error" in line.lower()]
        first = told[0] if told else f"exit status {done.returncode}"
        raise RuntimeError(f"build: the C++ sources must compile; got: {first}; see {log}")
    return library


def _plan(
    library: Path,
    facts: Path,
    extra_flags: tuple[str, ...],
    emulate_tiles: bool,
    cuda_part: "cuda.CudaPart | None",
) -> str:
    """The text of build.ninja."""
    import pybind11

    spec = importlib.util.find_spec("torch")
    torch_dir = Path(next(iter(spec.submodule_search_locations)))
    flags = [*CXX_FLAGS, *extra_flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-I{source_dir()}", f"-I{source_dir() / 'cpu'}", f"-isystem{torch_dir / 'include'}"]
    flags += [f"-I{path}" for path in [pybind11.get_include(), *_python_includes()]]
    runtime = cuda_part.runtime if cuda_part else ()
    link = [*extra_flags, *runtime, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {_shell(_compiler())}",
        f"flags = {_shell(flags)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out.tmp {_shell(link)} && mv $out.tmp $out",
    ]
    steps = [("compile", *step) for step in [*objects(emulate_tiles), (facts, "facts.o", [])]]
    if cuda_part:
        lines += cuda.rule(cuda_part, _compiler()[0])
        steps += cuda.objects(cuda_part, source_dir())
    names = []
    for rule, source, name, own in steps:
        names.append(name)
        lines += [f"build {name}: {rule} {_escape(source)}", f"  own = {_shell(own)}"]
    lines += [f"build {_escape(library.resolve())}: link {' '.join(names)}", ""]
    return "\n".join(lines)


def _python_includes() -> list[Path]:
    """Where Python.h is: beside Python, or unpacked into the virtual environment, or nowhere."""
    beside = Path(sysconfig.get_paths()["include"])
    if (beside / "Python.h").exists():
        return [beside]
    unpacked = Path(sys.prefix, "include", f"python{sysconfig.get_python_version()}")
    return [unpacked, unpacked.parent] if (unpacked / "Python.h").exists() else []


def compile_on_first_use() -> Path:
    """The extension in the user's cache, compiled now if it is not there, by one process at a time.

    Raises:
        RuntimeError: it does not compile here.
        OSError: the cache cannot be written.
    """
    part = cuda.part()
    folder = cache_dir() / _cache_key(part.archs if part else ())
    library = folder / library_name()
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", "pyfast: waiting for another process that compiles the kernels"):
        if not library.exists():
            notice = f"pyfast: compiling the C++ kernels into {folder} (minutes, once)"
            print(f"{notice}; PYFAST_JIT=0 declines", file=sys.stderr, flush=True)
            build(library, folder / "objects", cuda_part=part)
            shutil.rmtree(folder / "objects", ignore_errors=True)
    return library


def cache_dir() -> Path:
    """Where compiled kernels and tokens are kept: PYFAST_CACHE, else `pyfast` in XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PYFAST_CACHE") or Path(home, "pyfast"))


def _cache_key(cuda_archs: tuple[str, ...] = ()) -> str:
    """One build for each torch minor, Python, set of instruction sets, and text of the sources."""
    torch_minor = ".".join(importlib.metadata.version("torch").split(".")[:2])
    python = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    return f"torch{torch_minor}-{python}-{'+'.join(isas())}-{source_hash(cuda_archs)}"


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path`; print `waiting` if another process has it."""
    import fcntl  # not everywhere; blocker() stops earlier there

    with path.open("w") as file:  # closing it releases the lock, also when the process is killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def library_name() -> str:
    """The file name CPython imports the extension from."""
    return "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _shell(words: list[str]) -> str:
    """Words as ninja and then the shell must see them."""
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def main() -> None:
    """Build in place; print the path of the extension."""
    parser = argparse.ArgumentParser(prog="python -m pyfast.build", description=main.__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--sanitize", action="store_true", help="ASan and UBSan, into build/asan/")
    where.add_argument("--first-use", action="store_true", help="into the cache, as first use does")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    folder = here.parent / "build"
    try:
        if options.sanitize:
            print(build(folder / "asan" / library_name(), folder / "asan", tuple(SANITIZE)))
        elif options.first_use:
            print(compile_on_first_use())
        else:
            print(build(here / library_name(), folder / "objects", cuda_part=cuda.part()))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
