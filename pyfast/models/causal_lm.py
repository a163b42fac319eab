"""What every decoder here shares: tokens in, hidden states, logits or loss out."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast
from pyfast.models.cache import KVCache
from pyfast.models.config import ModelConfig


class CausalLM(torch.nn.Module):
    """A decoder body (the submodule named `body_name`) under a language-model head.

    The state dict is that of Hugging Face's class `lm_name`, with a tied head stored once (as
    the token embedding).
    """

    body_name: ClassVar[str]
    lm_name: ClassVar[str]  # Hugging Face's class of the same state dict
    bare_name: ClassVar[str]  # its class of the body alone
    classifier_name: ClassVar[str]  # its class for `SequenceClassifier`
    residual_projections: ClassVar[tuple[str, ...]]  # parameters that write to the residual stream

    config: ModelConfig
    cache_shape: tuple[int, int, int]  # layers, key/value heads, head size

    @property
    def max_positions(self) -> int:
        """The most tokens in one sequence."""
        return self.config.max_positions

    @property
    def body(self) -> torch.nn.Module:
        """Embeddings, blocks and the final norm: body(tokens, cache, ...) -> [B, T, C]."""
        return getattr(self, self.body_name)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, C]: the token embedding where tied."""
        if self.config.tie_word_embeddings:
            return self.body.token_embedding.weight
        return self.lm_head.weight

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] int64 -> hidden states after the final norm [B, T, C].

        With a `cache`, tokens continue what it holds and are appended to it (use under no_grad).
        Raises ValueError for tokens that are too long, out of range or do not fit the cache.
        """
        return self._hidden(tokens, cache, under_tied_head=False)

    def _hidden(self, tokens: Tensor, cache: KVCache | None, under_tied_head: bool) -> Tensor:
        if tokens.dim() != 2:
            raise ValueError(f"model: tokens must be [B, T]; got {list(tokens.shape)}")
        if tokens.dtype != torch.int64:
            raise TypeError(f"model: tokens must be int64; got {tokens.dtype}")
        past = 0 if cache is None else cache.used
        if past + tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"model: tokens must take at most {self.max_positions} positions; "
                f"got {past + tokens.shape[1]}"
            )
        if cache is not None:
            cache.expect_room(tokens)
        out = self.body(tokens, cache, under_tied_head)
        if cache is not None:
            cache.used += tokens.shape[1]
        return out

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, V]."""
        hidden = self._hidden(tokens, cache, self.config.tie_word_embeddings)
        return pyfast.linear_act(hidden, self.head_weight)

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy of targets [B, T] (-100: ignored) as float32; the logits never exist whole.

        reduction: "mean" over the targets that count, "sum", or "none" for [B, T].
        """
        hidden = self._hidden(tokens, None, self.config.tie_word_embeddings)
        return pyfast.linear_cross_entropy(
            hidden,
            self.head_weight,
            targets,
            reduction=reduction,
            dtype=torch.promote_types(hidden.dtype, torch.float32),
        )

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's initialisation: normal(0, 0.02), residual projections narrower by sqrt(2 layers).

        Radford et al., 2019, section 2.3. Biases are 0, norm weights 1.
        """
        std = self.config.initializer_range
        narrow = std / math.sqrt(2 * self.cache_shape[0])
        for name, param in self.named_parameters():
            if param.dim() == 2:
                param.normal_(0.0, narrow if name.endswith(self.residual_projections) else std)
            elif name.endswith("bias"):
                param.zero_()


def embed(tokens: Tensor, weight: Tensor, under_tied_head: bool) -> Tensor:
    """Rows of weight [V, C]: tokens [B, T] -> [B, T, C].

    Under a head of the same weight, which has a gradient of its own, that of the rows used is
    added to it by autograd, and no matrix [V, C] is filled with zeros for them. Not on a GPU,
    which would have to wait for the number of the rows.
    """
    rows_alone = under_tied_head and weight.is_cpu and type(weight) is torch.nn.Parameter
    try:
        if rows_alone and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Rows.apply(tokens, weight)
        return F.embedding(tokens, weight)
    except IndexError:
        got = f"{int(tokens.min())}..{int(tokens.max())}"
        raise ValueError(f"model: tokens must be in 0..{len(weight) - 1}; got {got}") from None


class _Rows(torch.autograd.Function):
    """F.embedding, whose gradient is sparse: each used row once, added up in the order of tokens.

    F.embedding(sparse=True) leaves the order to torch, which takes another for other threads.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        used, place = torch.unique(ctx.saved_tensors[0], return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(grad, place, len(used), -1, False)
        return None, torch.sparse_coo_tensor(
            used[None], rows, ctx.shape, is_coalesced=True, check_invariants=False
        )
