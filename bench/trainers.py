"""The contestants of bench/train.py: the same GPT trained by pyfast and by plain torch."""

import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.memory import reset_peak, resident
from bench.plain_gpt import PlainGPT
from pyfast import models
from pyfast.models import GPTConfig
from pyfast.optim import AdamW
from pyfast.train import OptimConfig

LEARNING_RATE = 3e-4  # the schedule's peak without its warm-up would amplify rounding errors
OURS, AUTOCAST = "pyfast", "torch autocast"
Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]


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


def names(dtype: str) -> list[str]:
    """The contestants in a dtype, ours first, then torch's with the same parameters as ours."""
    return [OURS, f"torch {dtype}", *[AUTOCAST] * (dtype == "bfloat16")]


def build(name: str, config: GPTConfig, state: State, dtype: str) -> Trainer:
    """The contestant of that name with the weights of `state`."""
    kind = getattr(torch, dtype)
    if name == OURS:
        return ours(config, state, kind)
    if name == AUTOCAST:
        return plain(config, state, torch.float32, autocast=kind)
    return plain(config, state, kind)


def initial_state(config: GPTConfig) -> State:
    """Weights to start from: numbers that bfloat16 holds exactly."""
    torch.manual_seed(0)
    return {k: v.bfloat16().float() for k, v in models.build(config).state_dict().items()}


def ours(config: GPTConfig, state: State, dtype: torch.dtype) -> Trainer:
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
    config: GPTConfig, state: State, dtype: torch.dtype, autocast: torch.dtype | None = None
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


def step_flops(config: GPTConfig, batch: int, length: int) -> int:
    """FLOPs of the matrix products of one training step, forward and backward.

    6 per weight and token; attention 14 D per causal pair (two products forward, five backward).
    """
    weights = config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
    pairs = config.n_layer * batch * length * (length + 1) // 2
    return 6 * weights * batch * length + 14 * config.n_embd * pairs


def peak_of_step(
    name: str, config: GPTConfig, dtype: str, batch: int, length: int, threads: int
) -> int | None:
    """Bytes the process of one contestant holds at most during its second step.

    Weights, gradients, optimizer state and activations, beyond what it held before the model was
    built. Meant for a process of its own, where no other contestant has left pages behind.
    """
    torch.set_num_threads(threads)
    tokens = torch.randint(config.vocab_size, (batch, length))
    batches = [(tokens, tokens)] * 2
    if not reset_peak():
        return None
    before = resident()
    trainer = build(name, config, initial_state(config), dtype)
    trainer.step(batches)  # makes the optimizer's state
    reset_peak()
    trainer.step(batches)
    return resident("VmHWM") - before
