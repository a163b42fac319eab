"""What every operation promises on a GPU, by every backend: `make gpu` runs these first.

`pytest --device emulator` walks through a few of them without one.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case
from tests.device_lanes import BACKENDS, Lane, check, gradients_like
from tests.run_case import each_tensor, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST = [next(case for case in testing.CASES if case.op == op) for op in backend.OPS]
# Sizes of training: many blocks at once, in the order that the hardware likes.
LARGE = [
    testing.linear_act(2048, 1024, 4096, "gelu_tanh"),
    testing.linear_act(1999, 777, 1333, "relu"),
    testing.linear_glu(1024, 1024, 2816),
    testing.cross_entropy(2048, 50257, label_smoothing=0.1),
    testing.cross_entropy(7, 262147),
    testing.linear_cross_entropy(1024, 768, 32001),
    testing.attention(2, 8, 1024, 64, causal=True),
    testing.attention(1, 8, 777, 128, kv=2, causal=True),
    testing.attention(1, 4, 1, 128, tk=4096, kv=2),
    testing.norm("layer_norm", 8192, 1023, residual=True),
    testing.norm("rms_norm", 4096, 4096),
    testing.rope(2, 16, 1024, 128),
    testing.adamw(((1000, 1000), *((64, 33),) * 500), max_norm=1.0),
]


def where(config: pytest.Config) -> str | None:
    """The lane of this run."""
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else None)


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Lane:
    name = where(request.config)
    if name is None:
        pytest.skip("needs a GPU (`make gpu`); --device emulator is a dry run")
    return Lane(name)


@pytest.fixture
def gpu(lane: Lane) -> Lane:
    if lane.name != "cuda":
        pytest.skip("needs a GPU: the emulator has no streams, graphs or real schedules")
    return lane


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Everything on a GPU; a few on the emulator, whose own tests are elsewhere."""
    name = where(metafunc.config)
    few = name != "cuda"
    choices = {
        "case": FIRST if few else testing.CASES,
        "first": FIRST[:1] if few else FIRST,
        "large": LARGE[:1] if few else LARGE,
        "dtype": DTYPES[1:2] if few else DTYPES,
        "chosen": BACKENDS[1:3] if few else BACKENDS,
    }
    if name is None:
        choices = {key: values[:1] for key, values in choices.items()}
    for key, values in choices.items():
        if key in metafunc.fixturenames:
            metafunc.parametrize(key, values, ids=str)


def misaligned(_: str, t: Tensor) -> Tensor:
    """The same values one element into a larger tensor."""
    if not t.numel() or t.dtype == torch.int64:
        return t
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


def test_device_is_as_accurate_as_torch(lane: Lane, case: Case, dtype: Any, chosen: str) -> None:
    check(lane, case, dtype, chosen)


def test_device_is_as_accurate_at_sizes_of_training(
    gpu: Lane, large: Case, dtype: Any, chosen: str
) -> None:
    check(gpu, large, dtype, chosen)


@pytest.mark.parametrize("change", [strided, misaligned], ids=["strided", "misaligned"])
def test_device_takes_any_layout(lane: Lane, first: Case, chosen: str, change: Any) -> None:
    check(lane, first, torch.bfloat16, chosen, change)


def test_device_gives_the_same_bits_every_time(lane: Lane, first: Case, chosen: str) -> None:
    with lane.using(chosen, first.op, torch.bfloat16):
        inputs = lane.put(first.inputs(torch.bfloat16))
        function = getattr(pyfast, first.op)
        once, *again = (lane.run(first, function, inputs) for _ in range(3))
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


def test_large_sums_have_the_same_bits_every_time(gpu: Lane, large: Case, chosen: str) -> None:
    test_device_gives_the_same_bits_every_time(gpu, large, chosen)


def test_device_leaves_its_inputs_alone(lane: Lane, first: Case, chosen: str) -> None:
    inputs = lane.put(first.inputs(torch.float32))
    before = each_tensor(inputs, lambda _, t: t.clone())
    leaves = [inputs[name].requires_grad_() for name in first.grads]
    with lane.using(chosen, first.op, torch.float32):
        out = getattr(pyfast, first.op)(**inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        given = gradients_like(outs)
        kept = [g.clone() for g in given]
        first_time = torch.autograd.grad(outs, leaves, given, retain_graph=True)
        second = torch.autograd.grad(outs, leaves, given)
    assert all(torch.equal(a, b) for a, b in zip(first_time, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    for name, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(value, inputs[name]), name


def forward_and_backward(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """Of leaves that are already there; nothing but the operation runs."""
    out = getattr(pyfast, case.op)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    leaves = [inputs[name] for name in case.grads]
    if not leaves:
        return [*outs, *inputs["params"]]
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])]


def ready(lane: Lane, case: Case) -> dict[str, Any]:
    inputs = lane.put(case.inputs(torch.bfloat16))
    for name in case.grads:
        inputs[name].requires_grad_()
    return inputs


def test_device_never_waits_for_the_gpu(gpu: Lane, first: Case, chosen: str) -> None:
    inputs = ready(gpu, first)
    with gpu.using(chosen, first.op, torch.bfloat16):
        if chosen == "torch":
            pytest.skip("the reference promises nothing about waiting")
        forward_and_backward(first, inputs)  # what is compiled is compiled now
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_and_backward(first, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_device_can_be_captured_into_a_graph(gpu: Lane, first: Case, chosen: str) -> None:
    if not first.grads:
        pytest.skip("its numbers come from the host; see test_step_can_be_captured")
    inputs = ready(gpu, first)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with gpu.using(chosen, first.op, torch.bfloat16):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward_and_backward(first, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            captured = forward_and_backward(first, inputs)
        with torch.no_grad():
            for name in first.grads:
                inputs[name].mul_(0.5)
        graph.replay()
        wanted = forward_and_backward(first, inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_step_can_be_captured(gpu: Lane, kernels: str) -> None:
    """Learning rate, step and skip are numbers on the GPU: a replay takes what they are then."""

    def call() -> Tensor:
        return torch.ops.pyfast.adamw_step_(*lists, [], [], hyper, True, False, 1.0, 1.0, skip)

    case = testing.cases("adamw_step_")[0]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    inputs = gpu.put(case.inputs(torch.float32))
    twin = gpu.put(case.inputs(torch.float32))
    lists = [inputs[name] for name in names]
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.01, 1.0]], dtype=torch.float64).cuda()
    hyper = hyper.repeat(len(lists[0]), 1)
    skip = torch.zeros((), device="cuda")
    with gpu.using(kernels, "adamw_step_", torch.float32):
        saved = [[t.clone() for t in some] for some in lists]
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for some, kept in zip(lists, saved, strict=True):
            torch._foreach_copy_(some, kept)
        for step in (1, 2, 3):
            hyper[:, 0], hyper[:, 5] = 1e-2 / step, step
            graph.replay()
            arguments = [twin[name] for name in names]
            pyfast.adamw_step_(*arguments, step, lr=1e-2 / step, max_norm=1.0)
        skip.fill_(1.0)
        graph.replay()
        for ours, theirs in zip(inputs["params"], twin["params"], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_device_works_on_another_stream(gpu: Lane, first: Case, chosen: str) -> None:
    inputs = ready(gpu, first) if first.grads else gpu.put(first.inputs(torch.bfloat16))
    again = ready(gpu, first) if first.grads else gpu.put(first.inputs(torch.bfloat16))
    with gpu.using(chosen, first.op, torch.bfloat16):
        wanted = forward_and_backward(first, inputs)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = forward_and_backward(first, again)
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_device_compiles_into_one_graph(gpu: Lane, first: Case, chosen: str) -> None:
    torch._dynamo.reset()
    inputs = gpu.put(first.inputs(torch.float32))
    function = getattr(pyfast, first.op)
    with gpu.using(chosen, first.op, torch.float32):
        eager = gpu.run(first, function, inputs)
        compiled = gpu.run(first, torch.compile(function, fullgraph=True), inputs)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", backend.OPS)
def test_hostile_calls_leave_the_gpu_alive(gpu: Lane, op: str) -> None:
    script = Path(__file__).with_name("hostile_calls.py")
    command = [sys.executable, script, "--device", "cuda", op]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent.parent)
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-2000:]}"
