"""Llama (Touvron et al., 2023): RoPE, RMSNorm, SwiGLU, grouped-query attention.

Modules are named as in Hugging Face's LlamaForCausalLM, so the state dicts are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyfast
from pyfast import nn
from pyfast.models.cache import KVCache, causal_attention
from pyfast.models.causal_lm import CausalLM, embed
from pyfast.models.config import LlamaConfig
from pyfast.models.rotary import RotaryTable


class LlamaAttention(torch.nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias)
        self.k_proj = nn.Linear(width, key_width, bias)
        self.v_proj = nn.Linear(width, key_width, bias)
        self.o_proj = nn.Linear(query_width, width, bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None, layer: int
    ) -> Tensor:
        query = pyfast.rope(self._heads(self.q_proj(x)), *rotation)  # [B, H, T, D]
        key = pyfast.rope(self._heads(self.k_proj(x)), *rotation)  # [B, Hkv, T, D]
        value = self._heads(self.v_proj(x))
        return self.o_proj(causal_attention(query, key, value, cache, layer))

    def _heads(self, x: Tensor) -> Tensor:
        heads = x.shape[2] // self.head_dim
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)  # [B, H, T, D]


class LlamaBlock(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each sum is taken inside the norm after it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = nn.SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        stream: Tensor,
        branch: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and the branch not yet added to it, both [B, T, C]; the same out."""
        if branch is None:
            normed = self.input_layernorm(stream)
        else:
            stream, normed = self.input_layernorm(branch, residual=stream)
        mixed = self.self_attn(normed, rotation, cache, layer)
        stream, normed = self.post_attention_layernorm(mixed, residual=stream)
        return stream, self.mlp(normed)


class LlamaBody(torch.nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(
            LlamaBlock(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)

    @property
    def token_embedding(self) -> torch.nn.Embedding:
        return self.embed_tokens

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, under_tied_head: bool = False
    ) -> Tensor:
        past = 0 if cache is None else cache.used
        rotation = self.rotary.rows(past, past + tokens.shape[1], tokens.device)
        stream, branch = embed(tokens, self.embed_tokens.weight, under_tied_head), None
        for layer, block in enumerate(self.layers):
            stream, branch = block(stream, branch, rotation, cache, layer)
        return self.norm(branch, residual=stream)[1]


class Llama(CausalLM):
    """A Llama language model; see `CausalLM` for `forward`, `hidden` and `loss`."""

    body_name = "model"
    lm_name, bare_name = "LlamaForCausalLM", "LlamaModel"
    classifier_name = "LlamaForSequenceClassification"
    residual_projections = ("o_proj.weight", "down_proj.weight")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.cache_shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.model = LlamaBody(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise()
