"""pyfast.optim.AdamW's state: what is kept, and that it moves to and from torch.optim."""

import copy
import pickle

import pytest
import torch

from pyfast.optim import AdamW
from tests.optim_steps import assert_same, parameters, take_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("ours_first", [False, True])
def test_adamw_state_moves_both_ways_mid_training(dtype, amsgrad, ours_first):
    kinds = (AdamW, torch.optim.AdamW) if ours_first else (torch.optim.AdamW, AdamW)
    params, unbroken = parameters(dtype), parameters(dtype)
    first = kinds[0](params, lr=0.05, amsgrad=amsgrad)
    take_steps(first, params, 0, 5)
    second = kinds[1](params, lr=1.0)  # the loaded state brings its own settings
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, params, 5, 5)
    take_steps(torch.optim.AdamW(unbroken, lr=0.05, amsgrad=amsgrad), unbroken, 0, 10)
    assert_same(params, unbroken, rtol=1e-5, atol=1e-6)
    assert {s["step"].item() for s in second.state_dict()["state"].values()} == {10.0}


def test_adamw_loads_adams_state_as_adam():
    params, unbroken = parameters(), parameters()
    first = torch.optim.Adam(params, lr=0.05, weight_decay=0.1)
    take_steps(first, params, 0, 3)
    second = AdamW(params)
    second.load_state_dict(first.state_dict())
    take_steps(second, params, 3, 3)
    take_steps(torch.optim.Adam(unbroken, lr=0.05, weight_decay=0.1), unbroken, 0, 6)
    assert_same(params, unbroken)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.pop("exp_avg"), r"state must have step, exp_avg and exp_avg_sq; got step,"),
        (
            lambda s: s.update(exp_avg=torch.ones(3)),
            r"exp_avg must be \[17, 5\] as its .* got \[3\]",
        ),
    ],
)
def test_adamw_refuses_state_of_another_optimizer(change, sentence):
    params = parameters()
    first, second = AdamW(params), AdamW(params)
    take_steps(first, params, 0, 1)
    saved = copy.deepcopy(first.state_dict())
    change(saved["state"][0])
    with pytest.raises(ValueError, match=f"AdamW: {sentence}"):
        second.load_state_dict(saved)
    assert not second.state


def test_adamw_state_dict_has_torchs_names():
    ours, theirs = parameters(), parameters()
    states = []
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, amsgrad=True)
        take_steps(optimizer, params, 0, 1)
        states.append(optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for i, state in states[0]["state"].items():
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in states[1]["state"][i].items()
        }


def test_adamw_does_not_share_loaded_state():
    params, others = parameters(), parameters()
    first, second = AdamW(params), AdamW(others)
    take_steps(first, params, 0, 2)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict()["state"])
    take_steps(second, others, 2, 2)
    after = first.state_dict()["state"]
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_adamw_survives_copying(copied):
    params = parameters()
    optimizer = AdamW(params, max_norm=0.5, grad_scale=0.25)
    take_steps(optimizer, params, 0, 2)
    twin = copied(optimizer)
    clones = [p for group in twin.param_groups for p in group["params"]]
    take_steps(optimizer, params, 2, 2)
    take_steps(twin, clones, 2, 2)
    assert_same(params, clones, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_masters_follow_float32(dtype):
    narrow, wide = (
        parameters(dtype),
        [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype)],
    )
    ours, theirs = AdamW(narrow, lr=1e-4), torch.optim.AdamW(wide, lr=1e-4)
    for step in range(20):  # steps of 1e-4 vanish in bfloat16 without a master
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(narrow, wide, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(dtype)
            other.grad = mine.grad.float()
        ours.step()
        theirs.step()
    for mine, other in zip(narrow, wide, strict=True):
        state = ours.state[mine]
        torch.testing.assert_close(state["master"], other.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(mine.detach(), state["master"].to(dtype))
        assert state["exp_avg"].dtype == torch.float32


def test_adamw_masters_survive_the_state_dict_exactly():
    params, unbroken = parameters(torch.bfloat16), parameters(torch.bfloat16)
    first = AdamW(params, lr=1e-3)
    take_steps(first, params, 0, 3)
    second = AdamW(params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, params, 3, 3)
    take_steps(AdamW(unbroken, lr=1e-3), unbroken, 0, 6)
    assert_same(params, unbroken, rtol=0, atol=0)


def test_adamw_takes_torchs_bfloat16_state_and_gives_it_back():
    params = parameters(torch.bfloat16)
    first = torch.optim.AdamW(params, lr=1e-3)
    take_steps(first, params, 0, 3)
    second = AdamW(params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = [p.detach().float() for p in params]
    take_steps(second, params, 3, 1)
    state = second.state[params[0]]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    assert float((state["master"] - before[0]).abs().max()) < 3e-3  # one step from where it was
    third = torch.optim.AdamW(params)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    take_steps(third, params, 4, 1)
    assert all(bool(p.isfinite().all()) for p in params)


def test_adamw_without_masters_keeps_torchs_state():
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, masters=False)
    take_steps(optimizer, params, 0, 2)
    state = optimizer.state[params[0]]
    assert "master" not in state and state["exp_avg"].dtype == torch.bfloat16
