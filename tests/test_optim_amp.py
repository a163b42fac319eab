"""pyfast.optim.AdamW under torch.amp.GradScaler, with and without what fused=True promises."""

import pytest
import torch

import pyfast
from pyfast import optim_amp
from pyfast.optim import AdamW
from tests.optim_steps import assert_same, parameters

FACTORS = (1.0, float("inf"), 2.0, float("nan"), 0.5)  # a loss that is no number is skipped


def train(optimizer, params, prepare=lambda scaler, optimizer: None) -> list[float]:
    """A step for each of FACTORS; the scale after each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scales = []
    for factor in FACTORS:
        optimizer.zero_grad()
        scaler.scale(sum((factor * p**2).sum() for p in params)).backward()
        prepare(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("fused", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.float16)],  # torch unscales no
    ids=str,  # float16 outside of a fused optimizer
)
def test_adamw_steps_under_a_scaler_as_torch_fused(backend, fused, dtype) -> None:
    """Skipped steps do not count: the correction of the bias would show them."""
    ours, theirs = parameters(dtype), parameters(dtype)
    with pyfast.using(backend):
        optimizer = AdamW(ours, lr=0.1, fused=fused, masters=False)
        scales = train(optimizer, ours)
    assert scales == train(torch.optim.AdamW(theirs, lr=0.1, fused=True), theirs)
    assert_same(ours, theirs)
    steps = [optimizer.state[p]["step"] for p in ours]
    assert steps == [3.0] * len(ours)
    assert optimizer.state_dict()["state"][0]["step"] == 3.0


def test_adamw_gives_the_scaler_no_reason_to_wait(monkeypatch) -> None:
    """The scaler itself asks for the flag of an optimizer that does not look at it."""
    asked = []
    real = torch.amp.GradScaler._maybe_opt_step
    monkeypatch.setattr(
        torch.amp.GradScaler, "_maybe_opt_step", lambda *a, **k: (asked.append(1), real(*a, **k))[1]
    )
    for fused, times in ((True, 0), (None, len(FACTORS))):
        asked.clear()
        params = parameters()
        train(AdamW(params, fused=fused), params)
        assert len(asked) == times


def test_adamw_unscales_once() -> None:
    """Where the user has unscaled, the step does not; clipping sees gradients as they are."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdamW(ours, lr=0.1, eps=1.0, fused=True)  # a large eps shows the scale
    train(optimizer, ours, lambda scaler, optimizer: scaler.unscale_(optimizer))
    train(torch.optim.AdamW(theirs, lr=0.1, eps=1.0, fused=True), theirs)
    assert_same(ours, theirs)
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    train(AdamW(ours, lr=0.1, eps=1.0, fused=True, max_norm=0.5), ours)

    def clip(scaler, optimizer) -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)

    train(torch.optim.AdamW(theirs, lr=0.1, eps=1.0), theirs, clip)
    assert_same(ours, theirs)


@pytest.mark.parametrize("unscales", [True, False])
def test_adamw_keeps_its_own_factor_beside_the_scale(unscales) -> None:
    """GradScaler assigns and deletes `grad_scale`, which users assign, too."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdamW(ours, lr=0.1, eps=1.0, fused=True, grad_scale=0.25)

    def unscale(scaler, optimizer) -> None:
        if unscales:
            scaler.unscale_(optimizer)

    train(optimizer, ours, unscale)
    assert optimizer.grad_scale == 0.25 and optimizer.found_inf is None

    def quarter(scaler, optimizer) -> None:
        scaler.unscale_(optimizer)
        for p in theirs:
            p.grad *= 0.25

    train(torch.optim.AdamW(theirs, lr=0.1, eps=1.0), theirs, quarter)
    assert_same(ours, theirs)
    if unscales:  # the gradients still are what the step saw
        norm = 0.25 * torch.nn.utils.get_total_norm([p.grad for p in ours])
        torch.testing.assert_close(optimizer.grad_norm, norm)


def test_adamw_of_several_calls_skips_all_of_them() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
        train(kind(groups, lr=0.1, fused=True), params)
    assert_same(ours, theirs)


def test_gradients_are_divided_where_they_are() -> None:
    """What is done on a GPU, where nobody may look at the scale."""
    grads = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones((), dtype=torch.double)]
    optim_amp.divide(grads, torch.tensor([8.0]))
    assert all(torch.equal(grad, torch.full_like(grad, 0.125)) for grad in grads)


def test_a_step_skipped_on_a_gpu_is_taken_back_later() -> None:
    """`settle` waits for the event first; stood in for here."""
    waited, steps, skipped = [], torch.tensor([3.0, 5.0]), optim_amp.SkippedSteps()
    event = type("Event", (), {"synchronize": lambda self: waited.append(1)})()
    skipped._open += [(steps, torch.tensor(2.0), event), (steps, torch.tensor(0.0), event)]
    skipped.settle()
    skipped.settle()
    assert steps.tolist() == [2.0, 4.0] and len(waited) == 2
