"""Rotary position embedding tables (Su et al., 2021), with the two scalings Llama models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfast.models.config import LlamaConfig


class RotaryTable:
    """cos and sin [T, D/2] float32, computed once per device and grown on demand.

    Not a buffer: `model.to(torch.bfloat16)` would round the angles.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rows(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start..end-1."""
        table = self._tables.get(device)
        if table is None or len(table[0]) < end:
            length = min(self.config.max_position_embeddings, max(256, 2 * end))
            table = self._compute(max(length, end), device)
            if type(table[0]) is Tensor:  # not the fakes of a trace: they would outlive it
                self._tables[device] = table
        cos, sin = table
        return cos[start:end], sin[start:end]

    @torch.inference_mode(False)  # a table made while generating must also serve training
    def _compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = positions[:, None] * inverse_frequencies(self.config).to(device)
        return angles.cos(), angles.sin()


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """[D/2] float32: theta^(-2i/D), scaled by `rope_type` as transformers does."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    if config.rope_type == "default":
        return plain
    scaling = config.rope_scaling
    stretched = plain / scaling["factor"]
    if config.rope_type == "linear":
        return stretched
    # llama3: stretch the long waves, keep the short ones, blend in between.
    old_length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old_length * plain / (2 * math.pi)  # rotations within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * stretched + blend * plain
