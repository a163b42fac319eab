"""The extension with CUDA kernels: what asks for it, and that it loads where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast import build, cuda_rooms
from tests.cuda_lanes import needs_emulator
from tests.emulator import cuda_extension

ROOT = Path(__file__).resolve().parent.parent
cuda = build.cuda
SHOW = """
import pyfast
from pyfast import backend, doctor
extension = doctor.examine()["extension"]
print(extension["stale"], *extension["cuda_archs"], extension["nvcc"])
print(backend.choose("layer_norm", "cuda").backend, backend.choose("layer_norm", "cpu").backend)
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A machine with an nvcc that does nothing, and with no settings."""
    for name in ("bin/nvcc", "lib64/libcudart_static.a"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("PYFAST_CUDA", "PYFAST_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("wish", "present", "asked", "archs"),
    [
        (None, (), None, None),
        (None, ("90a",), None, ("90a",)),
        ("auto", ("90a",), "80", ("80",)),
        ("auto", (), "80", None),
        ("0", ("90a",), None, None),
        ("1", (), None, ("80", "90a")),
        ("1", ("89",), None, ("89",)),
        ("1", (), "86;100a", ("86", "100a")),
    ],
)
def test_settings_choose_the_architectures(
    wish, present, asked, archs, toolkit, monkeypatch
) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: present)
    for name, value in (("PYFAST_CUDA", wish), ("PYFAST_CUDA_ARCH", asked)):
        if value is not None:
            monkeypatch.setenv(name, value)
    part = cuda.part()
    assert (part.archs if part else None) == archs
    assert part is None or (part.home, part.version()) == (toolkit, "13.0.88")


def test_builds_to_be_shipped_have_ptx_only_where_asked_and_are_compressed(
    toolkit, monkeypatch
) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: ())
    monkeypatch.setenv("PYFAST_CUDA", "1")
    monkeypatch.setenv("PYFAST_CUDA_ARCH", "80+PTX;90a")
    flags = cuda.part().flags()
    assert "-gencode=arch=compute_80,code=[sm_80,compute_80]" in flags
    assert "-gencode=arch=compute_90a,code=[sm_90a]" in flags
    assert "--compress-mode=size" in flags and "-lineinfo" not in flags
    monkeypatch.setenv("PYFAST_CUDA_ARCH", "80;90a")
    flags = cuda.part().flags()
    assert "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]" in flags
    assert "--no-compress" in flags  # the emulator reads it


def test_settings_that_mean_nothing_are_named(toolkit, monkeypatch) -> None:
    monkeypatch.setenv("PYFAST_CUDA", "yes")
    with pytest.raises(RuntimeError, match="PYFAST_CUDA must be auto, 0 or 1; got 'yes'"):
        cuda.part()
    monkeypatch.setenv("PYFAST_CUDA", "1")
    monkeypatch.setenv("PYFAST_CUDA_ARCH", "80;hopper")
    with pytest.raises(RuntimeError, match='PYFAST_CUDA_ARCH must be numbers like "80;90a"; got'):
        cuda.part()
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="PYFAST_CUDA=1 must find nvcc; got none"):
        cuda.part()


def test_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch) -> None:
    """A T4 (7.5) cannot run the kernels; of two alike one architecture is enough."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '7.5\\n9.0\\n8.9\\n9.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cuda.gpus.__wrapped__() == ("89", "90a")
    smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert cuda.gpus.__wrapped__() == ()


def test_hash_of_a_cpu_build_leaves_the_cuda_sources_out(monkeypatch) -> None:
    plain, with_cuda = build.source_hash(), build.source_hash(("80",))
    assert plain != with_cuda != build.source_hash(("90a",))
    monkeypatch.setattr(cuda, "digest", lambda *_: b"changed")
    assert build.source_hash() == plain and build.source_hash(("80",)) != with_cuda


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("80", "90a"), (8, 0), True),
        (("80", "90a"), (8, 6), True),
        (("80", "90a"), (9, 0), True),
        (("80", "90a"), (10, 0), True),  # by the PTX of 8.0
        (("90a",), (8, 0), False),
        (("90a",), (10, 0), False),  # what ends in a runs nowhere else
        (("86",), (8, 0), False),
        (("80+PTX", "90a"), (12, 0), True),
        (("80", "90a+PTX"), (12, 0), False),  # of 8.0 only machine code
        (("80", "90a+PTX"), (8, 9), True),
        (("80",), (7, 5), False),
    ],
)
def test_code_runs_where_nvidia_says(archs, capability, runs) -> None:
    assert cuda_rooms.covers(archs, capability) == runs


@needs_emulator
def test_extension_with_cuda_loads_without_a_gpu(tmp_path) -> None:
    """Linked to the real runtime: no driver, no CUDA build of torch."""
    builder = cuda_extension.builder()
    part = builder.cuda.part()
    library = tmp_path / builder.library_name()
    builder.build(library, ROOT / "build" / "objects", cuda_part=part)
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "stand_in" not in needed
    own = {k: v for k, v in os.environ.items() if k not in ("PYFAST_BACKEND", "PYFAST_REQUIRE")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        env={**own, "PYFAST_EXTENSION": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    facts, choices = done.stdout.splitlines()
    assert facts == f"False {' '.join(part.archs)} {part.version()}"
    assert choices == "cuda cpp"
