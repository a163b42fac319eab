"""One float32 training step of a small MLP, 784-256-128-10 at batch 32: overhead is the cost."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast
from bench.contestants import COMPILE, STEP, Call
from bench.devices import CPU, OURS, Cpu, Within
from bench.rows import Job
from pyfast import nn
from pyfast.optim import AdamW

OP = "mlp_step"
WIDTHS, BATCH = (784, 256, 128, 10), 32
STILL = 0.0  # the learning rate: a thousand real steps would learn the batch, and time denormals
NAME = f"{'-'.join(map(str, WIDTHS))} batch {BATCH}"


def job(threads: int, compile: bool, device: Cpu = CPU) -> Job:
    """The measurement: ours, torch's layers with its usual and its fused AdamW, these compiled."""
    weights = sum(a * b + b for a, b in pairwise(WIDTHS))
    moved = 4 * (9 * weights + BATCH * WIDTHS[0])  # AdamW's seven passes, forward and backward
    flops = 6 * BATCH * sum(a * b for a, b in pairwise(WIDTHS)) + 15 * weights
    model = network(True, device)
    ours = step(model, pyfast.cross_entropy, AdamW(model.parameters(), lr=STILL))
    context = device.ways()[OURS]
    calls: dict[str, Call] = {OURS: ours if context is None else Within(context, ours)}
    calls |= {"eager": _torch_step(device, None), "fused": _torch_step(device, True)}
    if compile:
        torch._dynamo.reset()
        calls[COMPILE] = _torch_step(device, True, torch.compile)
    shape = f"x[{BATCH},{WIDTHS[0]}]"
    return Job(OP, NAME, STEP, "float32", shape, threads, moved, flops, calls)


def truth() -> list[tuple[str, Tensor]]:
    """Loss and gradients of the first step in float64."""
    model = network(False, CPU).double()
    return step(model, F.cross_entropy, torch.optim.AdamW(model.parameters()), torch.float64)()


def _torch_step(device: Cpu, fused: bool | None, wrap: Callable = lambda model: model) -> Call:
    model = network(False, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=STILL, fused=fused)
    return step(model, F.cross_entropy, optimizer, wrap=wrap)


def network(ours: bool, device: Cpu) -> torch.nn.Sequential:
    """The network from our layers or from torch's, with the same weights each time."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for width, after in pairwise(WIDTHS):
        hidden = after != WIDTHS[-1]
        if ours:
            layers.append(nn.Linear(width, after, act="relu" if hidden else "none"))
        else:
            layers += [torch.nn.Linear(width, after), *[torch.nn.ReLU()] * hidden]
    return torch.nn.Sequential(*layers).to(device.type)


def step(
    model: torch.nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype = torch.float32,
    wrap: Callable = lambda function: function,
) -> Call:
    """Forward, loss, backward, update, as people write it; returns the loss and its gradients."""
    generator = torch.Generator().manual_seed(1)
    on = next(model.parameters()).device
    x = torch.randn(BATCH, WIDTHS[0], generator=generator).to(on, dtype)
    target = torch.randint(WIDTHS[-1], (BATCH,), generator=generator).to(on)
    loss_of = wrap(lambda: loss_function(model(x), target))

    def call() -> list[tuple[str, Tensor]]:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return [("loss", loss.detach()), *(("grad", p.grad) for p in model.parameters())]

    return call
