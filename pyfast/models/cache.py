"""Keys and values of the tokens already seen, and causal attention over them."""

from __future__ import annotations

import torch
from torch import Tensor

import pyfast


class KVCache:
    """Preallocated keys and values of every layer: [layers, B, Hkv, length, D] each. For inference.

    `used` counts the filled positions; a model advances it once per call, after its last layer.

    Args:
        model: a `GPT` or `Llama`; gives the layer count, head sizes, dtype and device.
        batch: rows; length: the most tokens it will hold.
    """

    def __init__(self, model: torch.nn.Module, batch: int, length: int) -> None:
        limit = model.max_positions
        if batch < 1 or not 1 <= length <= limit:
            raise ValueError(
                f"KVCache: batch must be at least 1 and length in 1..{limit}; got {batch}, {length}"
            )
        layers, heads, head_dim = model.cache_shape
        like = model.head_weight
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.used = 0

    @property
    def length(self) -> int:
        """The most tokens it can hold."""
        return self.keys.shape[3]

    def expect_room(self, tokens: Tensor) -> None:
        """Refuse tokens [B, T] that do not fit before anything is computed."""
        batch, time = tokens.shape
        if batch != self.keys.shape[1] or self.used + time > self.length:
            free = self.length - self.used
            raise ValueError(
                f"KVCache: tokens must be [{self.keys.shape[1]}, at most {free}] with {self.used} "
                f"of {self.length} positions used; got {list(tokens.shape)}"
            )

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, Hkv, T, D] after the used positions; views of all up to there."""
        end = self.used + key.shape[2]
        self.keys[layer, :, :, self.used : end] = key
        self.values[layer, :, :, self.used : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None, layer: int
) -> Tensor:
    """query [B, H, T, D], key and value [B, Hkv, T, D] of the new tokens -> [B, T, H*D]."""
    heads, time = query.shape[1:3]
    past = 0 if cache is None else cache.used
    if cache is not None:
        key, value = cache.append(layer, key, value)  # [B, Hkv, past + T, D]
    mask = None
    if past and time > 1:  # row i sees the past and the new tokens up to i; one new token sees all
        mask = torch.ones(time, past + time, dtype=torch.bool, device=query.device).tril_(past)
    mixed = pyfast.attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=past == 0,
        enable_gqa=heads != key.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)
