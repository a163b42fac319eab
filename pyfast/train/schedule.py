"""The learning rate of each step, and how many steps fit a time limit."""

import math

from pyfast.train.config import OptimConfig

SLACK = 1.1  # a forecast this much over the limit is still noise, not a reason to shorten


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Linear warm-up, then half a cosine down to `lr * min_lr_ratio` at the last step.

    `step` counts from 0. The warm-up takes at most a quarter of the run, so that a short run still
    reaches its peak and its end. Formula: Loshchilov & Hutter, SGDR, 2017 (one cycle, no restart).
    """
    warmup = min(optim.warmup_steps, total_steps // 4)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def steps_that_fit(step: int, total_steps: int, seconds_left: float, step_seconds: float) -> int:
    """`total_steps`, or fewer if the steps after `step` would clearly not fit into `seconds_left`.

    The schedule is then computed with the shorter total: the learning rate still reaches its end.
    """
    if step + SLACK * seconds_left / step_seconds >= total_steps:
        return total_steps
    return step + max(int(seconds_left / step_seconds), 1)
