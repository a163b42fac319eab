"""The ladder at import: built, else compiled on first use, else the reference, and always why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast import build

ROOT = Path(__file__).resolve().parent.parent
SHOW = """
import torch, pyfast
from pyfast import backend
pyfast.layer_norm(torch.ones(2, 4), (4,))
pyfast.rms_norm(torch.ones(2, 4), (4,))
print(backend.choose("layer_norm", "cpu").backend)
"""
# A module that compiles in a moment and stands for the extension.
TINY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
# An editable install of this checkout would offer its own extension to any package called pyfast.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder that holds the package as a pure wheel leaves it: sources, no extension."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pyfast", tmp_path / "pyfast", ignore=ignore)
    shutil.copytree(ROOT / "csrc", tmp_path / "pyfast" / "csrc", ignore=ignore)
    (tmp_path / "sitecustomize.py").write_text(NO_EDITABLE)
    return tmp_path


def start(folder: Path, *command: str, **settings: str) -> subprocess.Popen[str]:
    """python `command` in `folder`, with a cache of its own and `settings` in the environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYFAST_")}
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(folder), **settings}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**clean, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *command: str, **settings: str) -> tuple[int, str, str]:
    process = start(folder, *command, **settings)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_declined_compilation_takes_the_reference_with_one_warning(unbuilt: Path) -> None:
    status, out, err = run(unbuilt, "-c", SHOW, PYFAST_JIT="0")
    assert (status, out.split()) == (0, ["torch"]), err
    assert err.count("Warning") == 1 and "reference: pyfast._C is not built (PYFAST_JIT=0)" in err


def test_missing_compiler_takes_the_reference_with_one_warning(unbuilt: Path) -> None:
    status, out, err = run(unbuilt, "-c", SHOW, CXX="/nowhere/c++")
    assert (status, out.split()) == (0, ["torch"]), err
    assert err.count("Warning") == 1 and "there is no C++ compiler (/nowhere/c++)" in err


def test_failing_compiler_takes_the_reference_and_names_the_log(unbuilt: Path) -> None:
    compiler = unbuilt / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: the disk is full'; exit 1\n")
    compiler.chmod(0o755)
    status, out, err = run(unbuilt, "-c", SHOW, CXX=str(compiler))
    assert (status, out.split()) == (0, ["torch"]), err
    assert "fatal error: the disk is full" in err and "log.txt" in err
    assert err.count("pyfast: compiling") == 1


def test_required_kernels_turn_the_fallback_into_an_error(unbuilt: Path) -> None:
    status, _, err = run(unbuilt, "-c", SHOW, PYFAST_JIT="0", PYFAST_REQUIRE="cpp")
    assert status != 0
    last = err.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: layer_norm: PYFAST_REQUIRE must find a kernel for cpu")


def test_stale_extension_says_how_to_rebuild(unbuilt: Path) -> None:
    built = ROOT / "pyfast" / build.library_name()
    if not built.exists():
        pytest.skip("needs the extension built in this checkout")
    with (unbuilt / "pyfast" / "csrc" / "checks.h").open("a") as file:
        file.write("// changed after the build\n")
    _, _, err = run(unbuilt, "-c", "import pyfast", PYFAST_EXTENSION=str(built))
    assert "stale: rebuild with `python -m pyfast.build`" in err


def test_first_use_compiles_once_for_two_processes(unbuilt: Path) -> None:
    shutil.rmtree(unbuilt / "pyfast" / "csrc")
    (unbuilt / "pyfast" / "csrc").mkdir()
    (unbuilt / "pyfast" / "csrc" / "bindings.cpp").write_text(TINY_MODULE)
    compiler = unbuilt / "slow-c++"  # long enough for the two to meet, and it counts its calls
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {unbuilt}/calls\nsleep 1\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    command = ("pyfast/build.py", "--first-use")
    two = [start(unbuilt, *command, CXX=str(compiler)) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].strip()).exists()
    told = "".join(err for _, err in results)
    assert told.count("pyfast: compiling") == 1 and told.count("waiting for another process") == 1
    calls = (unbuilt / "calls").read_text().splitlines()
    assert sum("bindings.cpp" in call for call in calls) == 1
    assert sum("-shared" in call for call in calls) == 1
    assert run(unbuilt, *command)[1:] == (results[0][0], "")  # the third time: cached and silent


def test_cache_key_follows_the_sources(unbuilt: Path) -> None:
    ask = "import sys; sys.path.insert(0, 'pyfast'); import build; print(build._cache_key())"
    _, before, _ = run(unbuilt, "-c", ask)
    with (unbuilt / "pyfast" / "csrc" / "checks.h").open("a") as file:
        file.write("// changed\n")
    _, after, _ = run(unbuilt, "-c", ask)
    assert before != after
    assert "torch" in before and "generic" in before
