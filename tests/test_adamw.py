"""Promises of adamw_step_: torch.optim's numbers, masters, the norm, any layout, all or nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast

# A scalar, nothing, less than a vector, tails, and past one chunk (8192) of work.
SHAPES = [(), (0, 4), (3,), (70, 33), (250, 133)]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def state(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Arguments of a first step: random parameters and gradients, moments of zero."""
    lists = {name: [torch.randn(s).to(dtype) for s in shapes] for name in LISTS[:2]}
    return lists | {name: [torch.zeros(s, dtype=dtype) for s in shapes] for name in LISTS[2:]}


def copy_of(lists: dict[str, Any]) -> dict[str, Any]:
    return {k: [t if t is None else t.clone() for t in ts] for k, ts in lists.items()}


def worst(found: list[Tensor], truth: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(found, truth, strict=True) if a.numel()]
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("decoupled", "settings", "max_norm"),
    [
        (True, {}, None),
        (True, {"amsgrad": True, "maximize": True}, 5.0),
        (False, {"weight_decay": 0.1}, None),
        (False, {"amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-6}, 0.1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_step_follows_torch_for_100_steps(
    dtype: torch.dtype,
    decoupled: bool,
    settings: dict[str, Any],
    max_norm: float | None,
    threads: Any,
) -> None:
    threads(1)  # thousands of tiny calls
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours = state(dtype=dtype)
    theirs, truth = ([p.to(d).clone() for p in ours["params"]] for d in (dtype, torch.float64))
    settings = {"lr": 1e-2, "weight_decay": 0.01, **settings}
    optimizers = [kind(theirs, **settings), kind(truth, **settings)]
    settings = {k: v for k, v in settings.items() if k != "amsgrad"} | {"max_norm": max_norm}
    if optimizers[0].defaults["amsgrad"]:
        settings["max_exp_avg_sqs"] = [torch.zeros_like(p) for p in ours["params"]]
    for step in range(1, 101):
        ours["grads"] = [torch.randn(s).to(dtype) for s in SHAPES]
        for params, optimizer in zip((theirs, truth), optimizers, strict=True):
            for p, g in zip(params, ours["grads"], strict=True):
                p.grad = g.to(p.dtype, copy=True)
            limit = float("inf") if max_norm is None else max_norm
            norm = torch.nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()
        found = pyfast.adamw_step_(**ours, step=step, decoupled=decoupled, **settings)
        torch.testing.assert_close(found, norm.float())
    floor = (1e-12 if dtype == torch.float64 else 4e-7) * worst(truth, [0 * t for t in truth])
    assert worst(ours["params"], truth) <= 2 * worst(theirs, truth) + floor


@pytest.mark.parametrize("grad_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_step_keeps_the_truth_in_masters(dtype: torch.dtype, grad_dtype: str) -> None:
    narrow, wide = state(dtype=dtype), state()
    wide["params"] = [p.float() for p in narrow["params"]]
    for name in ("exp_avgs", "exp_avg_sqs"):
        narrow[name] = [t.clone() for t in wide[name]]  # float32
    masters = [p.clone() for p in wide["params"]]
    for step in (1, 2, 3):
        grads = [torch.randn(s).to(dtype) for s in SHAPES]
        wide["grads"] = [g.float() for g in grads]
        narrow["grads"] = grads if grad_dtype == "own" else wide["grads"]
        first = pyfast.adamw_step_(**narrow, step=step, masters=masters, max_norm=1.0)
        second = pyfast.adamw_step_(**wide, step=step, max_norm=1.0)
        assert torch.equal(first, second)
    for master, p, q in zip(masters, wide["params"], narrow["params"], strict=True):
        assert torch.equal(master, p) and torch.equal(q, master.to(dtype))


@pytest.mark.parametrize("moments", ["own", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_step_without_masters_rounds_once(dtype: torch.dtype, moments: str) -> None:
    narrow = state(dtype=dtype)
    wide = {name: [t.float() for t in tensors] for name, tensors in narrow.items()}
    if moments == "float32":
        for name in ("exp_avgs", "exp_avg_sqs"):
            narrow[name] = [t.float() for t in narrow[name]]
    pyfast.adamw_step_(**narrow, step=1, lr=0.1)
    pyfast.adamw_step_(**wide, step=1, lr=0.1)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(narrow[name], wide[name], strict=True):
            assert torch.equal(a, b.to(a.dtype))


def test_adamw_step_takes_mixed_dtypes_and_settings_per_parameter() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    each = [state([(40,)], dtype) for dtype in dtypes]
    together = {name: [one[name][0].clone() for one in each] for name in LISTS}
    rates, decays, steps = [1e-2, 1e-3, 0.0], [0.0, 0.1, 0.2], [1, 5, 9]
    betas = [(0.9, 0.99), (0.8, 0.9), (0.0, 0.5)]
    eps = [1e-8, 1e-6, 1e-3]
    pyfast.adamw_step_(**together, step=steps, lr=rates, weight_decay=decays, betas=betas, eps=eps)
    for i, one in enumerate(each):
        settings = {"lr": rates[i], "weight_decay": decays[i], "betas": betas[i], "eps": eps[i]}
        pyfast.adamw_step_(**one, step=steps[i], **settings)
        for name in LISTS:
            assert torch.equal(together[name][i], one[name][0])


def test_adamw_step_scales_gradients_first() -> None:
    scaled = state()
    plain = copy_of(scaled)
    plain["grads"] = [g * 0.25 for g in plain["grads"]]
    first = pyfast.adamw_step_(**scaled, step=1, grad_scale=0.25, max_norm=1.0)
    second = pyfast.adamw_step_(**plain, step=1, max_norm=1.0)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(scaled["params"], plain["params"])


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_adamw_step_returns_the_norm_of_numbers_float32_cannot_square(
    max_norm: float | None,
) -> None:
    for size in (1e-30, 1.0, 1e30):
        lists = state()
        lists["grads"] = [g * size for g in lists["grads"]]
        norm = pyfast.adamw_step_(**lists, step=1, max_norm=max_norm, grad_scale=-2.0)
        truth = 2 * torch.cat([g.double().flatten() for g in lists["grads"]]).norm()
        torch.testing.assert_close(norm, truth.float(), rtol=1e-6, atol=0)
    assert pyfast.adamw_step_([], [], [], [], 1, max_norm=max_norm) == 0


def test_adamw_step_passes_a_nan_norm_on_as_torch_does() -> None:
    lists = state([(4,), (4,)])
    lists["grads"][0][1] = torch.nan
    norm = pyfast.adamw_step_(**lists, step=1, max_norm=1.0)
    assert norm.isnan() and all(p.isnan().all() for p in lists["params"])


def test_adamw_step_gives_the_same_bits_on_any_number_of_threads(threads: Any) -> None:
    start = state([(70000,), (31,), (64, 64), (100, 1000)])
    found = []
    for count in (1, 2, 3):
        threads(count)
        lists = copy_of(start)
        norms = [pyfast.adamw_step_(**lists, step=1, max_norm=m) for m in (None, 1.0)]
        found.append(norms + lists["params"])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_adamw_step_takes_any_dense_layout() -> None:
    plain = state([(6, 10)])
    views = copy_of(plain)
    views["params"] = [plain["params"][0].t().contiguous().t()]  # columns side by side
    views["grads"] = [torch.ones(()).expand(6, 10)]
    plain["grads"] = [torch.ones(6, 10)]
    views["exp_avgs"] = [torch.zeros(12, 20)[::2, ::2]]
    views["params"][0].requires_grad_()
    pyfast.adamw_step_(**views, step=1)
    pyfast.adamw_step_(**plain, step=1)
    for name in LISTS:
        assert torch.equal(views[name][0], plain[name][0])


def test_adamw_step_takes_slices_of_one_buffer() -> None:
    lists = state([(30,), (41,)])
    flat = torch.cat(lists["params"])
    slices = lists | {"params": [flat[:30], flat[30:]]}
    pyfast.adamw_step_(**copy_of(lists) | {"params": slices["params"]}, step=1)
    pyfast.adamw_step_(**lists, step=1)
    assert torch.equal(flat, torch.cat(lists["params"]))


def test_adamw_step_tells_autograd_that_parameters_changed() -> None:
    lists = state([(4,)])
    param = lists["params"][0].requires_grad_()
    loss = (param * param).sum()
    pyfast.adamw_step_(**lists, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _wrong(change: Any, match: str, error: type = ValueError) -> Any:
    return pytest.param(change, match, error, id=match[:40])


@pytest.mark.parametrize(
    ("change", "match", "error"),
    [
        _wrong({"lr": float("nan")}, "lr must be finite and at least 0; got nan"),
        _wrong({"lr": [0.1, -1.0]}, r"lr\[1\] must be finite and at least 0; got -1.0"),
        _wrong({"lr": [0.1]}, r"lr must have one entry per parameter \(2\); got 1"),
        _wrong({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\); got 1.0"),
        _wrong({"betas": (0.9,)}, r"betas must be two numbers, or two per parameter; got \(0.9,\)"),
        _wrong({"eps": -1e-8}, "eps must be finite and at least 0; got -1e-08"),
        _wrong(
            {"weight_decay": float("inf")}, "weight_decay must be finite and at least 0; got inf"
        ),
        _wrong({"step": 0}, "step must be finite and at least 1; got 0"),
        _wrong({"max_norm": 0.0}, "max_norm must be above 0, or None; got 0.0"),
        _wrong({"max_norm": float("nan")}, "max_norm must be above 0, or None; got nan"),
        _wrong({"grad_scale": float("nan")}, "grad_scale must be a finite number; got nan"),
        _wrong({"grads": []}, r"grads must have one entry per parameter \(2\); got 0"),
        _wrong({"masters": [None]}, r"masters must have one entry per parameter \(2\); got 1"),
        _wrong(
            {"grads": [torch.ones(3), torch.ones(5)]},
            r"grads\[1\] must be \[4\] as params\[1\]; got \[5\]",
        ),
        _wrong(
            {"masters": [None, torch.ones(4)]},
            r"masters\[1\] must be None, as the parameter is not 16-bit; got torch.float32",
        ),
        _wrong(
            {"grads": [torch.ones(3), torch.ones(4).double()]},
            r"grads\[1\] must be torch.float32 beside params\[1\]; got torch.float64",
            TypeError,
        ),
        _wrong(
            {"grads": [torch.ones(3), None]},
            r"grads\[1\] must be a tensor; got NoneType",
            TypeError,
        ),
        _wrong(
            {"grads": [torch.ones(3), torch.ones(4).to_sparse()]},
            r"grads\[1\] must be dense; got torch.sparse_coo",
            TypeError,
        ),
        _wrong(
            {"grads": [torch.ones(3), torch.ones(4, device="meta")]},
            r"grads\[1\] must be on the device of params\[1\], cpu; got meta",
            RuntimeError,
        ),
    ],
)
def test_adamw_step_refuses_and_writes_nothing(change: Any, match: str, error: type) -> None:
    lists = state([(3,), (4,)])
    before = copy_of(lists)
    with pytest.raises(error, match=f"^adamw_step_: {match}$"):
        pyfast.adamw_step_(**{**lists, "step": 1, **change})
    for name in LISTS:
        assert all(torch.equal(a, b) for a, b in zip(lists[name], before[name], strict=True))


def test_adamw_step_refuses_moments_of_two_dtypes() -> None:
    lists = state([(3,)], torch.bfloat16)
    lists["exp_avgs"] = [torch.zeros(3)]
    with pytest.raises(TypeError, match=r"exp_avg_sqs\[0\] must have the dtype of exp_avgs\[0\]"):
        pyfast.adamw_step_(**lists, step=1)


@pytest.mark.parametrize(
    ("name", "other"), [("params", "params"), ("exp_avgs", "exp_avg_sqs"), ("grads", "params")]
)
def test_adamw_step_refuses_shared_memory(name: str, other: str) -> None:
    lists = state([(8,), (8,)])
    lists[name][0] = lists[other][1]
    before = copy_of(lists)
    with pytest.raises(RuntimeError, match=r"adamw_step_: .* must not share memory with"):
        pyfast.adamw_step_(**lists, step=1)
    assert all(torch.equal(a, b) for k in LISTS for a, b in zip(lists[k], before[k], strict=True))


def test_adamw_step_refuses_parameters_that_overlap_themselves() -> None:
    lists = state([(6, 4)])
    for overlapping in (torch.zeros(1, 4).expand(6, 4), torch.zeros(9).as_strided((6, 4), (1, 1))):
        lists["params"] = [overlapping]
        with pytest.raises(RuntimeError, match=r"params\[0\] must not overlap itself"):
            pyfast.adamw_step_(**lists, step=1)


def test_adamw_step_lets_gradients_share_memory() -> None:
    lists = state([(8,), (8,)])
    lists["grads"][1] = lists["grads"][0]
    plain = copy_of(lists)
    pyfast.adamw_step_(**lists, step=1)
    pyfast.adamw_step_(**plain, step=1)
    assert all(torch.equal(a, b) for a, b in zip(lists["params"], plain["params"], strict=True))
