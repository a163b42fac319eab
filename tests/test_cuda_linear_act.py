"""linear_act in CUDA C++ through its door, on the emulator: what the common tests do not reach."""

from unittest import mock

import pytest
import torch

import pyfast
from pyfast import reference, testing
from tests.cuda_lanes import LANES, check, needs_emulator
from tests.emulator import cuda
from tests.emulator.cuda import emulated
from tests.run_case import Recorder, assert_as_good_as_torch, each_tensor

pytestmark = needs_emulator
B = torch.bfloat16


def kernels(log) -> list[str]:
    return [launch.name for launch in log]


@pytest.mark.parametrize(("capability", "threads"), [(80, 128), (90, 384)])
def test_linear_act_takes_large_tiles_where_they_fill_a_gpu(capability, threads) -> None:
    """2048 x 1024: 128 tiles of 128 x 128; by tensor maps on capability 9.0."""
    x, weight = torch.randn(2048, 48).to(B), torch.randn(1024, 48).to(B)
    with emulated(capability) as log, pyfast.using("cuda"):
        out, _ = torch.ops.pyfast.linear_act(x, weight, None, "relu", False)
    blocks = 128 if capability == 80 else 4  # as many as the emulated multiprocessors
    assert log[0].block[0] == threads and log[0].grid == (blocks, 1, 1)
    exact = (x.double() @ weight.double().T).relu()
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert log[0].stats.sector_efficiency == 1 and log[0].stats.bank_factor == 1
    assert log[0].stats.mma_flops == 2 * 2048 * 1024 * 64  # 48 of depth, in whole steps


@pytest.mark.parametrize(
    ("kind", "kernel", "threads"),
    [
        ("aligned", "gemm_tma_kernel", 384),
        ("odd stride", "gemm_kernel", 256),
        ("misaligned", "gemm_kernel", 256),
        ("expanded", "gemm_kernel", 256),
        ("no depth", "gemm_kernel", 256),
    ],
)
def test_linear_act_takes_tensor_maps_where_they_can_read(kind, kernel, threads) -> None:
    """Else by cp.async or, where not even that can, element by element."""
    x, weight = torch.randn(8192, 24).to(B), torch.randn(256, 24).to(B)
    if kind == "odd stride":
        x = torch.randn(8192, 25).to(B)[:, :24]
    elif kind == "misaligned":
        x = torch.randn(8192 * 24 + 1).to(B)[1:].view(8192, 24)
    elif kind == "expanded":
        x = x[:1].expand(8192, 24)
    elif kind == "no depth":
        x, weight = x[:, :0], weight[:, :0]
    with emulated(90, processors=132) as log, pyfast.using("cuda"):
        out, _ = torch.ops.pyfast.linear_act(x, weight, None, "none", False)
    assert [(launch.name, launch.block[0]) for launch in log] == [(kernel, threads)]
    exact = x.double() @ weight.double().T
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_linear_act_takes_wide_tiles_where_they_fill_a_gpu() -> None:
    """8192 x 512: 128 tiles of 128 x 256, and their gradients, which are not enough of them."""
    case = testing.linear_act(8192, 16, 512, "relu")
    with emulated(90, processors=132) as log, pyfast.using("cuda"):
        assert_as_good_as_torch(case, B)
    assert "TmaTileILi256E" in log[0].binary.mangled and log[0].grid == (128, 1, 1)


def test_linear_act_does_without_code_for_warpgroups() -> None:
    """Where only code for sm_80 is there, a GPU of capability 9.0 takes that."""
    x, weight = torch.randn(8192, 24).to(B), torch.randn(256, 24).to(B)
    older = mock.patch.object(cuda._Session, "threads", lambda *_: 32)
    with older, emulated(90) as log, pyfast.using("cuda"):
        torch.ops.pyfast.linear_act(x, weight, None, "none", False)
    assert kernels(log) == ["gemm_kernel"]


@pytest.mark.parametrize(("dtype", "capability"), LANES, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_linear_act_without_activation_sums_the_bias_beside_a_product(
    dtype, capability, flipped
) -> None:
    """Of a weight as nn.Linear keeps it; the sums of a flipped one take the elementwise pass."""
    log = check(testing.linear_act(70, 40, 24, "none", flipped=flipped), dtype, capability)
    assert ("act_backward_kernel" in kernels(log)) == flipped


def test_linear_act_splits_a_long_weight_gradient() -> None:
    log = check(testing.linear_act(1100, 24, 40, "gelu"), B, 80)
    grids = [launch.grid for launch in log if launch.name == "gemm_kernel"]
    assert grids[-1][1] == 2
    assert kernels(log)[-1] == "column_sums_kernel"


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_linear_act_makes_only_the_gradients_that_are_asked_for(wanted) -> None:
    inputs = testing.linear_act(20, 24, 40, "silu").inputs(B)
    inputs[wanted].requires_grad_()
    with emulated() as log, pyfast.using("cuda"):
        pyfast.linear_act(**inputs).float().sum().backward()
    products = kernels(log)[1:].count("gemm_kernel")
    assert products == (wanted != "bias")


@pytest.mark.parametrize("sizes", [(0, 8, 3), (5, 0, 3), (5, 8, 0)], ids=str)
def test_linear_act_of_nothing(sizes) -> None:
    m, k, n = sizes
    inputs = {"x": torch.randn(m, k), "weight": torch.randn(n, k), "bias": torch.randn(n)}
    live = each_tensor(inputs, lambda _, t: t.requires_grad_())
    with emulated(), pyfast.using("cuda"):
        out = pyfast.linear_act(**live, act="gelu")
        out.sum().backward()
    plain = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    reference.linear_act(**plain, act="gelu").sum().backward()
    for name, t in live.items():
        torch.testing.assert_close(t.grad, plain[name].grad)


def test_linear_act_keeps_what_the_schema_says() -> None:
    """The pre-activation where the derivative follows from nothing else."""
    with emulated(), pyfast.using("cuda"), Recorder():
        x, weight = torch.randn(5, 16), torch.randn(7, 16)
        for act, kept in (("relu", 0), ("none", 0), ("gelu", 35), ("mish", 35)):
            _, preact = torch.ops.pyfast.linear_act(x, weight, None, act, True)
            assert preact.numel() == kept
