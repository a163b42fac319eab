"""Fair timing: contestants take turns in one run, so a slow moment of the machine hits them all."""

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.devices import CPU, Cpu

MIN_SAMPLE = 2e-3  # seconds; shorter calls are repeated until one sample lasts this long
MIN_ROUNDS = 3  # a median and quartiles want as many, whatever they cost


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: half of the samples lie between these two."""
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 3,
    repeat: bool = True,
    device: Cpu = CPU,
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Time every contestant once per round, in an order that turns round after each round.

    repeat: call a quick contestant several times per sample (not where a call changes the next).
    budget: seconds for all rounds, about; slow calls get fewer rounds and a shorter warm-up.
    """
    calls, one_round = {}, 0.0
    for name, run in contestants.items():
        last = _warm_up(run, warmup, budget / len(contestants), device)
        calls[name] = max(1, round(MIN_SAMPLE / last)) if repeat and warmup else 1
        one_round += last * calls[name]
    if one_round * rounds > budget:
        rounds = min(rounds, max(MIN_ROUNDS, int(budget / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(contestants)[:: 1 if i % 2 == 0 else -1]:
                seconds = device.seconds(contestants[name], calls[name])
                samples[name].append(seconds / calls[name])
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def once(run: Callable[[], object], device: Cpu = CPU) -> float:
    """Seconds of a single call."""
    return device.seconds(run, 1)


def ratio(baseline: Timing, ours: Timing) -> tuple[float, float, float]:
    """(median, lower and upper quartile) of baseline / ours, paired round by round; > 1: we win."""
    pairs = zip(baseline.samples, ours.samples, strict=True)
    ratios = Timing(tuple(a / b for a, b in pairs))
    return ratios.median, *ratios.quartiles


def _warm_up(run: Callable[[], object], calls: int, budget: float, device: Cpu) -> float:
    """Call `run` up to `calls` times, while the budget lasts; seconds of the last call."""
    last, spent = 0.0, 0.0
    for _ in range(calls):
        last = device.seconds(run, 1)
        spent += last
        if spent > budget:
            break
    return last
