"""Every way to install, each in a fresh virtual environment, and what imports must not do."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "pybind11", "ninja", "setuptools", "wheel")
SMOKE = """
import json, sys, torch, pyfast, pyfast.kernels
from pyfast import backend
x = torch.randn(3, 5)
torch.testing.assert_close(pyfast.layer_norm(x, (5,)), torch.nn.functional.layer_norm(x, (5,)))
choice, extension = backend.choose("layer_norm", "cpu"), backend.extension()
print(json.dumps({"package": pyfast.__file__, "backend": choice.backend, "why": choice.why,
                  "extension": extension and extension.__file__}))
"""


def run(*command: object, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; the output is shown if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(settings), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's, without what would lead a fresh environment back to this one."""
    ours = ("PYFAST_", "PYTHONPATH", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | settings


def smoke(python: Path, folder: Path, **settings: str) -> dict[str, str]:
    done = run(python, "-c", SMOKE, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"), **settings)
    return json.loads(done.stdout) | {"stderr": done.stderr}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tracked files alone, as a clone has them, with the changes of the working tree."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def hasty_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installation is on trial, not the optimiser: -O0 compiles in a seventh of the time."""
    script = tmp_path / "hasty-c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def fresh_python(folder: Path) -> Path:
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install_packages(python: Path, folder: Path) -> None:
    pins = ROOT / "requirements.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", pins, *PACKAGES, cwd=folder)


def test_import_is_quick() -> None:
    """At most 0.3 s beyond torch; the best of three, as other processes only ever slow it down."""
    code = (
        "import time, torch; t = time.perf_counter(); import pyfast; print(time.perf_counter() - t)"
    )
    seconds = [float(run(sys.executable, "-c", code, cwd=ROOT).stdout) for _ in range(3)]
    assert min(seconds) < 0.3


def test_transformers_imports_from_a_checkout() -> None:
    """kernels/ must not pass for the PyPI package of that name, which transformers looks for."""
    pytest.importorskip("transformers", exc_type=ImportError)
    code = (
        "import sys, importlib.util as u; assert '' in sys.path\n"
        "from transformers import LlamaForCausalLM\n"
        "spec = u.find_spec('kernels'); assert spec is None or spec.origin is None or "
        f"not spec.origin.startswith({str(ROOT)!r}), spec"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


@pytest.mark.packaging
def test_editable_install(source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install_packages(python, tmp_path)
    run(python, "-m", "pip", "install", "--no-build-isolation", "-e", ".", cwd=source)
    for folder in (tmp_path, source):  # from anywhere, and from the checkout itself
        told = smoke(python, folder)
        assert told["backend"] == "cpp" and told["why"].startswith("built extension"), told
        assert Path(told["package"]).parent == source / "pyfast"
        assert Path(told["extension"]).parent == source / "pyfast"
    with (source / "csrc" / "checks.h").open("a") as file:
        file.write("// changed\n")
    assert "stale: rebuild with `python -m pyfast.build`" in smoke(python, tmp_path)["stderr"]
    assert run(python, "-m", "pyfast.build", cwd=source).stderr == ""
    assert smoke(python, tmp_path)["stderr"] == ""


@pytest.mark.packaging
def test_plain_wheel(source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install_packages(python, tmp_path)
    pip = (python, "-m", "pip")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", "../wheels", ".", cwd=source)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert re.search(r"-cp3\d+-cp3\d+-", wheel.name)
    assert_ships_the_sources(wheel, source)
    run(*pip, "install", wheel, cwd=tmp_path)
    told = smoke(python, tmp_path)
    assert told["backend"] == "cpp" and told["why"].startswith("built extension"), told
    assert "site-packages" in told["extension"] and told["stderr"] == ""
    assert not (tmp_path / "cache").exists()


@pytest.mark.packaging
def test_wheel_built_without_torch_compiles_on_first_use(source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    pip = (python, "-m", "pip")
    said = run(*pip, "wheel", "-v", "--no-deps", "-w", "../wheels", ".", cwd=source)
    assert "pure Python build (torch is not installed)" in said.stdout + said.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert_ships_the_sources(wheel, source)
    install_packages(python, tmp_path)
    run(*pip, "install", wheel, cwd=tmp_path)

    for settings in ({"PYFAST_JIT": "0"}, {"CXX": "/nowhere/c++"}):
        told = smoke(python, tmp_path, **settings)
        assert told["backend"] == "torch" and told["stderr"].count("Warning") == 1, told

    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    two = [
        subprocess.Popen(
            [python, "-c", SMOKE],
            cwd=tmp_path,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=1200) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    assert all(json.loads(out)["why"].startswith("compiled on first use") for out, _ in outputs)
    assert "".join(err for _, err in outputs).count("pyfast: compiling") == 1
    assert smoke(python, tmp_path)["stderr"] == ""  # the third time: cached and silent


def assert_ships_the_sources(wheel: Path, source: Path) -> None:
    """Every module, kernel and C++ file of the tree, and nothing of tests/ or bench/."""
    mapped = {"csrc": "pyfast/csrc", "pyfast": "pyfast"}
    mapped |= {"kernels/triton": "pyfast/kernels", "kernels/cuda": "pyfast/kernels/cuda"}
    expected = set()
    for folder, installed in mapped.items():
        for path in (source / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
                expected.add(f"{installed}/{path.relative_to(source / folder).as_posix()}")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n for n in names if not n.endswith(".so") and ".dist-info/" not in n}
    assert shipped == expected
