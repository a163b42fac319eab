"""Time every operation against plain torch, forward and backward, on the cases of pyfast.testing.

    python -m bench.ops [OP ...] [--dtypes float32 bfloat16] [--compile]

Contestants take turns; each row has the median times, the ratio to the quickest torch contestant
with its quartiles, and our share of two ceilings measured in the same run: a copy (memory) and a
matmul (arithmetic). Rows where we lose are printed like the others. The last line is one JSON
object.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import pyfast
from bench.cases import cases
from bench.timing import interleave, ratio
from pyfast import backend, reference
from pyfast.testing import Case, Maker

OURS = "pyfast"
Call = Callable[[], object]


def contestants(case: Case, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Functions that take the keyword arguments of the case."""
    plain = getattr(reference, case.op)
    found = {OURS: getattr(pyfast, case.op), "torch": plain}
    if case.op == "linear_cross_entropy":
        found["torch fused"] = F.linear_cross_entropy
    if case.op == "adamw_step_":
        found["torch"] = fused_adamw
    elif compiled:
        found["torch.compile"] = torch.compile(plain, dynamic=False)
    return found


def fused_adamw(**inputs: Any) -> None:
    """One step of torch's fused AdamW on the same lists, after clip_grad_norm_."""
    params, grads = inputs["params"], inputs["grads"]
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad
    if "max_norm" in inputs:
        torch.nn.utils.clip_grad_norm_(params, inputs["max_norm"])
    steps = [torch.tensor(float(inputs["step"])) for _ in params]
    beta1, beta2 = inputs.get("betas", (0.9, 0.999))
    torch._fused_adamw_(
        params,
        grads,
        inputs["exp_avgs"],
        inputs["exp_avg_sqs"],
        [],
        steps,
        amsgrad=False,
        lr=inputs.get("lr", 1e-3),
        beta1=beta1,
        beta2=beta2,
        weight_decay=inputs.get("weight_decay", 1e-2),
        eps=inputs.get("eps", 1e-8),
        maximize=False,
    )


def forward_call(function: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    def call() -> object:
        with torch.no_grad():
            return function(**inputs)

    return call


def backward_call(case: Case, function: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    """The backward alone: the graph is made once and kept."""
    live = {
        k: v.detach().clone().requires_grad_() if k in case.grads else v for k, v in inputs.items()
    }
    outputs = function(**live)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    make = Maker(torch.float32, seed=1)
    weights = [make.normal(*out.shape).to(out.dtype) for out in outputs]
    sources = [live[name] for name in case.grads]
    return lambda: torch.autograd.grad(outputs, sources, weights, retain_graph=True)


def measure(case: Case, direction: str, dtype: torch.dtype, options: argparse.Namespace) -> dict:
    """One row: what every contestant takes, and the ratio of the quickest torch one to ours."""
    inputs = case.inputs(dtype)
    calls = {
        name: forward_call(function, inputs)
        if direction == "forward"
        else backward_call(case, function, inputs)
        for name, function in contestants(case, options.compile).items()
    }
    times = interleave(calls, rounds=options.rounds)
    quickest = min((n for n in times if n != OURS), key=lambda n: times[n].median)
    part = int(direction == "backward")
    seconds = times[OURS].median
    return {
        "op": case.op,
        "case": case.name,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: round(1e3 * t.median, 4) for name, t in times.items()},
        "contestant": quickest,
        "ratio": [round(r, 3) for r in ratio(times[quickest], times[OURS])],
        "gigabytes_per_s": round(case.elements[part] * dtype.itemsize / seconds / 1e9, 2),
        "gigaflops": round(case.flops[part] / seconds / 1e9, 1),
    }


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best: GB/s of a large copy, GFLOP/s of a large matmul."""
    source = torch.ones(2**26, dtype=torch.uint8)  # 64 MB, past the caches
    target, size = torch.empty_like(source), 2048
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times = interleave({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rounds=5)
    return {
        "gigabytes_per_s": round(2 * source.numel() / times["copy"].median / 1e9, 2),
        "gigaflops": round(2 * size**3 / times["matmul"].median / 1e9, 1),
    }


def show(row: dict, ceiling: dict[str, float]) -> None:
    median, low, high = row["ratio"]
    share = [100 * row[key] / ceiling[key] for key in ("gigabytes_per_s", "gigaflops")]
    print(
        f"{row['op'] + ' ' + row['case']:48}{row['direction']:9}{row['ms'][OURS]:10.3f} ms "
        f"{row['ms'][row['contestant']]:10.3f} ms {median:6.2f}x ({low:.2f} to {high:.2f}) of "
        f"{row['contestant']:14}{share[0]:4.0f}% of copy {share[1]:4.0f}% of matmul",
        flush=True,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(backend.OPS)}")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in backend.OPS:
            parser.error(f"OP must be one of {', '.join(backend.OPS)}; got {op}")
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    rows, limits = [], {}
    why = backend.choose("linear_act", "cpu").why
    print(f"{OURS}: {why}; torch {torch.__version__}, {options.threads} threads")
    for name in options.dtypes:
        dtype = getattr(torch, name)
        limits[name] = ceilings(dtype)
        print(f"\n{name}: ceilings {limits[name]}; ours, then torch")
        for op in options.ops or backend.OPS:
            for case in cases(op):
                for direction in ("forward", "backward") if case.grads else ("forward",):
                    rows.append(measure(case, direction, dtype, options))
                    show(rows[-1], limits[name])
    print(json.dumps({"bench": "ops", "backend": why, "ceilings": limits, "rows": rows}))


if __name__ == "__main__":
    main()
