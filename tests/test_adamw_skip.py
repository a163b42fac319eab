"""adamw_step_ with found_inf, as of torch.amp.GradScaler: the kernels look at it, nobody waits."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pyfast
from bench.devices import emulated, emulated_backends
from pyfast import testing

HERE = ["cpp", "torch", *emulated_backends()]
F, B = torch.float32, torch.bfloat16


def state() -> dict[str, list[Tensor]]:
    """A parameter of two chunks, a small one, and one in bfloat16."""
    make = testing.Maker(torch.float32)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    return {
        name: [make.normal(n).abs().to(t) for n, t in ((16500, F), (7, F), (33, B))]
        for name in names
    }


def copies(lists: dict[str, list[Tensor]]) -> list[Tensor]:
    return [t.clone() for t in itertools.chain(*lists.values())]


def same(lists: dict[str, list[Tensor]], others: list[Tensor]) -> bool:
    pairs = zip(itertools.chain(*lists.values()), others, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    with pyfast.using(backend) if backend in ("cpp", "torch") else emulated(backend):
        yield


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("backend", HERE)
def test_adamw_writes_nothing_where_infinity_was_found(backend, max_norm) -> None:
    """The norm is told all the same; where none was found the step is the ordinary one."""
    lists, twin = state(), state()
    before = copies(lists)
    with running(backend):
        both = torch.tensor(2.0)  # on two devices, as GradScaler adds the flags up
        skipped = pyfast.adamw_step_(**lists, step=3, max_norm=max_norm, found_inf=both)
        assert same(lists, before)
        norm = pyfast.adamw_step_(**lists, step=3, max_norm=max_norm, found_inf=torch.zeros(1))
        plain = pyfast.adamw_step_(**twin, step=3, max_norm=max_norm)
    assert norm == skipped == plain > 0
    assert same(lists, copies(twin)) and not same(lists, before)


@pytest.mark.parametrize("backend", HERE)
def test_adamw_without_a_limit_clips_nothing_by_an_infinite_norm(backend) -> None:
    lists, twin = state(), state()
    lists["grads"][1][0] = twin["grads"][1][0] = torch.inf
    with running(backend):
        norm = pyfast.adamw_step_(**lists, step=3, found_inf=torch.zeros(()))
        pyfast.adamw_step_(**twin, step=3)
    assert norm == torch.inf
    for ours, theirs in zip(lists["params"], twin["params"], strict=True):
        assert torch.equal(ours[1:], theirs[1:]) and ours[1:].isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_adamw_tells_and_clips_by_the_norm_of_its_formula(backend) -> None:
    """A length, whatever the sign of the scale; a millionth keeps a norm of 0 from dividing."""
    lists = {name: [torch.zeros(2)] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    lists["grads"] = [torch.tensor([3e-6, 4e-6])]
    with running(backend):
        norm = pyfast.adamw_step_(**lists, step=1, grad_scale=-2.0, max_norm=1e-6, betas=(0.0, 0.9))
    torch.testing.assert_close(norm, torch.tensor(1e-5))
    expected = lists["grads"][0] * -2.0 / 11
    torch.testing.assert_close(lists["exp_avgs"][0], expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", HERE)
def test_adamw_peak_does_not_hide_what_is_no_number(backend) -> None:
    lists = state()
    peaks = [torch.full_like(t, 9.0) for t in lists["exp_avg_sqs"]]
    lists["grads"][1][0] = torch.nan
    with running(backend):
        pyfast.adamw_step_(**lists, step=3, max_exp_avg_sqs=peaks)
    for t in (peaks[1], lists["params"][1]):
        assert t[0].isnan() and not t[1:].isnan().any()


def test_adamw_refuses_a_flag_that_is_none() -> None:
    lists = [[torch.ones(3)] for _ in range(4)]
    with pytest.raises(TypeError, match=r"adamw_step_: found_inf must be float32; got torch.int64"):
        pyfast.adamw_step_(*lists, 1, found_inf=torch.tensor(1))
    with pytest.raises(TypeError, match="adamw_step_: found_inf must be a tensor; got float"):
        pyfast.adamw_step_(*lists, 1, found_inf=1.0)
    with pytest.raises(ValueError, match="adamw_step_: found_inf must have one element; got"):
        pyfast.adamw_step_(*lists, 1, found_inf=torch.ones(2))


@pytest.mark.parametrize("backend", [b for b in HERE if b != "torch"])
@pytest.mark.parametrize("flag", [torch.ones(2), torch.tensor(1), torch.ones(0)], ids=str)
def test_adamw_rooms_refuse_a_flag_that_is_none(backend, flag) -> None:
    lists = state()
    hyper = torch.ones(3, 6, dtype=torch.float64)
    before = copies(lists)
    with running(backend), pytest.raises((RuntimeError, TypeError, ValueError), match="found_inf"):
        torch.ops.pyfast.adamw_step_(*lists.values(), [], [], hyper, True, False, 1.0, 1.0, flag)
    assert same(lists, before)
