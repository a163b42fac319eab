"""What a run learns: a task gives the loop its model, its batches, its loss and its validation."""

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


class Task(Protocol):
    """What `fit` needs to know about a problem. Everything is fixed by the configuration."""

    name: str  # first part of a new run directory's name: "train", "classify"
    head: tuple[str, ...]  # parameter patterns that freeze=("all_but_head",) leaves learning
    fingerprint: str  # changes when the data changes; a run resumes only on the same data

    def build_model(self) -> nn.Module:
        """The float32 model at step 0, drawn from torch's generator or loaded from `init_from`."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step` on the CPU, a pure function of (seed, step).

        An optimizer step takes `accumulate` of them, so `fit` counts forward passes here.
        """

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(sum of the losses as a float32 scalar, number of losses in it)."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures on a fixed set; must hold "loss". `fit` calls it in eval mode, without grad."""

    def save_extras(self, directory: Path) -> None:
        """Write what belongs beside the weights: the tokenizer, label names."""
