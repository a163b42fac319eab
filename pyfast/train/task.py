"""What a run learns: a task gives the loop its model, its batches, its loss and its validation."""

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pyfast import models
from pyfast.data.tokens import END_OF_TEXT, load_tokens, read_tokenizer, window_starts, windows
from pyfast.train.checkpoint import write_atomically
from pyfast.train.config import ModelConfig, TrainConfig


class Task(Protocol):
    """What `fit` needs to know about a problem. Everything is fixed by the configuration."""

    name: str  # first part of a new run directory's name: "train", "classify"
    head: tuple[str, ...]  # parameter patterns that freeze=("all_but_head",) leaves learning
    fingerprint: str  # changes when the data changes; a run resumes only on the same data

    def build_model(self) -> nn.Module:
        """The float32 model at step 0, drawn from torch's generator or loaded from `init_from`."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step` on the CPU, a pure function of (seed, step); has "tokens" [B, T].

        An optimizer step takes `accumulate` of them, so `fit` counts forward passes here.
        """

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(sum of the losses as a float32 scalar, number of losses in it)."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures on a fixed set; must hold "loss". `fit` calls it in eval mode, without grad."""

    def save_extras(self, directory: Path) -> None:
        """Write what belongs beside the weights: the tokenizer, label names."""


class LanguageModelling:
    """Predict the next token of `config.data`, with a new model or with that of `init_from`."""

    name = "train"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.context_length = config.model.context_length
        self.data = load_tokens(
            config.data.path,
            vocab_size=config.data.vocab_size,
            val_fraction=config.data.val_fraction,
            tokenizer=config.data.tokenizer or config.model.init_from,
        )
        self.tokenizer = read_tokenizer(self.data.tokenizer_file)
        self.fingerprint = self.data.fingerprint
        window_starts(len(self.data.train), self.context_length, 0, 0, 1)  # refuses too little text
        self._val_starts = self._fixed_windows()
        self.head: tuple[str, ...] = ("lm_head.weight",)  # until build_model knows better

    def build_model(self) -> nn.Module:
        """A model of `config.model`, or that of `init_from`, whose head may be its embedding."""
        if self.config.model.init_from is None:
            end = self.tokenizer.token_to_id(END_OF_TEXT)
            values = architecture(self.config.model, self.data.vocab_size, end)
            model = models.build(models.config_from_dict(values))
        else:
            model = models.load(self.config.model.init_from, dtype=torch.float32)
            self._expect_fits(model)
        self.head = tuple(n for n, p in model.named_parameters() if p is model.head_weight)
        return model

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"tokens", "targets"} int64 [batch_size, context_length]; no window twice in an epoch."""
        size = self.config.optim.batch_size
        starts = window_starts(
            len(self.data.train), self.context_length, self.config.run.seed, step * size, size
        )
        return windows(self.data.train, starts, self.context_length)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Cross entropy summed over all targets, and their number."""
        targets = batch["targets"]
        return model.loss(batch["tokens"], targets, reduction="sum"), targets.numel()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """{"loss"}: nats per token on windows spread evenly over the validation text."""
        size, total, count = self.config.optim.batch_size, 0.0, 0
        device = next(model.parameters()).device
        for first in range(0, len(self._val_starts), size):
            starts = self._val_starts[first : first + size]
            batch = windows(self.data.val, starts, self.context_length)
            loss, terms = self.loss(model, {name: t.to(device) for name, t in batch.items()})
            total, count = total + loss.item(), count + terms
        return {"loss": total / count}

    def save_extras(self, directory: Path) -> None:
        """tokenizer.json, and tokenizer_config.json for transformers."""
        write_atomically(directory / "tokenizer.json", self.data.tokenizer_file.read_bytes())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["model_max_length"] = self.context_length
        if self.tokenizer.token_to_id(END_OF_TEXT) is not None:
            settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(directory / "tokenizer_config.json", text.encode())

    def _fixed_windows(self) -> list[int]:
        length = len(self.data.val)
        found = (length - 1) // self.context_length
        if found < 1:
            raise ValueError(
                f"train: the validation text must have at least context_length + 1 = "
                f"{self.context_length + 1} tokens; got {length}; use more text, a larger "
                "data.val_fraction or a smaller model.context_length"
            )
        count = min(found, self.config.run.val_batches * self.config.optim.batch_size)
        return [found * i // count * self.context_length for i in range(count)]

    def _expect_fits(self, model: nn.Module) -> None:
        source = self.config.model.init_from
        if not hasattr(model, "head_weight"):
            raise ValueError(f"train: model.init_from must be a language model; got {source}")
        if self.data.vocab_size > model.head_weight.shape[0]:
            raise ValueError(
                f"train: data.tokenizer must have at most {model.head_weight.shape[0]} tokens, "
                f"those of {source}; got {self.data.vocab_size}"
            )
        if self.context_length > model.max_positions:
            raise ValueError(
                f"train: model.context_length must be at most {model.max_positions}, that of "
                f"{source}; got {self.context_length}"
            )


def architecture(model: ModelConfig, vocab_size: int, end_of_text: int | None) -> dict:
    """The config.json of a new model."""
    end_ids = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    if model.model_type == "gpt2":
        if model.n_kv_head is not None:
            raise ValueError(
                f"train: model.n_kv_head must be unset for gpt2; got {model.n_kv_head}"
            )
        return {
            "model_type": "gpt2",
            "vocab_size": vocab_size,
            "n_positions": model.context_length,
            "n_embd": model.n_embd,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            **end_ids,
        }
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.n_embd,
        # 8/3 of the width gives the gated MLP the parameters of a plain one (Shazeer, 2020)
        "intermediate_size": -(-8 * model.n_embd // (3 * 32)) * 32,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_kv_head,
        "max_position_embeddings": model.context_length,
        "tie_word_embeddings": True,
        **end_ids,
    }
