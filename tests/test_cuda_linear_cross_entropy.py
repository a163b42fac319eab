"""linear_cross_entropy in CUDA C++, on the emulator: slabs, tiles, rows that do not count."""

from unittest import mock

import pytest
import torch

import pyfast
from pyfast import reference, testing
from tests.cuda_lanes import LANES, check, needs_emulator
from tests.emulator import cuda
from tests.emulator.cuda import emulated
from tests.run_case import strided

pytestmark = needs_emulator
B = torch.bfloat16


def kernels(log) -> list[str]:
    return [launch.name for launch in log]


def test_linear_cross_entropy_in_slabs() -> None:
    """256 tiles of logits at once: dX grows in float32, a slab of dW is written once."""
    case = testing.linear_cross_entropy(130, 8, 8200, bias=True, label_smoothing=0.1)
    log = check(case, torch.float32, 80)
    assert kernels(log).count("row_factors_kernel") == 1
    grids = [launch.grid for launch in log if launch.name == "gemm_kernel"]
    assert len(grids) == 1 + 2 * 3
    assert grids[1:4] == [(3 * 124, 1, 1), (3, 16, 1), (124, 1, 1)]  # 7936 classes
    assert grids[4] == (3 * 5, 1, 1)  # the other 264


@pytest.mark.parametrize(("dtype", "capability"), LANES, ids=str)
def test_linear_cross_entropy_past_one_tile(dtype, capability) -> None:
    """130 rows that count, 272 classes: two tiles down and three across, copied by 16 bytes."""
    case = testing.linear_cross_entropy(152, 48, 272, bias=True, weighted=True, label_smoothing=0.2)
    check(case, dtype, capability, order="random", seed=2, perturb=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_linear_cross_entropy_reads_any_strides(reduction) -> None:
    case = testing.linear_cross_entropy(9, 24, 70, bias=True, reduction=reduction)
    check(case, B, 80, strided)


def test_linear_cross_entropy_in_16_bits_scales_before_rounding() -> None:
    """Gradients wait for that of the loss: 2**-14 of them would vanish in float16."""
    inputs = testing.linear_cross_entropy(20, 24, 64).inputs(torch.float16)
    inputs["input"].requires_grad_()
    with emulated(), pyfast.using("cuda"):
        loss = pyfast.linear_cross_entropy(**inputs, dtype=torch.float32)
        (loss * 2.0**14).backward()
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in inputs.items()}
    wide["input"].requires_grad_()
    (reference.linear_cross_entropy(**wide) * 2.0**14).backward()
    truth = wide["input"].grad
    assert (inputs["input"].grad - truth).abs().max() <= 2**-9 * truth.abs().max()


@pytest.mark.parametrize("needed", ["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, B], ids=str)
def test_linear_cross_entropy_makes_only_the_gradient_that_is_needed(needed, dtype) -> None:
    inputs = testing.linear_cross_entropy(19, 24, 70, bias=True).inputs(dtype)
    inputs[needed].requires_grad_()
    with emulated() as log, pyfast.using("cuda"):
        pyfast.linear_cross_entropy(**inputs).backward()
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(**inputs), inputs[needed])
    error = (inputs[needed].grad - truth).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * truth.abs().max()
    products = [launch.stats.mma_flops for launch in log if launch.name == "gemm_kernel"]
    assert len(products) == 3  # logits, logits again, and one of their gradient


def test_linear_cross_entropy_multiplies_no_row_that_does_not_count() -> None:
    """A row of nan that is ignored touches nothing; work is that of the rows that count."""
    x, weight = torch.randn(400, 64).to(B), torch.randn(64, 64).to(B)
    target = torch.randint(64, (400,))
    target[70:] = -100
    x[70:] = float("nan")
    flops, grads = [], []
    for rows in (400, 70):
        live = x[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        with emulated() as log, pyfast.using("cuda"):
            loss = pyfast.linear_cross_entropy(*live, target[:rows], reduction="sum")
            loss.backward()
        assert loss.isfinite() and live[0].grad.isfinite().all() and not live[0].grad[70:].any()
        flops.append(sum(launch.stats.mma_flops for launch in log))
        grads.append(live[1].grad)
    assert flops[0] == flops[1]
    assert torch.equal(*grads)


@pytest.mark.parametrize("scattered", [True, False])
def test_linear_cross_entropy_keeps_the_order_of_more_rows_than_a_block(scattered) -> None:
    """1024 threads find the rows that count, 1300 rows in two rounds."""
    x, weight = torch.randn(1300, 8), torch.randn(5, 8)
    target = torch.randint(5, (1300,))
    ignored = torch.rand(1300) < 0.5 if scattered else torch.arange(1300) < 1030
    target[ignored] = 3
    with emulated(), pyfast.using("cuda"):
        ours = pyfast.linear_cross_entropy(x, weight, target, reduction="none", ignore_index=3)
    truth = reference.linear_cross_entropy(x, weight, target, reduction="none", ignore_index=3)
    assert torch.allclose(ours, truth, atol=1e-5)
    assert not ours[target == 3].any()


def test_linear_cross_entropy_of_no_row_that_counts() -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(7, 24, requires_grad=True)
    target = torch.full((5,), -100)
    with emulated(), pyfast.using("cuda"):
        total = pyfast.linear_cross_entropy(x, weight, target, reduction="sum")
        total.backward()
        mean = pyfast.linear_cross_entropy(x, weight, target)
        empty = pyfast.linear_cross_entropy(x[:0], weight, target[:0], reduction="sum")
    assert total == 0 and empty == 0 and mean.isnan()  # the mean of nothing, as in torch
    assert not x.grad.any() and not weight.grad.any()


def test_linear_cross_entropy_of_a_target_that_is_no_class_is_nan() -> None:
    """The host cannot know without waiting; nothing is read out of bounds for it."""
    x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(37, 24)
    target = torch.tensor([3, 37, -1, 2**62])
    for class_weight in (None, torch.rand(37)):
        x.grad = None
        with emulated(), pyfast.using("cuda"):
            loss = pyfast.linear_cross_entropy(
                x, weight, target, weight=class_weight, reduction="none", label_smoothing=0.1
            )
            loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, True, True]
        assert x.grad.isnan().any(1).tolist() == [False, True, True, True]


def test_linear_cross_entropy_keeps_the_digits_of_large_logits() -> None:
    """Logits about -1000, and classes that a bias of -inf rules out."""
    x, weight = torch.randn(3, 8), torch.randn(200, 8)
    bias = torch.full((200,), -1000.0)
    bias[5:140] = -torch.inf
    target = torch.tensor([0, 1, 170])
    settings = {"linear_bias": bias, "reduction": "none"}
    with emulated(), pyfast.using("cuda"):
        ours = pyfast.linear_cross_entropy(x, weight, target, **settings)
    settings["linear_bias"] = bias.double()
    truth = reference.linear_cross_entropy(x.double(), weight.double(), target, **settings)
    assert torch.allclose(ours.double(), truth, rtol=1e-4)


def test_linear_cross_entropy_without_depth_is_that_of_the_bias() -> None:
    bias = torch.randn(9, requires_grad=True)
    x, weight, target = torch.zeros(4, 0), torch.zeros(9, 0), torch.tensor([1, 0, 8, -100])
    with emulated(), pyfast.using("cuda"):
        loss = pyfast.linear_cross_entropy(x, weight, target, linear_bias=bias)
        loss.backward()
    plain = bias.detach().clone().requires_grad_()
    truth = reference.linear_cross_entropy(x, weight, target, linear_bias=plain)
    truth.backward()
    assert torch.allclose(loss, truth) and torch.allclose(bias.grad, plain.grad, atol=1e-6)


def test_linear_cross_entropy_holds_an_eighth_of_the_logits() -> None:
    """What the rooms ask torch for; nothing is launched."""
    x, weight = torch.randn(8192, 64).to(B), torch.randn(16384, 64).to(B)
    target = torch.zeros(8192, dtype=torch.int64)
    settings = (-100, 0.1, "none", True, True, False)
    asked = []
    asleep = mock.patch.object(cuda._Session, "launch", lambda *_: 0)
    heard = mock.patch.object(
        cuda._Session, "remember", lambda _, told: asked.append(told.contents.bytes)
    )
    with asleep, heard, emulated(), pyfast.using("cuda"):
        ops, given = torch.ops.pyfast, (x, weight, None, target, None)
        loss, lse, *_ = ops.linear_cross_entropy(*given, *settings)
        ops.linear_cross_entropy_backward(loss, *given, lse, *settings)
    assert 1 / 12 < max(asked) / (8192 * 16384 * 2) < 1 / 8


@pytest.mark.parametrize("capability", [80, 90])
def test_logits_leave_their_tiles_as_a_few_numbers(capability) -> None:
    """Of 128 x 256 logits two tiles; what is written is 8 bytes for each of their rows."""
    x, weight = torch.randn(128, 64).to(B), torch.randn(256, 64).to(B)
    settings = (None, torch.zeros(128, dtype=torch.int64), None, -100, 0.0, "none")
    with emulated(capability) as log, pyfast.using("cuda"):
        torch.ops.pyfast.linear_cross_entropy(x, weight, *settings, False, False, False)
    (product,) = (launch for launch in log if "gemm" in launch.name)
    assert product.name == ("gemm_kernel" if capability == 80 else "gemm_tma_kernel")
    assert product.stats.store_bytes == 2 * 128 * 8 + 128 * 4  # and the targets' logits
    assert product.stats.bank_factor <= 1  # by TMA and wgmma the kernel itself reads none of it
    assert product.stats.mma_flops == 2 * 128 * 256 * 64
