"""Train the same small GPT with pyfast and with plain torch in one run: loss curves and step times.

    python -m bench.train --steps 20

All contestants start from the same weights (numbers that bfloat16 holds exactly), see the same
batches and take turns step by step. Plain torch is given its quickest way: fused AdamW, and in
bfloat16 the faster of 16-bit parameters with float32 masters and of autocast. Our loss curve must
be as near the float64 one as torch's own, by the rule of the tests; the exit status tells. The last
line is one JSON object.
"""

import argparse
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.plain_gpt import PlainGPT
from bench.timing import Timing, interleave, ratio
from pyfast import backend, models
from pyfast.optim import AdamW
from pyfast.train import ModelConfig, OptimConfig

LEARNING_RATE = 3e-4  # the schedule's peak without its warm-up would amplify rounding errors
WARMUP = 3  # steps that count for the loss curve, not for the times
OURS = "pyfast"
Batch = tuple[Tensor, Tensor]


class Trainer:
    """One contestant: a model, its optimizer, and the losses so far."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], update: Callable[[], object]):
        self.loss, self.update = loss, update
        self.losses: list[float] = []

    def step(self, batches: list[Batch]) -> None:
        loss = self.loss(*batches[len(self.losses)])
        loss.backward()
        self.update()
        self.losses.append(loss.item())


def ours(config: models.GPTConfig, state: dict[str, Tensor], dtype: torch.dtype) -> Trainer:
    """pyfast's GPT and AdamW; 16-bit parameters keep float32 masters inside the optimizer."""
    model = models.build(config)
    model.load_state_dict(state)
    model.to(dtype)
    optim = OptimConfig()
    optimizer = AdamW(model.parameters(), **_adamw(optim), max_norm=optim.max_norm)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(model.loss, update)


def plain(
    config: models.GPTConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
) -> Trainer:
    """Plain torch in `dtype` or under autocast; 16-bit parameters copy float32 masters."""
    model = PlainGPT(
        vocab=config.vocab_size,
        positions=config.n_positions,
        width=config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        eps=config.layer_norm_epsilon,
    ).to(dtype)
    model.copy_weights(state)
    parameters = list(model.parameters())
    has_masters = dtype.itemsize == 2
    masters = [p.detach().float() for p in parameters] if has_masters else parameters
    optim = OptimConfig()
    optimizer = torch.optim.AdamW(masters, **_adamw(optim), fused=True)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return model.loss(tokens, targets)

    def update() -> None:
        if has_masters:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if has_masters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)

    return Trainer(loss, update)


def _adamw(optim: OptimConfig) -> dict[str, object]:
    betas = (optim.beta1, optim.beta2)
    return {
        "lr": LEARNING_RATE,
        "betas": betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }


def text_batches(steps: int, batch: int, length: int, vocab: int) -> list[Batch]:
    """Batches of real text: words of Python's standard library, the most frequent ones numbered."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    words: list[str] = []
    for path in sorted(folder.glob("*.py")):
        words += re.findall(r"\w+|\s+|[^\w\s]", path.read_text(errors="replace"))
        if len(words) > 1_000_000:
            break
    ids = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocab - 1), 1)}
    stream = torch.tensor([ids.get(word, 0) for word in words])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(stream) - length - 1, (steps, batch), generator=generator)
    rows = stream[starts[..., None] + torch.arange(length + 1)]  # [steps, B, T + 1]
    return [(block[:, :-1].contiguous(), block[:, 1:].contiguous()) for block in rows]


def compare(
    contestants: dict[str, Trainer], twin: str, truth: list[float], batches: list[Batch]
) -> dict[str, object]:
    """Train in turns; times, losses, and whether ours are as near the truth as those of `twin`."""
    runs = {name: lambda t=trainer: t.step(batches) for name, trainer in contestants.items()}
    times = interleave(runs, rounds=len(batches) - WARMUP, warmup=WARMUP, repeat=False)
    fastest = min((n for n in times if n != OURS), key=lambda n: times[n].median)
    errors = {
        name: max(abs(a - b) for a, b in zip(trainer.losses, truth, strict=True))
        for name, trainer in contestants.items()
    }
    # The losses themselves are float32 in every contestant.
    floor = 4 * torch.finfo(torch.float32).eps * max(map(abs, truth))
    allowed = 2 * errors[twin] + floor
    return {
        "ms": {name: _milliseconds(t) for name, t in times.items()},
        "contestant": fastest,
        "ratio": [round(r, 3) for r in ratio(times[fastest], times[OURS])],
        "losses": {name: trainer.losses for name, trainer in contestants.items()},
        "error": errors,
        "allowed_error": allowed,
        "agree": errors[OURS] <= allowed,
    }


def _milliseconds(timing: Timing) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    return [round(1e3 * s, 2) for s in (timing.median, *timing.quartiles)]


def report(dtype: str, result: dict, truth: list[float], tokens: int) -> None:
    """The tables for people."""
    names = list(result["losses"])
    width = max(12, *map(len, names)) + 2
    print(f"\n{dtype}\n{'step':>4}{'float64':>12}" + "".join(f"{n:>{width}}" for n in names))
    for i, exact in enumerate(truth):
        row = "".join(f"{result['losses'][n][i]:{width}.6f}" for n in names)
        print(f"{i:4d}{exact:12.6f}{row}")
    print("worst error     " + "".join(f"{result['error'][n]:{width}.2e}" for n in names))
    verdict = "agree" if result["agree"] else "DISAGREE"
    print(f"the curves {verdict}: allowed error {result['allowed_error']:.2e}")
    for name in names:
        median, low, high = result["ms"][name]
        speed = tokens / median * 1e3
        print(f"{name:24}{median:9.1f} ms  ({low:.1f} to {high:.1f})  {speed:9.0f} tokens/s")
    median, low, high = result["ratio"]
    print(f"{OURS} is {median:.2f}x ({low:.2f} to {high:.2f}) of {result['contestant']}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes, optim = ModelConfig(), OptimConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--batch-size", type=int, default=optim.batch_size)
    parser.add_argument("--context-length", type=int, default=sizes.context_length)
    parser.add_argument("--n-layer", type=int, default=sizes.n_layer)
    parser.add_argument("--n-head", type=int, default=sizes.n_head)
    parser.add_argument("--n-embd", type=int, default=sizes.n_embd)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.steps <= WARMUP:
        parser.error(
            f"--steps must be more than {WARMUP}, the untimed first ones; got {options.steps}"
        )
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = models.GPTConfig(
        vocab_size=options.vocab_size,
        n_positions=options.context_length,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
    )
    state = {k: v.bfloat16().float() for k, v in models.build(config).state_dict().items()}
    batches = text_batches(
        options.steps, options.batch_size, options.context_length, options.vocab_size
    )
    print(
        f"{OURS}: {backend.choose('linear_act', 'cpu').why}; torch {torch.__version__}, "
        f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    exact = plain(config, state, torch.float64)
    for _ in batches:
        exact.step(batches)
    results = {}
    for dtype in options.dtypes:
        kind = getattr(torch, dtype)
        contestants = {
            OURS: ours(config, state, kind),
            f"torch {dtype}": plain(config, state, kind),
        }
        if kind == torch.bfloat16:
            contestants["torch autocast"] = plain(config, state, torch.float32, autocast=kind)
        results[dtype] = compare(contestants, f"torch {dtype}", exact.losses, batches)
        report(dtype, results[dtype], exact.losses, batches[0][0].numel())
    print(
        json.dumps({"bench": "train", **vars(options), "float64_losses": exact.losses, **results})
    )
    sys.exit(not all(result["agree"] for result in results.values()))


if __name__ == "__main__":
    main()
