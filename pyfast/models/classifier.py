"""A decoder with a classification head on the last real token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import pyfast
from pyfast import nn
from pyfast.models.causal_lm import CausalLM


class SequenceClassifier(torch.nn.Module):
    """The body of `backbone` under a bias-free linear head, `score`.

    State dict and results are those of Hugging Face's GPT2ForSequenceClassification or
    LlamaForSequenceClassification. The body is shared with `backbone`, not copied; the
    language-model head is left behind.

    Args:
        backbone: a `GPT` or `Llama`.
        num_labels: classes; label_names: their names in order (default LABEL_0, LABEL_1, ...).
        pad_token_id: what rows are padded with; None: not known (a batch then needs `lengths`).
    """

    def __init__(
        self,
        backbone: CausalLM,
        num_labels: int,
        label_names: Sequence[str] | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        names = [f"LABEL_{i}" for i in range(num_labels)] if label_names is None else label_names
        if num_labels < 1 or len(names) != num_labels or len(set(names)) != num_labels:
            raise ValueError(
                f"SequenceClassifier: label_names must be {num_labels} distinct names; "
                f"got {list(names)}"
            )
        vocab_size = backbone.config.vocab_size
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"SequenceClassifier: pad_token_id must be in 0..{vocab_size - 1} or None; "
                f"got {pad_token_id}"
            )
        self.config, self.body_name = backbone.config, backbone.body_name
        self.classifier_name, self.max_positions = backbone.classifier_name, backbone.max_positions
        self.label_names, self.pad_token_id = list(names), pad_token_id
        setattr(self, self.body_name, backbone.body)
        like = backbone.head_weight
        width = like.shape[1]
        self.score = nn.Linear(width, num_labels, bias=False, device=like.device, dtype=like.dtype)
        torch.nn.init.normal_(self.score.weight, std=self.config.initializer_range)

    @property
    def body(self) -> torch.nn.Module:
        """Embeddings, blocks and the final norm: body(tokens) -> [B, T, C]."""
        return getattr(self, self.body_name)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64 -> logits [B, num_labels], read at the last real token of each row.

        lengths [B]: real tokens of each (right-padded) row; without it, the last token that is not
        `pad_token_id` counts, as in Hugging Face.
        """
        if tokens.dim() != 2 or not 0 < tokens.shape[1] <= self.max_positions:
            raise ValueError(
                f"SequenceClassifier: tokens must be [B, 1..{self.max_positions}]; "
                f"got {list(tokens.shape)}"
            )
        last = self._last_positions(tokens, lengths)  # [B]
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.score(self.body(tokens)[rows, last])

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        lengths: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy of labels [B] as float32 ("none": [B])."""
        logits = self(tokens, lengths)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return pyfast.cross_entropy(logits, labels, reduction=reduction, dtype=dtype)

    def _last_positions(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        batch, time = tokens.shape
        if lengths is not None:
            if lengths.shape != (batch,) or not bool(((lengths > 0) & (lengths <= time)).all()):
                raise ValueError(
                    f"SequenceClassifier: lengths must be [{batch}] numbers in 1..{time}; "
                    f"got {lengths.tolist()}"
                )
            return lengths.to(tokens.device, torch.int64) - 1
        if self.pad_token_id is not None:
            positions = torch.arange(time, device=tokens.device)
            return (positions * (tokens != self.pad_token_id)).argmax(-1)
        if batch > 1:
            raise ValueError(
                "SequenceClassifier: pad_token_id must be set (or lengths given) for a batch; "
                f"got {batch} rows"
            )
        return torch.full((batch,), time - 1, device=tokens.device)
