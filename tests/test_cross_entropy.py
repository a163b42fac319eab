"""What cross_entropy promises beyond the cases of tests/test_ops.py: torch's corner cases."""

import math

import pytest
import torch
import torch.nn.functional as F

import pyfast
from pyfast import backend

INF = math.inf
LOWEST = torch.finfo(torch.float32).min


def loss_and_grad(function, logits, target, **settings):
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **settings)
    return loss, *torch.autograd.grad(loss.sum(), logits)


def assert_as_torch(logits, target, **settings):
    ours = loss_and_grad(pyfast.cross_entropy, logits, target, **settings)
    theirs = loss_and_grad(F.cross_entropy, logits, target, **settings)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_ignored_rows_only_is_nan(smoothing, weighted):
    weight = torch.rand(5) if weighted else None
    target = torch.full((3,), -100)
    assert_as_torch(torch.randn(3, 5), target, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_an_empty_batch_is_torchs(reduction):
    target = torch.zeros(0, dtype=torch.int64)
    assert_as_torch(torch.randn(0, 5), target, reduction=reduction)


# 700 columns: several vectors, a block between rescalings that is not the first, and a tail
@pytest.mark.parametrize(
    "first, last",
    [(-INF, 0.0), (-INF, -INF), (INF, 0.0), (math.nan, 0.0), (LOWEST, 0.0), (LOWEST, LOWEST)],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_extreme_logits_is_torchs(first, last, smoothing):
    logits = torch.full((2, 700), first)
    logits[:, 690:] = last
    target = torch.tensor([3, 695])
    assert_as_torch(logits, target, reduction="none", label_smoothing=smoothing)


def test_cross_entropy_keeps_its_digits_far_from_zero():
    logits = torch.randn(8, 700) - 1e4  # float32 has steps of 0.001 there
    target = torch.randint(0, 700, (8,))
    ours = loss_and_grad(pyfast.cross_entropy, logits, target, label_smoothing=0.1)
    truth = loss_and_grad(F.cross_entropy, logits.double(), target, label_smoothing=0.1)
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).abs().max() < 2e-6 * true.abs().max()


@pytest.mark.parametrize("classes", [3, 700])
def test_cross_entropy_gradients_of_sure_rows_keep_their_digits(classes):
    logits = torch.randn(64, classes)
    logits[:, 0] += 20
    target = torch.zeros(64, dtype=torch.int64)
    (_, ours), (_, theirs), (_, truth) = (
        loss_and_grad(f, x, target, reduction="sum")
        for f, x in (
            (pyfast.cross_entropy, logits),
            (F.cross_entropy, logits),
            (F.cross_entropy, logits.double()),
        )
    )
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2e-7 * truth.abs().max()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :37],  # rows apart: read in place
        lambda x: x[:, ::3],  # columns apart: copied
        lambda x: x[:1].expand(9, 40),  # one row for all
        lambda x: x.t()[:9],
    ],
)
def test_cross_entropy_takes_strided_logits(view):
    logits = view(torch.randn(40, 40))[:9]
    target = torch.arange(9)
    torch.testing.assert_close(
        pyfast.cross_entropy(logits, target), F.cross_entropy(logits, target)
    )


def test_cross_entropy_reads_separated_rows_in_place():
    logits = torch.randn(64, 4096)[:, :4000]
    target = torch.randint(0, 4000, (64,))
    with torch.profiler.profile(profile_memory=True) as profile:
        pyfast.cross_entropy(logits, target)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < logits.numel() * 4 / 10


@pytest.mark.parametrize("shape", [(7,), (2, 7, 3), (2, 7, 3, 4), (0, 7, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_takes_every_shape_torch_takes(shape, reduction):
    target = torch.randint(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
    assert_as_torch(torch.randn(shape), target, reduction=reduction)


def test_cross_entropy_ignores_masked_rows():
    logits = torch.full((3, 5), math.nan)
    logits[1] = torch.randn(5)
    target = torch.tensor([-100, 2, -100])
    loss, grad = loss_and_grad(pyfast.cross_entropy, logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits[1], target[1]))
    assert grad[0].count_nonzero() == 0 and grad[2].count_nonzero() == 0


def test_cross_entropy_takes_byte_targets_and_no_other_integers():
    logits = torch.randn(3, 5)
    target = torch.tensor([0, 4, 2])
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(pyfast.cross_entropy(logits, target.to(torch.uint8)), expected)
    with pytest.raises(TypeError, match=r"target must be int64 \(or uint8\); got torch.int32"):
        pyfast.cross_entropy(logits, target.int())
    with pytest.raises(TypeError, match="class probabilities are not supported"):
        pyfast.cross_entropy(logits, torch.rand(3, 5))


def test_cross_entropy_names_the_row_of_a_bad_target():
    target = torch.tensor([1, -1, 7])
    with pytest.raises(ValueError, match=r"in \[0, V=5\) or ignore_index=-100; got -1 in row 1"):
        pyfast.cross_entropy(torch.randn(3, 5), target)


def test_cross_entropy_refuses_a_weight_that_wants_a_gradient():
    weight = torch.rand(5, requires_grad=True)
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        pyfast.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), weight)


def test_cross_entropy_loss_has_the_dtype_asked_for():
    logits = torch.randn(4, 300).bfloat16()
    target = torch.randint(0, 300, (4,))
    assert pyfast.cross_entropy(logits, target).dtype == torch.bfloat16
    wide = pyfast.cross_entropy(logits, target, dtype=torch.float32)
    torch.testing.assert_close(wide, F.cross_entropy(logits.float(), target))
    with torch.autocast("cpu", torch.bfloat16):
        assert pyfast.cross_entropy(logits, target).dtype == torch.float32


# Around the widths of vectors, and of what is taken in lanes; several pieces of rows, and a rest.
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 33, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_few_classes_is_exact(classes, weighted):
    logits, target = 3 * torch.randn(2049, classes), torch.randint(classes, (2049,))
    target[::7] = -100
    logits[::7] = math.nan
    settings = {"weight": torch.rand(classes) + 0.1, "label_smoothing": 0.1} if weighted else {}
    ours = loss_and_grad(pyfast.cross_entropy, logits, target, **settings)
    settings |= {"weight": settings["weight"].double()} if weighted else {}
    truth = loss_and_grad(F.cross_entropy, logits.double().nan_to_num(), target, **settings)
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).abs().max() <= 2e-6 * true.abs().max() + 1e-9


@pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")
def test_cross_entropy_is_the_same_for_any_number_of_threads():
    logits, target = torch.randn(33, 3000), torch.randint(0, 3000, (33,))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(loss_and_grad(pyfast.cross_entropy, logits, target, label_smoothing=0.1))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
