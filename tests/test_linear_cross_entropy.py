"""What linear_cross_entropy promises beyond the shared cases of tests/test_ops.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import pyfast
from pyfast import backend, reference

compiled = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")
# 37 MB of float32 logits, too many to be kept whole: several chunks of rows and slabs of classes
ROWS, K, CLASSES = 470, 24, 20011
FEW_ROWS = 300  # 24 MB


def operands(dtype=torch.float32, rows=ROWS, classes=CLASSES):
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    weight = (torch.randn(classes, K) * 0.3).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[::7] = -100
    return x, weight, target


def gradients(function, x, weight, target, **settings):
    loss = function(x, weight, target, **settings)
    return loss, *torch.autograd.grad(loss.sum(), (x, weight))


@pytest.mark.parametrize("rows", [FEW_ROWS, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_of_many_classes_is_as_accurate_as_torch(dtype, rows):
    x, weight, target = operands(dtype, rows)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    ours = gradients(pyfast.linear_cross_entropy, x, weight, target)
    theirs = gradients(reference.linear_cross_entropy, x, weight, target)
    truths = gradients(reference.linear_cross_entropy, *wide, target)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        allowed = 2 * (their - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (our - truth).abs().max() <= allowed


@compiled
@pytest.mark.parametrize(
    ("dtype", "rows", "at_once"),
    [
        (torch.float32, ROWS, True),
        (torch.bfloat16, FEW_ROWS, True),
        (torch.bfloat16, ROWS, False),
        (torch.float16, FEW_ROWS, False),  # a loss scale must reach it before the rounding
    ],
)
def test_linear_cross_entropy_makes_gradients_with_the_loss_where_it_says(dtype, rows, at_once):
    x, weight, target = operands(dtype, rows)
    arguments = (None, target, None, -100, 0.0, "mean", True, True, False)
    _, _, grad_x, grad_weight, _ = torch.ops.pyfast.linear_cross_entropy(
        x.detach(), weight.detach(), *arguments
    )
    made = (grad_x.shape == x.shape, grad_weight.shape == weight.shape)
    assert made == (at_once, at_once)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_scales_its_gradients_as_backward_asks(dtype):
    x, weight, target = operands(dtype, rows=40, classes=1100)
    loss = pyfast.linear_cross_entropy(x, weight, target)
    plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    factor = torch.tensor(1 / 3, dtype=dtype)
    scaled = torch.autograd.grad(loss, (x, weight), factor)
    for one, third in zip(plain, scaled, strict=True):
        torch.testing.assert_close(third, (one.float() * factor.float()).to(dtype), rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_never_holds_the_logits(dtype):
    x, weight, target = operands(dtype, rows=2100)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(pyfast.linear_cross_entropy, x, weight, target)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    logits = x.shape[0] * CLASSES * x.element_size()
    assert largest <= max(logits / 8, 16 << 20) * 1.1


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_backward_twice_spoils_nothing(dtype):
    x, weight, target = operands(dtype, rows=40, classes=1100)
    loss = pyfast.linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(5)  # the caller's to change
    fourfold = torch.autograd.grad(4 * loss, (x, weight), retain_graph=True)  # rounds as 1 does
    last = torch.autograd.grad(loss, (x, weight))
    for once, more, again in zip(kept, fourfold, last, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(more, 4 * once)


def test_linear_cross_entropy_leaves_ignored_rows_out():
    x, weight, target = operands(rows=20, classes=50)
    with torch.no_grad():
        x[target == -100] = math.nan  # would spoil every product it enters
    loss, grad_x, grad_weight = gradients(pyfast.linear_cross_entropy, x, weight, target)
    assert loss.isfinite() and grad_weight.isfinite().all()
    assert grad_x[target == -100].count_nonzero() == 0


def test_linear_cross_entropy_without_a_counted_row():
    x, weight, target = operands(rows=3, classes=50)
    loss, *grads = gradients(pyfast.linear_cross_entropy, x, weight, target.fill_(-100))
    assert loss.isnan() and all(g.count_nonzero() == 0 for g in grads)
    empty = torch.zeros(0, K, requires_grad=True)
    loss = pyfast.linear_cross_entropy(empty, weight, target[:0], reduction="sum")
    assert loss == 0


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_takes_any_leading_dimensions(leading, reduction):
    x, weight = torch.randn(*leading, K), torch.randn(K, 70).t()  # a transposed view
    target = torch.randint(0, 70, leading)
    ours = pyfast.linear_cross_entropy(x, weight, target, reduction=reduction)
    logits = F.linear(x, weight).reshape(-1, 70)
    expected = F.cross_entropy(logits, target.reshape(-1), reduction=reduction)
    torch.testing.assert_close(ours, expected.reshape(ours.shape))
    assert ours.shape == (target.shape if reduction == "none" else ())


def test_linear_cross_entropy_scales_float16_gradients_before_rounding():
    x, weight, target = operands(torch.float16, rows=64, classes=2000)
    scale = 2.0**14  # a loss scale: gradients of about 1e-8 would round to 0 before it
    loss = pyfast.linear_cross_entropy(x, weight, target, dtype=torch.float32)
    (ours,) = torch.autograd.grad(loss * scale, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = gradients(reference.linear_cross_entropy, *wide, target)[2] * scale
    assert (ours - truth).abs().max() < 2e-3 * truth.abs().max()
    assert (ours == 0).sum() <= (truth.abs() < 2.0**-24).sum()


def test_linear_cross_entropy_ignores_minus_100_when_told_none():
    x, weight, target = operands(rows=20, classes=50)
    none = pyfast.linear_cross_entropy(x, weight, target, ignore_index=None)
    assert torch.equal(none, pyfast.linear_cross_entropy(x, weight, target))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_is_the_same_for_any_number_of_threads(dtype):
    x, weight, target = operands(dtype, rows=120, classes=3000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(pyfast.linear_cross_entropy, x, weight, target))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
