"""Classification as a task for the one loop: a head on a language model that was trained before.

    fit(config, Classification(config))        # config.model.init_from names the language model

The texts are read from `config.data.path` (see `pyfast.data.labelled`) and divided into training,
validation and test parts. The test part is written into the run as `test.jsonl` and not looked at
until `pyfast evaluate`. The division does not depend on `run.seed`, so runs with different seeds
are measured on the same texts.

A language model that was pretrained on "stdlib" has read the files of the "stdlib" test part too,
though without labels. To measure on text it has never seen, pretrain on other data.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyfast
from pyfast import models
from pyfast.data import labelled
from pyfast.data.labelled import Example
from pyfast.data.tokens import END_OF_TEXT, read_tokenizer
from pyfast.train.checkpoint import write_atomically
from pyfast.train.config import DataConfig, OptimConfig, RunConfig, TrainConfig

# Where finetuning differs from pretraining. The rate is the best of 5e-4, 2e-3 and 4e-3 for a small
# pretrained GPT and for the same model from scratch alike; a large model needs a lower one.
DEFAULTS = TrainConfig(
    data=DataConfig(val_fraction=0.1),
    optim=OptimConfig(batch_size=16, lr=2e-3, warmup_steps=20, weight_decay=0.01),
    run=RunConfig(steps=300, val_every=50, save_every=50),
)
TEST_FILE = "test.jsonl"
TASK_FILE = "task.json"
_SPLIT_SEED = 0
_EVAL_BATCH = 32


class LabelledTokens:
    """Examples tokenised once and cut to `context` tokens.

    tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates, as of `read_tokenizer`;
    label_names give the class indices; pad_token_id fills the end of the shorter rows.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        label_names: Sequence[str],
        context: int,
        pad_token_id: int | None,
    ) -> None:
        index = {name: i for i, name in enumerate(label_names)}
        unknown = sorted({e.label for e in examples} - set(index))
        if unknown:
            raise ValueError(
                f"labelled data: labels must be among {', '.join(label_names)}; "
                f"got {', '.join(unknown)}"
            )
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text like any other
        encodings = tokenizer.encode_batch([e.text for e in examples])
        self.rows = [torch.tensor(e.ids[:context] or [0]) for e in encodings]  # at least one token
        self.labels = torch.tensor([index[e.label] for e in examples], dtype=torch.int64)  # [N]
        self.padding = pad_token_id or 0  # any token will do: `lengths` tells the rest
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, Tensor]:
        """Rows `step * batch_size` and on of an endless row of shuffled epochs."""
        first = step * batch_size
        return self.gather([self._at(i, seed) for i in range(first, first + batch_size)])

    def in_order(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every example once, in the order given."""
        for first in range(0, len(self), batch_size):
            yield self.gather(range(first, min(first + batch_size, len(self))))

    def gather(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """tokens [B, T] int64, padded to the longest of these rows; lengths [B]; labels [B]."""
        rows = [self.rows[i] for i in indices]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in rows])
        return {"tokens": tokens, "lengths": lengths, "labels": self.labels[list(indices)]}

    def _at(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, len(self))
        if epoch != self._epoch:
            # A cache, not state: the order depends on seed and epoch alone.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(len(self), generator=generator)
            self._epoch = epoch
        return int(self._order[offset])


class Classification:
    """Learn the label of a text. `from_scratch` takes only the sizes and the tokenizer of
    `init_from`, not its weights: what the same training does without the pretraining."""

    name = "classify"
    head = ("score.*",)

    def __init__(self, config: TrainConfig, from_scratch: bool = False) -> None:
        if config.model.init_from is None:
            raise ValueError(
                "classify: model.init_from must be a run or a Hugging Face directory; got None"
            )
        self.config, self.from_scratch = config, from_scratch
        self.source = Path(config.model.init_from).expanduser()
        self.model_config = models.read_config(self.source)
        self.tokenizer = read_tokenizer(config.data.tokenizer or self.source)
        examples = labelled.read(config.data.path)
        share = config.data.val_fraction
        self.split = labelled.split(examples, _SPLIT_SEED, validation=share, test=share)
        self.label_names = sorted({example.label for example in examples})
        self.pad_token_id = _pad_token_id(self.tokenizer, self.model_config)
        self.train = self._tokens(self.split.train)
        self.validation = self._tokens(self.split.validation)
        digest = hashlib.sha256(json.dumps(list(map(dataclasses.astuple, examples))).encode())
        digest.update(self.tokenizer.to_str().encode())
        self.fingerprint = digest.hexdigest()

    def _tokens(self, examples: Sequence[Example]) -> LabelledTokens:
        tokens = LabelledTokens(
            examples,
            self.tokenizer,
            self.label_names,
            self.model_config.max_positions,
            self.pad_token_id,
        )
        limit = self.model_config.vocab_size
        highest = max(int(row.max()) for row in tokens.rows)
        if highest >= limit:
            raise ValueError(
                f"classify: the tokenizer must give tokens below {limit}, those of {self.source}; "
                f"got {highest}"
            )
        return tokens

    def build_model(self) -> nn.Module:
        """The float32 classifier at step 0; its head is drawn from torch's generator."""
        if self.from_scratch:
            backbone = models.build(self.model_config)
        else:
            backbone = models.load(self.source, dtype=torch.float32)
        if isinstance(backbone, models.SequenceClassifier):
            raise ValueError(
                f"classify: model.init_from must hold a language model; got {self.source}, "
                "which holds a classifier"
            )
        names = self.label_names
        return models.SequenceClassifier(backbone, len(names), names, self.pad_token_id)

    def batch(self, step: int) -> dict[str, Tensor]:
        """See `LabelledTokens.gather`; pure in (seed, step)."""
        return self.train.batch(step, self.config.optim.batch_size, self.config.run.seed)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Cross entropy summed over the rows, and the number of rows."""
        logits = model(batch["tokens"], batch["lengths"])  # [B, labels]
        loss = pyfast.cross_entropy(logits, batch["labels"], reduction="sum", dtype=torch.float32)
        return loss, len(batch["labels"])

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy on the validation part."""
        total, right = 0.0, 0
        for batch in self.validation.in_order(_EVAL_BATCH):
            logits = predict(model, batch)
            total += pyfast.cross_entropy(logits, batch["labels"], reduction="sum").item()
            right += int((logits.argmax(-1) == batch["labels"]).sum())
        return {"loss": total / len(self.validation), "accuracy": right / len(self.validation)}

    def save_extras(self, directory: Path) -> None:
        """The tokenizer, the test part, and where the examples came from."""
        lines = (json.dumps(dataclasses.asdict(example)) for example in self.split.test)
        write_atomically(directory / TEST_FILE, ("\n".join(lines) + "\n").encode())
        write_atomically(directory / "tokenizer.json", self.tokenizer.to_str().encode())
        about = {
            "task": self.name,
            "data": self.config.data.path,
            "from_scratch": self.from_scratch,
            "labels": self.label_names,
            "examples": {
                "train": len(self.split.train),
                "validation": len(self.split.validation),
                "test": len(self.split.test),
            },
        }
        write_atomically(directory / TASK_FILE, (json.dumps(about, indent=2) + "\n").encode())


def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Float32 logits [B, labels] on the CPU for a batch of `LabelledTokens`."""
    device = next(model.parameters()).device
    return model(batch["tokens"].to(device), batch["lengths"].to(device)).float().cpu()


def _pad_token_id(tokenizer: Any, config: models.ModelConfig) -> int | None:
    """A token that never ends a text: what Hugging Face's classifiers find the last real one by."""
    found = [config.pad_token_id, tokenizer.token_to_id(END_OF_TEXT), config.eos_token_id]
    return next((token for token in found if isinstance(token, int)), None)
