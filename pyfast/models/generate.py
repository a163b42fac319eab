"""Sampling with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import pyfast
from pyfast.models.cache import KVCache
from pyfast.models.causal_lm import CausalLM


def generate(
    model: CausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue tokens [B, T] (no padding) -> [B, T + new]; arguments as in `stream`."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    new = stream(model, tokens, max_new_tokens, stop_token=stop_token, **settings)
    return torch.cat([tokens, *(column[:, None] for column in new)], dim=1)


def stream(
    model: CausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, [B] int64, at most `max_new_tokens` times.

    temperature 0 takes the likeliest token; otherwise sample from softmax(logits / temperature)
    among the `top_k` likeliest tokens and the smallest set whose probability reaches `top_p`
    (Holtzman et al., 2020). The same `seed` gives the same tokens; None uses torch's global
    generator. A row that produced `stop_token` repeats it, and the stream ends when all rows have.

    Raises ValueError at once, before the first token is asked for, for settings out of range.
    """
    _expect_settings(model, tokens, max_new_tokens, temperature, top_k, top_p)
    if seed is not None and not -(2**63) <= seed < 2**64:  # as of torch.Generator.manual_seed
        raise ValueError(f"generate: seed must be in [-2**63, 2**64) or None; got {seed}")
    return _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, stop_token)


def _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, stop_token):
    generator = None
    if seed is not None:
        generator = torch.Generator(tokens.device).manual_seed(seed)
    batch, time = tokens.shape
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    cache = KVCache(model, batch, time + max_new_tokens) if max_new_tokens else None
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the yield: it would leak into the caller
            hidden = model.hidden(tokens, cache)[:, -1]  # [B, C]
            logits = pyfast.linear_act(hidden, model.head_weight).float()  # [B, V]
            column = sample(logits, temperature, top_k, top_p, generator)
            if stop_token is not None:
                column = column.masked_fill(done, stop_token)
                done |= column == stop_token
        yield column
        if stop_token is not None and bool(done.all()):
            return
        tokens = column[:, None]


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [B, V] -> [B] int64; see `stream`."""
    if temperature == 0:
        return logits.argmax(-1)
    # The likeliest at 0: dividing by a tiny temperature then gives -inf at worst, never inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:  # no need to sort a large vocabulary
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(1)
    classes = logits.shape[-1]
    ordered, index = scaled.topk(classes if top_k is None else min(top_k, classes))
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens already hold
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return index.gather(1, chosen).squeeze(1)


def _expect_settings(
    model: CausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(
            f"generate: tokens must be [B, T] with at least one token; got {list(tokens.shape)}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0; got {max_new_tokens}")
    if tokens.shape[1] + max_new_tokens > model.max_positions:
        raise ValueError(
            f"generate: prompt and new tokens must take at most {model.max_positions} positions; "
            f"got {tokens.shape[1]} + {max_new_tokens}; shorten one of them"
        )
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be a finite number >= 0; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1 or None; got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1] or None; got {top_p}")
