"""Train the same GPT with pyfast and with plain torch in one run: loss curves and step times.

    python -m bench.train [--model small|gpt2-124m] [--steps 20] [--json FILE]

All contestants start from the same weights (numbers that bfloat16 holds exactly), see the same
batches and take turns step by step. Plain torch is given its quickest way: fused AdamW, and in
bfloat16 the faster of 16-bit parameters with float32 masters and of autocast. Our loss curve must
be as near the float64 one as torch's own, by the rule of the tests; the exit status tells. For
gpt2-124m (batch 4, 512 tokens) float64 would take too long: torch's float32 curve stands for the
truth of the bfloat16 ones; and the share of the machine's ceilings and each contestant's peak
memory (a process for each) are told as well. The last line is one JSON object.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import ceilings, machine, memory, trainers
from bench.timing import Timing, interleave, ratio
from bench.trainers import OURS, Batch, Trainer
from pyfast import models
from pyfast.train import ModelConfig, OptimConfig

_SMALL, _OPTIM = ModelConfig(), OptimConfig()
MODELS = {
    "small": {
        "steps": 20,
        "batch_size": _OPTIM.batch_size,
        "context_length": _SMALL.context_length,
        "n_layer": _SMALL.n_layer,
        "n_head": _SMALL.n_head,
        "n_embd": _SMALL.n_embd,
        "vocab_size": 4096,
    },
    "gpt2-124m": {
        "steps": 6,
        "batch_size": 4,
        "context_length": 512,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "vocab_size": 50257,
    },
}
WARMUP = {"small": 3, "gpt2-124m": 1}  # steps that count for the loss curve, not for the times
DTYPES = ("float32", "bfloat16")


def compare(
    contestants: dict[str, Trainer], truth: list[float] | None, batches: list[Batch], warmup: int
) -> dict[str, object]:
    """Train in turns; times, losses, and whether ours are as near the truth as torch's twin's.

    The twin is the second contestant. Without a truth nothing is judged: `agree` is None.
    """
    runs = {name: lambda t=trainer: t.step(batches) for name, trainer in contestants.items()}
    times = interleave(runs, rounds=len(batches) - warmup, warmup=warmup, repeat=False)
    fastest = min((n for n in times if n != OURS), key=lambda n: times[n].median)
    result = {
        "ms": {name: _milliseconds(t) for name, t in times.items()},
        "contestant": fastest,
        "ratio": [round(r, 3) for r in ratio(times[fastest], times[OURS])],
        "losses": {name: trainer.losses for name, trainer in contestants.items()},
    }
    return result | judge(result["losses"], truth, twin=list(contestants)[1])


def judge(
    losses: dict[str, list[float]], truth: list[float] | None, twin: str
) -> dict[str, object]:
    """Each curve's largest error, what ours may be, and whether it is."""
    if truth is None:
        return {"error": None, "allowed_error": None, "agree": None}
    errors = {
        name: max(abs(a - b) for a, b in zip(curve, truth, strict=True))
        for name, curve in losses.items()
    }
    # The losses themselves are float32 in every contestant.
    floor = 4 * torch.finfo(torch.float32).eps * max(map(abs, truth))
    allowed = 2 * errors[twin] + floor
    return {"error": errors, "allowed_error": allowed, "agree": errors[OURS] <= allowed}


def _milliseconds(timing: Timing) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    return [round(1e3 * s, 2) for s in (timing.median, *timing.quartiles)]


def peaks_in_mb(dtype: str, config: models.GPTConfig, options: argparse.Namespace) -> dict:
    """Peak memory of each contestant's step, each in a fresh process; MB, or None."""
    sizes = (options.batch_size, options.context_length, options.threads)
    found = {}
    for name in trainers.names(dtype):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            peak = child.submit(trainers.peak_of_step, name, config, dtype, *sizes).result()
        found[name] = None if peak is None else round(peak / 1e6, 1)
    return found


def shares(result: dict, flops: int, dtype: str, ceiling: dict) -> dict[str, dict[str, float]]:
    """Percent of the matmul ceiling and of each peak loop that every contestant reaches."""
    rates = {"matmul": ceilings.matmul_rate(ceiling, dtype)}
    rates |= {name: rate for name, rate in ceiling["peak_gflops"].items() if rate}
    return {
        name: {k: round(100 * flops / (times[0] * 1e6) / rate, 1) for k, rate in rates.items()}
        for name, times in result["ms"].items()
    }


def report(dtype: str, result: dict, truth: list[float] | None, tokens: int) -> None:
    """The tables for people."""
    names = list(result["losses"])
    width = max(12, *map(len, names)) + 2
    print(f"\n{dtype}\n{'step':>4}{'truth':>12}" + "".join(f"{n:>{width}}" for n in names))
    for i in range(len(result["losses"][OURS])):
        exact = f"{truth[i]:12.6f}" if truth else f"{'-':>12}"
        print(f"{i:4d}{exact}" + "".join(f"{result['losses'][n][i]:{width}.6f}" for n in names))
    if truth:
        print("worst error     " + "".join(f"{result['error'][n]:{width}.2e}" for n in names))
        verdict = "agree" if result["agree"] else "DISAGREE"
        print(f"the curves {verdict}: allowed error {result['allowed_error']:.2e}")
    for name in names:
        median, low, high = result["ms"][name]
        text = f"{name:24}{median:9.1f} ms  ({low:.1f} to {high:.1f})  "
        text += f"{tokens / median * 1e3:9.0f} tokens/s"
        if "shares" in result:
            text += "".join(f"  {p:.1f}% of {k}" for k, p in result["shares"][name].items())
            text += f"  peak {result['peak_mb'][name]} MB"
        print(text)
    median, low, high = result["ratio"]
    print(f"{OURS} is {median:.2f}x ({low:.2f} to {high:.2f}) of {result['contestant']}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    for name in MODELS["small"]:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help="default: that of --model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        help="percent of the ceilings, peak memory; default: with gpt2-124m",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object here too")
    options = parser.parse_args(arguments)
    for name, value in MODELS[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.limits is None:
        options.limits = options.model == "gpt2-124m"
    warmup = WARMUP[options.model]
    if options.steps <= warmup:
        parser.error(
            f"--steps must be more than {warmup}, the untimed first ones; got {options.steps}"
        )
    machine.expect_folder(parser, "--json", options.json)
    return options


def config_of(options: argparse.Namespace) -> models.GPTConfig:
    """The model that the options describe."""
    return models.GPTConfig(
        vocab_size=options.vocab_size,
        n_positions=options.context_length,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
    )


def run(options: argparse.Namespace) -> dict[str, dict]:
    """The results by dtype; the tables are printed."""
    config = config_of(options)
    sizes = (options.batch_size, options.context_length)
    batches = trainers.text_batches(options.steps, *sizes, options.vocab_size)
    limits = {}
    if options.limits:
        limits = ceilings.measure_ceilings(options.dtypes, options.threads)
        print(ceilings.sentence(limits))
    state, truth = trainers.initial_state(config), None
    if options.model == "small":
        exact = trainers.plain(config, state, torch.float64)
        for _ in batches:
            exact.step(batches)
        truth = exact.losses
    results = {}
    for dtype in options.dtypes:
        peaks = peaks_in_mb(dtype, config, options) if limits else {}
        contestants = {n: trainers.build(n, config, state, dtype) for n in trainers.names(dtype)}
        result = compare(contestants, truth, batches, WARMUP[options.model])
        if limits:
            flops = trainers.step_flops(config, *sizes)
            result["shares"] = shares(result, flops, dtype, limits)
            result["peak_mb"] = peaks
        results[dtype] = result | {"truth": truth}
        report(dtype, result, truth, sizes[0] * sizes[1])
        if truth is None:
            truth = result["losses"][f"torch {dtype}"]
    return results | ({"ceilings": limits} if limits else {})


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    memory.settle_allocator()
    told = machine.facts()
    print("\n".join(machine.headline(told)))
    results = run(options)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    machine.finish({"bench": "train", "machine": told, **settings, **results}, options.json)
    sys.exit(any(results[dtype]["agree"] is False for dtype in options.dtypes))


if __name__ == "__main__":
    main()
