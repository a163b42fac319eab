"""cuBLASLt as a second candidate of linear_act, played by a library that computes on the CPU."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyfast import backend, testing
from tests.cuda_lanes import check, needs_emulator
from tests.emulator import library

SOURCE = Path(__file__).parent / "cuda/cublaslt.cpp"
B, H, F = torch.bfloat16, torch.float16, torch.float32
PLAIN, RELU_BIAS, BIAS, GELU_BIAS, GELU_AUX_BIAS, BGRADA, BGRADB = 1, 6, 4, 36, 164, 256, 512

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so.13"
    command = [*library.compiler(), "-std=c++20", "-O2", "-fPIC", "-shared", SOURCE, "-o", target]
    subprocess.run(command, check=True)
    return target


@pytest.fixture
def stand_in(path, monkeypatch):
    """The library, chosen; `stand_in_products` tells the epilogues it has run since."""
    monkeypatch.setenv("PYFAST_CUBLASLT", str(path))
    extension = backend.extension()
    assert extension.choose_cublaslt(True) and extension.cublaslt_chosen()
    loaded = ctypes.CDLL(str(path))
    ran(loaded)
    yield loaded
    loaded.stand_in_refuse(0)
    assert extension.choose_cublaslt(False) and not extension.cublaslt_chosen()


def ran(loaded: ctypes.CDLL) -> set[int]:
    found = (ctypes.c_int * 256)()
    return set(found[: loaded.stand_in_products(found, 256)])


CASES = [
    ("none", False, {BIAS, PLAIN, BGRADB}),
    ("none", True, {BIAS, PLAIN, BGRADA}),
    ("relu", False, {RELU_BIAS, PLAIN}),
    ("gelu_tanh", False, {GELU_AUX_BIAS, PLAIN}),
    ("gelu_tanh", True, {GELU_AUX_BIAS, PLAIN}),
    ("silu", False, {PLAIN}),  # it has none; gradients are products all the same
]


@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@pytest.mark.parametrize(("act", "flipped", "epilogues"), CASES)
def test_cublaslt_is_as_good_as_torch(stand_in, act, flipped, epilogues, dtype) -> None:
    case = testing.linear_act(21, 24, 40, act, flipped=flipped)
    log = check(case, dtype, 80)
    assert ran(stand_in) - {GELU_BIAS} == epilogues  # that one where nothing is to be saved
    kernels = {launch.name for launch in log}
    assert ("gemm_kernel" in kernels) == (act == "silu")
    assert ("act_backward_kernel" in kernels) == (act != "none")


def test_cublaslt_leaves_to_the_kernels_what_it_cannot_do(stand_in) -> None:
    """Pre-activations it stores in columns of multiples of 8 only."""
    log = check(testing.linear_act(21, 24, 37, "gelu_tanh"), B, 80)
    assert GELU_AUX_BIAS not in ran(stand_in)
    assert "gemm_kernel" in {launch.name for launch in log}


@pytest.mark.parametrize("refused", [BIAS, PLAIN, BGRADB])
def test_cublaslt_refuses_and_the_kernels_go_on(stand_in, refused) -> None:
    stand_in.stand_in_refuse(refused)
    log = check(testing.linear_act(21, 24, 40, "none"), B, 80)
    assert ran(stand_in) == {BIAS, PLAIN, BGRADB} - {refused}
    assert "gemm_kernel" in {launch.name for launch in log}


def test_kernels_run_where_cublaslt_is_not_chosen(stand_in) -> None:
    backend.extension().choose_cublaslt(False)
    check(testing.linear_act(21, 24, 40, "none"), B, 80)
    assert not ran(stand_in)


def test_cublaslt_that_is_not_there_cannot_be_chosen() -> None:
    script = "from pyfast import backend as b; x = b.extension(); print(x.choose_cublaslt(True))"
    environment = os.environ | {"PYFAST_CUBLASLT": "/nowhere/libcublasLt.so"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False"]
