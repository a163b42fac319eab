"""GPT-2 (Radford et al., 2019): learned positions, pre-LayerNorm, GELU, tied head.

Modules are named as in Hugging Face's GPT2LMHeadModel, so the state dicts are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast import nn
from pyfast.models.cache import KVCache, causal_attention
from pyfast.models.causal_lm import CausalLM, embed
from pyfast.models.config import GPTConfig
from pyfast.recompute import norm_linear, norm_mlp


class GPTAttention(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.c_attn = nn.Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = nn.Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        return self.mix(self.c_attn(x), cache, layer)

    def mix(self, qkv: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """What follows c_attn: [B, T, 3C] -> [B, T, C]."""
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))  # [B, T, 3, H, D]
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each [B, H, T, D]
        return self.c_proj(causal_attention(query, key, value, cache, layer))


class GPTMLP(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Conv1D(inner, config.n_embd, act=config.act)
        self.c_proj = nn.Conv1D(config.n_embd, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class GPTBlock(torch.nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)); each sum is taken inside the norm after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPTAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = GPTMLP(config)

    def forward(
        self, stream: Tensor, branch: Tensor | None, cache: KVCache | None, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and the branch not yet added to it, both [B, T, C]; the same out."""
        x, residual = (stream, None) if branch is None else (branch, stream)
        if not (_plain(self.attn, GPTAttention) and _plain(self.mlp, GPTMLP)):
            stream, normed = (x, self.ln_1(x)) if branch is None else self.ln_1(x, residual)
            stream, normed = self.ln_2(self.attn(normed, cache, layer), residual=stream)
            return stream, self.mlp(normed)
        stream, qkv = norm_linear(self.ln_1, self.attn.c_attn, x, residual)
        mixed = self.attn.mix(qkv, cache, layer)
        return norm_mlp(self.ln_2, self.mlp.c_fc, self.mlp.c_proj, mixed, stream)


def _plain(layer: torch.nn.Module, kind: type) -> bool:
    """Whether its parts may be called in the place of `layer`: nothing wraps it."""
    return type(layer) is kind and not nn.is_hooked(layer)


class GPTBody(torch.nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = torch.nn.Embedding(config.n_positions, config.n_embd)
        self.h = torch.nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    @property
    def token_embedding(self) -> torch.nn.Embedding:
        return self.wte

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, under_tied_head: bool = False
    ) -> Tensor:
        past = 0 if cache is None else cache.used
        positions = self.wpe.weight[past : past + tokens.shape[1]]  # [T, C]
        stream, branch = embed(tokens, self.wte.weight, under_tied_head) + positions, None
        for layer, block in enumerate(self.h):
            stream, branch = block(stream, branch, cache, layer)
        return self.ln_f(branch, residual=stream)[1]


class GPT(CausalLM):
    """A GPT-2 language model; see `CausalLM` for `forward`, `hidden` and `loss`."""

    body_name = "transformer"
    lm_name, bare_name = "GPT2LMHeadModel", "GPT2Model"
    classifier_name = "GPT2ForSequenceClassification"
    residual_projections = ("c_proj.weight",)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cache_shape = (config.n_layer, config.n_head, config.n_embd // config.n_head)
        self.transformer = GPTBody(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()
