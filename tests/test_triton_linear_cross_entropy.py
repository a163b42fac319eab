"""linear_cross_entropy in Triton, on the emulator: every case, slabs, rows that do not count."""

import pytest
import torch

import pyfast
from pyfast import reference, testing, triton_rooms

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import emulated
from tests.run_case import strided
from tests.triton_budget_cases import large_tiles
from tests.triton_lanes import LANES, check, check_twice, runs

room = triton_rooms._module("linear_cross_entropy")
logit_tiles = triton_rooms._module("logit_tiles")
B = torch.bfloat16


@pytest.mark.parametrize(
    ("case", "dtype", "capability"), runs(testing.cases("linear_cross_entropy")), ids=str
)
def test_linear_cross_entropy_is_as_good_as_torch(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


@pytest.mark.parametrize(("dtype", "capability"), LANES[:2], ids=str)
def test_linear_cross_entropy_in_slabs(dtype, capability, monkeypatch) -> None:
    """600 classes in three slabs, the last of 88: dX grows, a slab of dW is written once."""
    monkeypatch.setattr(logit_tiles, "LEAST_WORKSPACE", 1)
    assert room.slab_classes(45, 600, dtype.itemsize) == 256
    case = testing.linear_cross_entropy(45, 24, 600, bias=True, label_smoothing=0.1)
    log = check(case, dtype, capability)
    assert sum(launch.name == "_slab_kernel" for launch in log) == 3


def test_linear_cross_entropy_in_slabs_weighs_each_class(monkeypatch) -> None:
    """In float32: a tenth of a weight is little beside what bfloat16 may err."""
    monkeypatch.setattr(logit_tiles, "LEAST_WORKSPACE", 1)
    case = testing.linear_cross_entropy(9, 24, 300, weighted=True, label_smoothing=0.1)
    check(case, torch.float32, 80, perturb=False)


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_cross_entropy_with_large_tiles(capability) -> None:
    """Past one tile of 128 each way; 48, 272: copied by 16 bytes, while others are multiplied."""
    with large_tiles():
        case = testing.linear_cross_entropy(130, 48, 272, bias=True)
        log = check(case, B, capability, processors=2)
    assert {launch.binary.num_warps for launch in log if "tiles" in launch.name} == {8}


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "weighted": True, "label_smoothing": 0.1}])
def test_linear_cross_entropy_takes_a_single_class(rows, settings) -> None:
    """Triton compiles a 1 in: no tensor then, and nothing of it can be converted."""
    check(testing.linear_cross_entropy(rows, 9, 1, **settings), B, 90, perturb=False)


def test_linear_cross_entropy_reads_any_strides() -> None:
    # not perturbed: 2 units of a row's approximate logarithm are 8 of its small probabilities
    case = testing.linear_cross_entropy(9, 24, 70, bias=True)
    check(case, torch.float32, 80, strided, perturb=False)


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_cross_entropy_of_transposed_weights_counts_no_more_than_its_classes(
    capability, monkeypatch
) -> None:
    """Odd columns are packed with zeros behind them, which are no classes with logits of 0."""
    monkeypatch.setattr(logit_tiles, "LEAST_WORKSPACE", 1)
    case = testing.linear_cross_entropy(70, 64, 517, bias=True, weighted=True, label_smoothing=0.1)

    def transposed(name: str, t: torch.Tensor) -> torch.Tensor:
        return t.t().contiguous().t() if name == "linear_weight" else t

    log = check(case, B, capability, transposed)
    assert sum(launch.name == "_slab_kernel" for launch in log) == 3


@pytest.mark.parametrize("needed", ["input", "linear_weight", "linear_bias"])
def test_linear_cross_entropy_makes_only_the_gradient_that_is_needed(needed) -> None:
    inputs = testing.linear_cross_entropy(19, 24, 70, bias=True).inputs(torch.float32)
    inputs[needed].requires_grad_()
    with emulated() as log, pyfast.using("triton"):
        pyfast.linear_cross_entropy(**inputs).backward()
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(**inputs), inputs[needed])
    assert torch.allclose(inputs[needed].grad, truth, atol=1e-5)
    assert sum("product" in launch.name for launch in log) == (needed != "linear_bias")


def test_linear_cross_entropy_multiplies_no_row_that_does_not_count() -> None:
    """A row of nan that is ignored touches nothing; work is that of the rows that count."""
    x, weight = torch.randn(200, 64), torch.randn(64, 64)
    target = torch.randint(64, (200,))
    target[70:] = -100
    x[70:] = float("nan")
    flops = []
    for rows in (200, 70):
        live = x[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        with emulated() as log, pyfast.using("triton"):
            loss = pyfast.linear_cross_entropy(*live, target[:rows], reduction="sum")
            loss.backward()
        assert loss.isfinite() and live[0].grad.isfinite().all() and not live[0].grad[70:].any()
        flops.append(sum(launch.stats.mma_flops for launch in log))
    assert flops[0] == flops[1]


def test_linear_cross_entropy_of_no_row_that_counts() -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(7, 24, requires_grad=True)
    target = torch.full((5,), -100)
    with emulated(), pyfast.using("triton"):
        total = pyfast.linear_cross_entropy(x, weight, target, reduction="sum")
        total.backward()
        mean = pyfast.linear_cross_entropy(x, weight, target)
    assert total == 0 and mean.isnan()  # the mean of nothing, as in torch
    assert not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("class_weight", [None, torch.ones(80)[:37]], ids=["plain", "weighted"])
def test_linear_cross_entropy_of_a_target_that_is_no_class_is_nan(class_weight) -> None:
    """The host cannot know without waiting; nothing is read out of bounds for it."""
    x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(37, 24)
    target = torch.tensor([3, 37, -1, 2**62])
    with emulated(), pyfast.using("triton"):
        loss = pyfast.linear_cross_entropy(x, weight, target, weight=class_weight, reduction="none")
        loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, True]
    assert x.grad.isnan().any(1).tolist() == [False, True, True, True]


def test_slabs_keep_to_their_budget() -> None:
    for rows, classes, size in ((1, 1, 4), (45, 301, 4), (8192, 128256, 2), (65536, 32000, 2)):
        slab = room.slab_classes(rows, classes, size)
        whole = rows * classes * size
        most = max(logit_tiles.LEAST_WORKSPACE, whole // 8, rows * room.SLAB_STEP * size)
        assert 1 <= slab <= classes and rows * slab * size <= most


def test_no_copy_of_the_weight_is_larger_than_a_slab(monkeypatch) -> None:
    """In float32 a copy of the weight saves time in shared memory; that of this one takes 2 KB."""
    x, weight, target = torch.randn(3, 16), torch.randn(33, 16), torch.tensor([0, 32, 7])
    launches = []
    for least in (1, 1 << 20):
        monkeypatch.setattr(logit_tiles, "LEAST_WORKSPACE", least)
        with emulated() as log, pyfast.using("triton"):
            loss = pyfast.linear_cross_entropy(x, weight, target)
        torch.testing.assert_close(loss, reference.linear_cross_entropy(x, weight, target))
        launches.append(len(log))
    assert launches[0] + 1 == launches[1]
