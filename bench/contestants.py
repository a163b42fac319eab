"""Who takes part: each operation by ours and by plain torch's ways, bound to one case's inputs.

Names of torch's contestants: `eager`, the plain functions (for attention that is torch's own fused
`F.scaled_dot_product_attention`); `compile`, `torch.compile` of the same; `fused`, torch's own
fused AdamW; `chunked ...`, `F.linear_cross_entropy` with its chunking options. On a GPU ours stand
there by backend too, and beside them torch's ways by name and other libraries (bench/others.py).
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast
from bench import others
from bench.devices import CPU, Cpu, Within
from pyfast import reference
from pyfast.testing import Case, Maker
from pyfast.tolerance import call as outputs_of

COMPILE = "compile"
FORWARD, TRAINING, STEP = "forward", "forward+backward", "step"
ADAM_STATE = ("params", "exp_avgs", "exp_avg_sqs")
ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize")
Call = Callable[[], list[tuple[str, Tensor]]]  # returns what it computed, with names
Binder = Callable[[dict[str, Any], str], Call]  # (inputs of the case, direction) -> what is timed


def directions(case: Case) -> tuple[str, ...]:
    """What is timed of a case; an optimizer has one direction only."""
    return (FORWARD, TRAINING) if case.grads else (STEP,)


def contestants(
    case: Case, *, compile: bool = False, chunkings: bool = True, device: Cpu = CPU
) -> dict[str, Binder]:
    """Contestants by name, ours first and `compile` last.

    chunkings: torch's chunked ways too, which take minutes on a CPU.
    """
    found = {name: _ours(case, context) for name, context in device.ways().items()}
    if not case.grads:
        found["eager"] = lambda inputs, _: torch_adamw(inputs, foreach=True)
        found["fused"] = lambda inputs, _: torch_adamw(inputs, fused=True)
    else:
        functions = {"eager": getattr(reference, case.op)}
        if case.op == "linear_cross_entropy" and chunkings:
            functions |= _chunked()
        functions |= others.functions(case, device)
        found |= {
            name: lambda inputs, direction, f=function: bind(case, f, inputs, direction)
            for name, function in functions.items()
        }
    return found | ({COMPILE: lambda *bound: _compiled(case, *bound)} if compile else {})


def _ours(case: Case, context: Callable[[], Any] | None) -> Binder:
    """Ours, by the backend that the context chooses."""

    def binder(inputs: dict[str, Any], direction: str) -> Call:
        if case.grads:
            call = bind(case, getattr(pyfast, case.op), inputs, direction)
        else:
            call = our_adamw(inputs)
        return call if context is None else Within(context, call)

    return binder


def _compiled(case: Case, inputs: dict[str, Any], direction: str) -> Call:
    """It compiles when first called."""
    torch._dynamo.reset()  # or the compiled forms of one function soon reach torch's limit
    if direction == STEP:
        return torch_adamw(inputs, compile=True, foreach=True)
    function = torch.compile(getattr(reference, case.op), dynamic=False, fullgraph=True)
    return bind(case, function, inputs, direction)


def _chunked() -> dict[str, Callable[..., Any]]:
    """torch's linear_cross_entropy with its automatic chunking, and with two policies by name."""
    options = {"chunked": torch.nn.LinearCrossEntropyOptions()}
    for policy in ("compact", "balanced"):
        options[f"chunked {policy}"] = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
    return {
        name: lambda *, _o=option, **inputs: F.linear_cross_entropy(options=_o, **inputs)
        for name, option in options.items()
    }


def bind(case: Case, function: Callable[..., Any], inputs: dict[str, Any], direction: str) -> Call:
    """One forward without gradients, or one forward and backward with fresh gradients."""
    if direction == FORWARD:

        def forward() -> list[tuple[str, Tensor]]:
            with torch.no_grad():
                return _named(outputs_of(function, inputs))

        return forward
    live = {
        k: v.detach().clone().requires_grad_() if k in case.grads else v for k, v in inputs.items()
    }
    leaves = {f"grad_{name}": live[name] for name in case.grads}
    weights: list[Tensor] = []

    def training() -> list[tuple[str, Tensor]]:
        for leaf in leaves.values():
            leaf.grad = None
        outputs = outputs_of(function, live)
        if not weights:
            weights.extend(_output_gradients(outputs))
        torch.autograd.backward(outputs, weights)
        return _named(outputs) + [(name, leaf.grad) for name, leaf in leaves.items()]

    return training


def _output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What comes from above: 1 for a loss, as in training; else the same random values for all."""
    make = Maker(torch.float32, seed=1)
    return [
        (make.normal(*out.shape) if out.dim() else torch.ones(())).to(out.device, out.dtype)
        for out in outputs
    ]


def _named(outputs: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    return [(f"output {i}", out.detach()) for i, out in enumerate(outputs)]


def our_adamw(inputs: dict[str, Any], function: Callable[..., Any] | None = None) -> Call:
    """adamw_step_ (or another function with its arguments) on the lists of the case, in place."""
    step = function or pyfast.adamw_step_

    def call() -> list[tuple[str, Tensor]]:
        step(**inputs)
        return adam_values(inputs)

    return call


def torch_adamw(inputs: dict[str, Any], *, compile: bool = False, **way: bool) -> Call:
    """torch's AdamW after clip_grad_norm_ on the same lists; `way`: fused or foreach."""
    params = [p.detach().requires_grad_() for p in inputs["params"]]
    settings = {"weight_decay": 0.01}  # adamw_step_'s default, Adam's is another
    settings |= {name: inputs[name] for name in ADAM_SETTINGS if name in inputs}
    optimizer = torch.optim.Adam(
        params, **settings, decoupled_weight_decay=inputs.get("decoupled", True), **way
    )
    moments = zip(inputs["exp_avgs"], inputs["exp_avg_sqs"], strict=True)
    for param, grad, (mean, square) in zip(params, inputs["grads"], moments, strict=True):
        param.grad = grad
        on = param.device if way.get("fused") or compile else None  # where torch wants its steps
        done = torch.tensor(inputs["step"] - 1.0, device=on)
        optimizer.state[param] = {"step": done, "exp_avg": mean, "exp_avg_sq": square}

    def step() -> None:
        if "max_norm" in inputs:
            torch.nn.utils.clip_grad_norm_(params, inputs["max_norm"])
        optimizer.step()

    run = torch.compile(step) if compile else step

    def call() -> list[tuple[str, Tensor]]:
        run()
        return adam_values(inputs)

    return call


def adam_values(inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters and moments of the lists, with names."""
    return [(f"{key}[{i}]", t) for key in ADAM_STATE for i, t in enumerate(inputs[key])]


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with copies of the lists that an optimizer step changes."""
    lists = (*ADAM_STATE, "grads")
    return {k: [t.clone() for t in v] if k in lists else v for k, v in inputs.items()}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread if the block takes longer: for compilers."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
