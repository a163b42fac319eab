"""pyfast.optim.AdamW against torch.optim's, step for step and state for state."""

import pytest
import torch

import pyfast
from pyfast import optim_plan
from pyfast.optim import AdamW
from tests.optim_steps import assert_same, parameters, take_steps

SETTINGS = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    {"amsgrad": True},
    {"maximize": True},
    {"betas": (0.0, 0.0), "weight_decay": 0.0},
    {"lr": torch.tensor(0.05, dtype=torch.float64)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_steps_as_torch(settings, decoupled):
    ours, theirs = parameters(), parameters()
    twin = torch.optim.AdamW if decoupled else torch.optim.Adam
    decay = {} if decoupled else {"weight_decay": 0.01}
    take_steps(AdamW(ours, decoupled=decoupled, **settings), ours, 0, 7)
    take_steps(twin(theirs, **{**decay, **settings}), theirs, 0, 7)
    assert_same(ours, theirs)


def test_adamw_groups_keep_their_own_settings():
    ours, theirs = parameters(), parameters()
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [
            {"params": params[:1], "lr": 0.3},
            {"params": params[1:3], "weight_decay": 0.5, "betas": (0.5, 0.6)},
            {
                "params": params[3:],
                "amsgrad": True,
                "maximize": True,
            },  # a second call of the kernel
        ]
        take_steps(kind(groups, lr=0.01), params, 0, 4)
    assert_same(ours, theirs)


def test_adamw_is_one_call_for_all_groups(monkeypatch):
    calls, real = [], optim_plan.step_checked
    monkeypatch.setattr(
        optim_plan, "step_checked", lambda s, *a: (calls.append(len(s[0])), real(s, *a))[1]
    )
    params = parameters()
    optimizer = AdamW([{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:]}])
    take_steps(optimizer, params, 0, 3)
    assert calls == [len(params)] * 3


def test_adamw_skips_parameters_without_gradients():
    ours, theirs = parameters(), parameters()
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=0.1)
        for step in range(6):
            for i, param in enumerate(params):
                late = i == 0 and step < 2  # its own step count starts at the third step
                rare = i == 1 and step % 2
                param.grad = None if late or rare else torch.full_like(param, step - 2.5)
            optimizer.step()
    assert_same(ours, theirs)


def test_adamw_step_without_any_gradient_changes_nothing():
    params = parameters()
    optimizer = AdamW(params)
    optimizer.step()
    assert_same(params, parameters(), rtol=0, atol=0)
    assert float(optimizer.grad_norm) == 0.0


@pytest.mark.parametrize("mixed", [False, True])  # groups that need two calls share one norm
def test_adamw_clips_and_scales_as_torch(mixed):
    ours, theirs = parameters(), parameters()
    extra = {"maximize": True} if mixed else {}
    optimizers = []
    for kind, params, own in (
        (AdamW, ours, {"max_norm": 0.7, "grad_scale": 0.5}),
        (torch.optim.AdamW, theirs, {}),
    ):
        groups = [{"params": params[:2]}, {"params": params[2:], **extra}]
        optimizers.append(kind(groups, lr=0.1, eps=1.0, **own))  # a large eps shows the scale
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            other.grad = mine.grad * 0.5
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        optimizers[0].step()
        optimizers[1].step()
        assert float(norm) > 0.7
        torch.testing.assert_close(optimizers[0].grad_norm, norm.float())
    assert_same(ours, theirs)


def test_adamw_takes_mixed_dtypes_and_strided_gradients():
    def mixed():
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
        pairs = zip(parameters(), dtypes, strict=True)
        return [torch.nn.Parameter(param.detach().to(dtype)) for param, dtype in pairs]

    ours, theirs = mixed(), mixed()
    optimizers = AdamW(ours, masters=False), torch.optim.AdamW(theirs)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        for param in params:
            param.grad = torch.ones_like(param)
        params[0].grad = torch.linspace(-1, 1, 85).reshape(5, 17).t()  # strided
        params[3].grad = torch.ones(()).expand(2, 3, 4)  # one number behind 24
        optimizer.step()
    assert_same(ours, theirs)


def test_adamw_follows_lr_schedulers():
    ours, theirs = parameters(), parameters()
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=0.1)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [3])
        for step in range(8):
            take_steps(optimizer, params, step, 1)
            schedule.step()
    assert_same(ours, theirs)


def test_adamw_closure_and_zero_grad():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamW([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 5.0 and losses[-1] < 1.0
    torch.testing.assert_close(optimizer.grad_norm, param.grad.norm())


def test_adamw_works_with_a_grad_scaler():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=0.1, fused=kind is AdamW or None)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, float("inf"), 2.0):  # the step with infinite gradients is skipped
            optimizer.zero_grad()
            scaler.scale(sum((factor * p**2).sum() for p in params)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"lr": float("nan")}, r"AdamW: lr must be a finite number >= 0; got nan"),
        ({"lr": -1.0}, r"lr must be .*; got -1.0"),
        ({"lr": float("inf")}, r"lr must be .*; got inf"),
        ({"eps": -1e-8}, r"eps must be .*; got -1e-08"),
        ({"weight_decay": float("nan")}, r"weight_decay must be .*; got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\); got \(0.9, 1.0\)"),
        ({"betas": (float("nan"), 0.9)}, r"betas must be"),
        ({"betas": (0.9,)}, r"betas must be"),
        ({"max_norm": 0.0}, r"max_norm must be a finite number > 0 or None; got 0.0"),
        ({"grad_scale": float("nan")}, r"grad_scale must be a finite number; got nan"),
        ({"learning_rate": 0.1}, r"AdamW: arguments must be .*; got 'learning_rate'"),
        ({"capturable": True}, r"capturable must be False; got True"),
        ({"differentiable": True}, r"differentiable must be False; got True"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_adamw_refuses_bad_settings(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdamW(parameters(), **arguments)


def test_adamw_refuses_bad_settings_of_a_group_and_later():
    params = parameters()
    with pytest.raises(ValueError, match=r"lr must be .*; got -2"):
        AdamW([{"params": params, "lr": -2}])
    optimizer = AdamW(params[:2])
    with pytest.raises(ValueError, match="eps must be"):
        optimizer.add_param_group({"params": params[2:], "eps": float("nan")})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["lr"] = float("nan")  # as a broken schedule would
    with pytest.raises(ValueError, match="lr must be"):
        take_steps(optimizer, params, 0, 1)
    assert_same(params, parameters(), rtol=0, atol=0)


def test_adamw_refuses_sparse_gradients_and_complex_parameters():
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match="AdamW: grad must be dense; got a sparse gradient"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    with pytest.raises(ValueError, match=r"real floating point; got torch.complex64"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_adamw_tells_in_words_of_a_gradient_that_does_not_fit_any_more():
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = AdamW([param])
    param.grad = torch.ones(3, 2)
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"adamw_step_: grads\[0\] must be dense; got"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


def test_adamw_new_group_joins_mid_training():
    ours, theirs = parameters(), parameters()
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params[:2], lr=0.1)
        take_steps(optimizer, params[:2], 0, 2)
        optimizer.add_param_group({"params": params[2:], "lr": 0.2})
        take_steps(optimizer, params, 2, 2)
    assert_same(ours, theirs)


def test_adamw_notices_a_flag_that_changes_mid_training():
    ours, theirs = parameters(), parameters()
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=0.1)
        take_steps(optimizer, params, 0, 2)
        optimizer.param_groups[0]["maximize"] = True
        take_steps(optimizer, params, 2, 2)
    assert_same(ours, theirs)


def test_adamw_reference_lets_a_broken_norm_show():
    """As the kernels and torch do: a NaN gradient with clipping must not pass for a quiet step."""
    with pyfast.using("torch"):
        params, states = [torch.ones(3)], [[torch.zeros(3)] for _ in range(2)]
        grads = [torch.tensor([1.0, float("nan"), 1.0])]
        norm = pyfast.adamw_step_(params, grads, *states, 1, max_norm=1.0)
    assert norm.isnan() and params[0].isnan().all()
