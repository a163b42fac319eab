"""Every setting of a training run: one frozen dataclass per concern, each default written once.

The command line makes its flags from these classes, the run directory stores them in `run.json`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from pyfast.train.settings import Section, option


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """What the model learns from."""

    path: str = option(
        "stdlib", 'a text file, a folder of text, or "stdlib": Python\'s own library'
    )
    tokenizer: str | None = option(
        None, "a tokenizer.json to use; by default init_from's, or one trained on the data"
    )
    vocab_size: int = option(
        4096, "tokens in a newly trained tokenizer", at_least=257, at_most=2**24
    )
    val_fraction: float = option(0.05, "share of the text kept for validation", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The network. With `init_from` the sizes come from there and those below are unused."""

    model_type: Literal["gpt2", "llama"] = option("gpt2", "architecture")
    n_layer: int = option(4, "transformer blocks", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_kv_head: int | None = option(
        None, "key/value heads (llama only); default: n_head", at_least=1
    )
    n_embd: int = option(256, "width of the residual stream", at_least=1)
    context_length: int = option(256, "tokens the model sees at once", at_least=1)
    init_from: str | None = option(None, "start from this run or Hugging Face directory")
    freeze: tuple[str, ...] = option(
        (), 'parameters that stay as they are: patterns ("transformer.h.0.*"), or "all_but_head"'
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """How one step changes the parameters: batch, AdamW, learning-rate schedule."""

    batch_size: int = option(8, "sequences in one forward pass", at_least=1)
    accumulate: int = option(1, "forward passes in one optimizer step", at_least=1)
    lr: float = option(1e-3, "peak learning rate", above=0)
    min_lr_ratio: float = option(
        0.1, "final learning rate / peak learning rate", at_least=0, at_most=1
    )
    warmup_steps: int = option(40, "steps of linear warm-up", at_least=0)
    beta1: float = option(0.9, "decay of the gradient average", at_least=0, below=1)
    beta2: float = option(0.95, "decay of the squared-gradient average", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay of the matrices", at_least=0)
    max_norm: float | None = option(1.0, "clip the global gradient norm to this", above=0)


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """How long, where, and what is kept."""

    dir: str | None = option(None, "run directory; default: the next free one under runs/")
    resume: bool = option(False, "continue from the newest whole checkpoint of the run directory")
    steps: int = option(400, "optimizer steps", at_least=1)
    max_seconds: float | None = option(
        None, "time limit: shortens `steps`, schedule included, so that the run fits", above=0
    )
    seed: int = option(
        0, "seed of the initial weights and of the batch order", at_least=0, at_most=2**63 - 1
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "dtype of the parameters; bfloat16 keeps float32 masters"
    )
    device: str = option("cpu", "torch device")
    threads: int | None = option(None, "CPU threads; default: torch's choice", at_least=1)
    log_every: int = option(10, "steps between log lines", at_least=1)
    val_every: int = option(100, "steps between validations", at_least=1)
    val_batches: int = option(16, "batches in the fixed validation set", at_least=1)
    patience: int | None = option(
        None, "stop after this many validations without a new best, and keep the best", at_least=1
    )
    save_every: int = option(100, "steps between checkpoints", at_least=1)
    keep_last: int = option(2, "checkpoints kept", at_least=1)
    progress: Literal["auto", "bar", "lines", "none"] = option(
        "auto", "a bar on a terminal, else a line every log_every steps"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def _prefix(cls) -> str:
        return ""

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Read `run.json`; ValueError when it is not a configuration."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"train: {path} must be JSON; got {error}") from None
