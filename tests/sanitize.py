"""Run the tests of the operations on an extension built with ASan and UBSan: `make asan`.

First it proves that the sanitizers bite in this very setting (preloaded runtime, torch's memory),
and that the sanitized extension is the one that gets loaded: a silent run could mean neither.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pyfast"))

import build  # noqa: E402  # by its path: importing pyfast would load the ordinary extension

CANARY = """
extern "C" int read_at(const int* p, long i) { return p[i]; }
extern "C" int add(int a, int b) { return a + b; }
"""
CALL = """
import ctypes, sys, torch
c, t = ctypes.CDLL(sys.argv[1]), torch.zeros(64, dtype=torch.int32)
"""
BITES = {  # a mistake, and what the sanitizer must say about it
    "c.read_at(ctypes.c_void_p(t.data_ptr()), ctypes.c_long(64))": "heap-buffer-overflow",
    "c.add(2**31 - 1, 1)": "signed integer overflow",
}
# What runs the kernels; a compiled graph would only wrap them, in minutes.
TESTS = ("test_ops.py", "test_fuzz.py", "test_errors.py", "test_vecmath.py")


def main() -> None:
    extension = build.build(*sanitized(), tuple(build.SANITIZE)).resolve()
    settings = environment(extension)
    prove_it_bites(extension.parent, settings)
    prove_it_loads(extension, settings)
    stems = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    tests = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if runs_kernels(p, stems)]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not compile", "-p", "no:cacheprovider"]
    print(shlex.join([*command, *(p.name for p in tests), *sys.argv[1:]]), flush=True)
    sys.exit(subprocess.run([*command, *tests, *sys.argv[1:]], cwd=ROOT, env=settings).returncode)


def sanitized() -> tuple[Path, Path]:
    """The extension and the folder of its objects."""
    folder = ROOT / "build" / "asan"
    return folder / build.library_name(), folder


def runs_kernels(test: Path, stems: set[str]) -> bool:
    return test.name in TESTS or test.stem.removeprefix("test_") in stems


def environment(extension: Path) -> dict[str, str]:
    """Runtimes that must be loaded before everything else, and no mercy for a finding."""
    runtimes = [runtime(name) for name in ("libasan.so", "libstdc++.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory until the end on purpose; torch refuses hostile sizes.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYFAST_EXTENSION": str(extension),
        "PYFAST_REQUIRE": "cpp",
    }


def runtime(name: str) -> str:
    """The compiler's own copy of a library."""
    done = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"asan: the compiler must bring {name}; got none")
    return str(path.resolve())


def prove_it_bites(folder: Path, settings: dict[str, str]) -> None:
    source, library = folder / "canary.cpp", folder / "canary.so"
    source.write_text(CANARY)
    flags = [*build.SANITIZE, "-shared", "-fPIC"]
    subprocess.run(["c++", *flags, source, "-o", library], check=True)
    for mistake, complaint in BITES.items():
        command = [sys.executable, "-c", CALL + mistake, library]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        if done.returncode == 0 or complaint not in done.stderr:
            sys.exit(f"asan: {mistake} must end in {complaint!r}; got {done.stderr[-2000:]!r}")
        print(f"asan: caught the planted {complaint}", flush=True)


def prove_it_loads(extension: Path, settings: dict[str, str]) -> None:
    code = "from pyfast import backend; print(backend.extension().__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    symbols = subprocess.run(["nm", "-D", extension], capture_output=True, text=True).stdout
    if done.stdout.strip() != str(extension) or "__asan_report_load" not in symbols:
        sys.exit(f"asan: {extension} must be what loads; got {done.stdout}{done.stderr[-2000:]}")
    print(f"asan: testing {extension.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
