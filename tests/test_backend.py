"""One place selects, the selection is visible, and every switch has its effect."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast import backend

ROOT = Path(__file__).resolve().parent.parent


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
    message = "using: backend must be one of auto, cpp, torch; got 'triton'"
    with pytest.raises(ValueError, match=message), pyfast.using("triton"):
        pass


def test_describe_covers_every_op_and_device_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = backend.describe()
    assert {op for op, _, _ in rows} == set(backend.OPS)
    assert {device for _, device, _ in rows} == {"cpu", "cuda"}
    assert all(choice.backend == "torch" for _, device, choice in rows if device == "cuda")


def test_cuda_tensors_take_the_reference_with_one_warning() -> None:
    code = "from pyfast import backend as b\nfor op in b.OPS: print(b.choose(op, 'cuda').backend)"
    done = run(code)
    assert set(done.stdout.split()) == {"torch"}
    assert done.stderr.count("cuda tensors take the plain-torch reference") == 1


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
    assert done.stderr.strip().endswith("must be one of auto, cpp, torch; got 'fortran'")
