"""One place selects, the selection is visible, and every switch has its effect."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast import backend, doctor

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYFAST_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | settings, capture_output=True, text=True
    )


def test_cpu_takes_the_kernels() -> None:
    assert backend.choose("linear_act", "cpu").backend == "cpp"


def test_using_torch_takes_the_reference_and_comes_back() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with pyfast.using("torch"):
        assert backend.choose("layer_norm", "cpu").backend == "torch"
        out = pyfast.layer_norm(x, (5,))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)  # the reference has double backward
    assert backend.choose("layer_norm", "cpu").backend == "cpp"


def test_using_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), pyfast.using("torch"):
        raise KeyError
    assert backend.choose("layer_norm", "cpu").backend == "cpp"


def test_using_names_the_backends_it_knows() -> None:
    message = "using: backend must be one of auto, cpp, cuda, triton, torch; got 'fortran'"
    with pytest.raises(ValueError, match=message), pyfast.using("fortran"):
        pass


def test_describe_covers_every_op_and_device_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = backend.describe()
    assert {op for op, _, _ in rows} == set(backend.OPS)
    assert {device for _, device, _ in rows} == {"cpu", "cuda"}
    on_cuda = {choice.backend for _, device, choice in rows if device == "cuda"}
    assert on_cuda <= {"cuda", "triton", "torch"}


CHOICES = "from pyfast import backend as b\nfor op in b.OPS: print(b.choose(op, 'cuda').backend)"
NO_TRITON = "from pyfast import triton_rooms\ntriton_rooms._INSTALLED = False\n"


without_cuda = pytest.mark.skipif(
    bool(backend._cuda), reason="this build has CUDA kernels, which come before Triton's"
)


@needs_triton
@without_cuda
def test_cuda_tensors_take_triton() -> None:
    done = run(CHOICES)
    assert "triton" in set(done.stdout.split()), done.stderr
    op = next(op for op in backend.OPS if op not in backend._cuda)  # whose room is no C++
    assert b"triton_rooms" in torch._C._dispatch_dump_table(f"pyfast::{op}").encode()


@without_cuda
def test_cuda_tensors_take_the_reference_without_triton_with_one_warning() -> None:
    done = run(NO_TRITON + CHOICES)
    assert set(done.stdout.split()) == {"torch"}
    assert done.stderr.count("cuda tensors take the plain-torch reference") == 1
    assert done.stderr.count("triton is not installed") == 1


@needs_triton
def test_triton_leaves_float64_to_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYFAST_REQUIRE", raising=False)
    choice = backend.choose("layer_norm", "cuda", torch.float64)
    assert choice.backend == "torch" and "not torch.float64" in choice.why
    assert backend.choose("layer_norm", "cuda", torch.bfloat16).backend in ("cuda", "triton")


@needs_triton
def test_every_choice_stands_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYFAST_REQUIRE", raising=False)
    backend._choices.clear()
    with caplog.at_level("DEBUG", "pyfast"):
        backend.choose("layer_norm", "cuda", torch.float64)
        backend.choose("layer_norm", "cuda", torch.float64)
    assert len(caplog.records) == 1
    assert "layer_norm, cuda, torch.float64: torch (the Triton" in caplog.messages[0]


@needs_triton
def test_triton_refuses_cpu_tensors_in_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    x = torch.randn(3, 5)
    message = "layer_norm: x must be on a CUDA device for the triton backend; got cpu: Triton finds"
    with pyfast.using("triton"), pytest.raises(RuntimeError, match=message):
        pyfast.layer_norm(x, (5,))
    with pyfast.using("triton"), pytest.raises(RuntimeError, match=message):
        torch.ops.pyfast.layer_norm(x, None, None, None, 1e-5)
    assert torch.ops.pyfast.layer_norm(x, None, None, None, 1e-5)[0].shape == x.shape


def test_import_does_not_start_cuda() -> None:
    """Even to ask whether there is a GPU would: then a process may no longer be forked."""
    code = (
        "import torch\n"
        "def asked(*_): raise AssertionError('CUDA was asked')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, asked)\n"
        "torch.backends.cuda.is_built = lambda: True\n"
        "import pyfast\nfrom pyfast import backend\n"
        "with pyfast.using('torch'): pass\n"
        "pyfast.rms_norm(torch.ones(2, 3), (3,))\n"
        "print(backend._rooms.get('CUDA', (0, ('',)))[1][0] == 'measured', bool(backend._cuda))"
    )
    done = run(code, PYFAST_BACKEND="auto", PYFAST_REQUIRE="")
    assert done.returncode == 0, done.stderr
    measures, built = done.stdout.split()
    assert measures == built  # with CUDA kernels built in, calls on a GPU are measured


@needs_triton
def test_backend_setting_runs_triton_from_the_start() -> None:
    code = (
        "import torch, pyfast\nfrom pyfast import backend\n"
        "print(backend.choose('layer_norm', 'cpu').backend)\n"
        "table = torch._C._dispatch_dump_table('pyfast::layer_norm')\n"
        "print('triton_rooms' in table.split('CUDA')[0])"
    )
    done = run(code, PYFAST_BACKEND="triton")
    assert done.stdout.split() == ["triton", "True"], done.stderr


@needs_triton
def test_using_triton_shows_what_it_covered_again() -> None:
    def table() -> str:
        return torch._C._dispatch_dump_table("pyfast::layer_norm").split("CUDA")[0]

    before = table()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pyfast.using("triton"):
            assert "layer_norm.cpp" not in table()
            with pyfast.using("triton"), pyfast.using("cpp"):
                assert table() == before
            assert "layer_norm.cpp" not in table()
    assert table() == before and "layer_norm.cpp" in before


@needs_triton
def test_triton_has_its_operations_without_the_extension() -> None:
    code = (
        "import torch\nfrom pyfast import backend as b\n"
        "print(b.extension(), b.choose('layer_norm', 'cuda').backend, b.choose('rope', 'cpu'))\n"
        "print(torch.ops.pyfast.layer_norm_backward.default._schema)\n"
        "from torch._subclasses import FakeTensorMode\nimport pyfast\n"
        "with FakeTensorMode(): print(pyfast.layer_norm(torch.empty(2, 8, device='cuda'), (8,)))"
    )
    done = run(code, PYFAST_EXTENSION="missing.so", PYFAST_JIT="0")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("None triton Choice(backend='torch'"), done.stderr
    assert lines[1] == str(torch.ops.pyfast.layer_norm_backward.default._schema)
    assert lines[2].startswith("FakeTensor(..., device='cuda:0', size=(2, 8)")


@pytest.fixture
def a_gpu(monkeypatch):
    """Sets the compute capability of the GPU that torch would see."""
    before = dict(backend._rooms)

    def see(*capability: int) -> None:
        monkeypatch.setattr(backend.cuda_rooms, "capabilities", lambda: frozenset({capability}))
        backend._choices.clear()

    monkeypatch.delenv("PYFAST_REQUIRE", raising=False)
    yield see
    monkeypatch.undo()
    backend._select(backend._forced)
    assert {key: told for key, (_, told) in backend._rooms.items()} == {
        key: told for key, (_, told) in before.items()
    }


def test_gpus_too_old_for_kernels_take_torch_and_doctor_says_so(a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(backend, "_cuda", frozenset(backend.OPS))
    monkeypatch.setattr(backend, "_archs", ("80", "90a"))
    a_gpu(7, 5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert backend.choose("layer_norm", "cuda", torch.float32).backend == "torch"
    assert len(told) <= 1
    row = next(r for r in doctor.examine()["operations"] if r["device"] == "cuda")
    assert row["backend"] == "torch" and "compute capability 7.5;" in row["why"]
    assert "need 8.0" in row["why"]


@needs_triton
def test_gpus_the_extension_is_not_built_for_take_triton(a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(backend, "_cuda", frozenset(backend.OPS))
    monkeypatch.setattr(backend, "_archs", ("90a+PTX",))
    a_gpu(8, 0)
    assert backend.choose("layer_norm", "cuda", torch.float32).backend == "triton"
    assert backend._rooms["CUDA"][1] == ("triton", backend.OPS)  # over the extension's own
    a_gpu(9, 0)
    assert backend.choose("layer_norm", "cuda", torch.float32).backend == "cuda"


def test_require_refuses_a_fallback() -> None:
    code = "import torch\nfrom pyfast import backend as b\nprint(b.choose('rope', 'cuda'))"
    done = run(NO_TRITON + code, PYFAST_REQUIRE="triton")
    words = "rope: PYFAST_REQUIRE must find a kernel for cuda tensors; got none: triton is not inst"
    assert f"RuntimeError: {words}" in done.stderr
    if not backend._cuda:
        done = run(code, PYFAST_REQUIRE="cuda")
        assert "got none: the extension is built without CUDA kernels" in done.stderr
    done = run(code, PYFAST_REQUIRE="fortran")
    assert "PYFAST_REQUIRE must be one of cpp, cuda, triton; got 'fortran'" in done.stderr


def test_select_isa_changes_the_kernels_in_use() -> None:
    extension = backend.extension()
    before = extension.isa()
    try:
        for isa in extension.supported_isas():
            backend.select_isa(isa)
            assert f"{isa} kernels" in backend.choose("layer_norm", "cpu").why
    finally:
        backend.select_isa(before)
    with pytest.raises(ValueError, match=r"select_isa: name must be one of generic.*; got 'sse9'"):
        backend.select_isa("sse9")


def test_cpu_isa_setting_forces_a_lower_one() -> None:
    show = "from pyfast import backend; print(backend.extension().isa())"
    assert run(show, PYFAST_CPU_ISA="generic").stdout.strip() == "generic"
    done = run(show, PYFAST_CPU_ISA="sse9")
    assert done.stdout.strip() == backend.extension().supported_isas()[-1]
    assert "PYFAST_CPU_ISA must be one of generic" in done.stderr and "got 'sse9'" in done.stderr


def test_backend_setting_takes_the_reference_without_compiling() -> None:
    show = "from pyfast import backend; print(backend.choose('rope', 'cpu'))"
    assert "asked for" in run(show, PYFAST_BACKEND="torch").stdout
    done = run(show, PYFAST_BACKEND="fortran")
    assert done.stderr.strip().endswith("of auto, cpp, cuda, triton, torch; got 'fortran'")
