"""adamw_step_ in CUDA C++: dtypes, masters, numbers on the GPU, many tensors, shared memory."""

import itertools

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import testing
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import emulated

pytestmark = needs_emulator

F, B, D = torch.float32, torch.bfloat16, torch.float64
MIXED = [(F, F, F, 40), (B, B, B, 16500), (B, F, F, 33), (torch.float16, F, F, 5), (D, D, D, 7)]
MIXED += [(B, F, B, 9), (B, B, F, 9), (B, B, B, 31)]


@pytest.fixture
def on_cuda():
    with emulated() as log, pyfast.using("cuda"):
        yield log


def adamw_lists(kinds: list[tuple]) -> dict[str, list[Tensor]]:
    """Parameters of (dtype, dtype of gradient, of moments, size)."""
    make = testing.Maker(torch.float32)
    lists: dict[str, list[Tensor]] = {n: [] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    for param, grad, moment, size in kinds:
        lists["params"].append(make.normal(size).to(param))
        lists["grads"].append(make.normal(size, scale=0.1).to(grad))
        lists["exp_avgs"].append(make.normal(size, scale=0.1).to(moment))
        lists["exp_avg_sqs"].append(make.normal(size, scale=0.1).square().to(moment))
    return lists


def assert_like(states: list[list[Tensor]]) -> None:
    for our, their in zip(*states, strict=True):
        error = max(4 * torch.finfo(our.dtype).eps, 2e-6)  # the reference's norm is of float32
        assert our.dtype == their.dtype
        assert torch.allclose(our, their, rtol=error, atol=error * float(their.abs().max()))


@pytest.mark.parametrize("on_host", ["hyper", ""], ids=["numbers on the host", "on the gpu"])
def test_adamw_steps_parameters_of_all_dtypes(on_host) -> None:
    """16500: more than a chunk. float64 has a launch of its own; masters for the last too."""
    settings = {"step": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    settings |= {"lr": [1e-1, 1e-2, 1e-3, 1e-2, 1e-1, 1e-1, 1e-2, 1e-2]}
    settings |= {"weight_decay": 0.1, "max_norm": 1.0, "grad_scale": 0.5}
    states = []
    for function in (pyfast.adamw_step_, pyfast.reference.adamw_step_):
        lists = adamw_lists(MIXED)
        masters = [p.float() if i in (1, 2, 7) else None for i, p in enumerate(lists["params"])]
        peaks = [v.clone() * 0.9 for v in lists["exp_avg_sqs"]]
        with emulated(on_host=on_host) as log, pyfast.using("cuda"):
            norm = function(**lists, **settings, masters=masters, max_exp_avg_sqs=peaks)
        if function is pyfast.adamw_step_:
            names = [launch.name for launch in log]
        kept = [m for m in masters if m is not None]
        states.append([norm, *itertools.chain(*lists.values()), *peaks, *kept])
    assert_like(states)
    wanted = [*["adamw_norm_kernel"] * 2, "adamw_final_kernel", *["adamw_update_kernel"] * 2]
    if not on_host:
        wanted.insert(0, "adamw_numbers_kernel")
    assert [*dict.fromkeys(names)] == [*dict.fromkeys(wanted)]


def test_adamw_takes_any_number_of_tensors(on_cuda) -> None:
    """230 are one more launch than the 224 that an argument can name; empty ones between them."""
    kinds = [(F, F, F, 0 if i % 50 == 7 else 3) for i in range(235)]
    states = []
    for function in (pyfast.adamw_step_, pyfast.reference.adamw_step_):
        lists = adamw_lists(kinds)
        norm = function(**lists, step=3, max_norm=0.1)
        states.append([norm, *(t for t in itertools.chain(*lists.values()) if t.numel())])
    assert_like(states)


def test_adamw_masters_keep_what_bfloat16_would_lose(on_cuda) -> None:
    """Steps too small for bfloat16 add up in the master, whose rounding the parameter is."""
    param, grad = torch.ones(50, dtype=B), torch.ones(50, dtype=B)
    master = param.float()
    m, v = torch.zeros(50), torch.zeros(50)
    for step in range(1, 4):
        pyfast.adamw_step_(
            [param], [grad], [m], [v], step, lr=1e-3, weight_decay=0.0, masters=[master]
        )
    assert torch.allclose(master, torch.full((50,), 1 - 3e-3), rtol=1e-6)
    assert torch.equal(param, master.bfloat16())


def test_adamw_refuses_memory_written_twice(on_cuda) -> None:
    lists = adamw_lists([(F, F, F, 40), (F, F, F, 40)])
    lists["exp_avgs"][1] = lists["params"][0]
    rest = [[], [], torch.ones(2, 6, dtype=D), True, False, 1.0, 1.0]
    with pytest.raises(RuntimeError, match=r"must not share memory with"):
        torch.ops.pyfast.adamw_step_(*lists.values(), *rest)
    lists["params"][0] = torch.zeros(1).expand(40)
    lists["exp_avgs"][1] = torch.zeros(40)
    with pytest.raises(RuntimeError, match=r"params\[0\] must not overlap itself"):
        torch.ops.pyfast.adamw_step_(*lists.values(), *rest)
    assert not on_cuda


def test_adamw_of_nothing_has_norm_0(on_cuda) -> None:
    empty = [torch.empty(0)]
    assert pyfast.adamw_step_(empty, [torch.empty(0)], [torch.empty(0)], [torch.empty(0)], 1) == 0
    assert [launch.name for launch in on_cuda] == ["adamw_final_kernel"]
