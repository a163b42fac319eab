"""The cases of the bench: the functions of pyfast.testing at the sizes of real models.

`TABLE` holds the sizes the project is judged by, `ODD` the ones it must not be tuned against: odd
sizes, other head sizes, long vocabularies, a batch of one. `QUICK` fits into two minutes. `GPU` is
for a GPU, which the others would leave half empty.
"""

import dataclasses
from typing import Any

from torch import Tensor

from pyfast.testing import (
    Case,
    Maker,
    adamw,
    attention,
    cross_entropy,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    norm,
    rope,
)
from pyfast.testing import cases as test_cases

GPT2_124M = ((50257, 768), (1024, 768), *((2304, 768), (768, 768), (3072, 768), (768, 3072)) * 12)
SMALL_MLP = ((256, 784), (256,), (128, 256), (128,), (10, 128), (10,))


def all_count(case: Case) -> Case:
    """The case with no ignored target, as pretraining has it: everyone does all the work."""

    def make(t: Maker) -> dict[str, Any]:
        inputs = case.make(t)
        classes = len(inputs["linear_weight"]) if "linear_weight" in inputs else None
        target: Tensor = inputs["target"]
        return inputs | {"target": target % (classes or inputs["input"].shape[1])}

    return dataclasses.replace(case, make=make)


TABLE = [
    linear_act(2048, 768, 3072, "gelu_tanh"),
    linear_act(2048, 768, 3072, "none"),
    linear_act(2048, 3072, 768, "none"),
    linear_act(32, 64, 64, "none"),
    linear_glu(2048, 768, 2048),
    all_count(cross_entropy(1024, 50257)),
    all_count(linear_cross_entropy(1024, 768, 50257)),
    attention(1, 12, 2048, 64, causal=True),
    attention(4, 12, 512, 64, causal=True),
    attention(1, 8, 1024, 128, kv=2),
    *(
        norm(op, 2048, n, residual=r)
        for op in ("layer_norm", "rms_norm")
        for n in (768, 4096)
        for r in (False, True)
    ),
    rope(4, 12, 512, 64),
    adamw(GPT2_124M, max_norm=1.0),
]
ODD = [
    linear_act(1000, 777, 1333, "gelu"),
    linear_act(2047, 769, 257, "relu"),
    linear_act(1, 4096, 4096, "silu"),
    linear_glu(777, 1000, 1999),
    linear_glu(1, 2048, 5632),
    all_count(cross_entropy(1000, 32001)),
    all_count(cross_entropy(63, 128256)),
    cross_entropy(4096, 10),
    all_count(linear_cross_entropy(257, 1024, 32003)),
    all_count(linear_cross_entropy(64, 512, 128256)),
    linear_cross_entropy(1, 768, 50257),
    attention(1, 16, 1000, 80, causal=True),
    attention(2, 12, 197, 64),
    attention(1, 4, 333, 96, mask="bool"),
    attention(1, 32, 1, 128, tk=2048, kv=8),
    norm("layer_norm", 1000, 1023),
    norm("layer_norm", 1, 768, residual=True),
    norm("rms_norm", 3000, 5120),
    norm("rms_norm", 1, 4096),
    rope(1, 32, 1000, 128),
    rope(1, 32, 1, 128),
    adamw(SMALL_MLP),
]
QUICK = [
    linear_act(2048, 768, 3072, "gelu_tanh"),
    linear_act(2048, 3072, 768, "none"),
    linear_act(32, 64, 64, "none"),
    linear_glu(512, 768, 2048),
    all_count(cross_entropy(256, 50257)),
    all_count(linear_cross_entropy(128, 768, 50257)),
    attention(1, 12, 1024, 64, causal=True),
    attention(1, 8, 512, 128, kv=2),
    norm("layer_norm", 2048, 768, residual=True),
    norm("rms_norm", 2048, 4096),
    rope(4, 12, 512, 64),
    adamw(GPT2_124M[1:14], max_norm=1.0),
]
GPU = [
    linear_act(8192, 768, 3072, "gelu_tanh"),
    linear_act(8192, 4096, 4096, "none"),
    linear_act(4096, 4096, 14336, "silu"),
    linear_act(1000, 777, 1333, "gelu"),
    linear_act(16, 4096, 4096, "none"),
    linear_act(32, 64, 64, "none"),
    linear_glu(4096, 4096, 14336),
    linear_glu(777, 1000, 1999),
    all_count(cross_entropy(8192, 50257)),
    all_count(cross_entropy(4096, 128256)),
    all_count(cross_entropy(16, 262144)),
    cross_entropy(8192, 10),
    all_count(linear_cross_entropy(4096, 768, 50257)),
    all_count(linear_cross_entropy(2048, 4096, 128256)),
    attention(4, 16, 2048, 64, causal=True),
    attention(1, 16, 4096, 128, causal=True),
    attention(1, 16, 4096, 128, kv=4),
    attention(2, 12, 197, 64),
    attention(1, 16, 1000, 80, causal=True),
    attention(1, 4, 333, 96, mask="bool"),
    attention(1, 32, 1, 128, tk=8192, kv=8),
    *(
        norm(op, 16384, n, residual=r)
        for op in ("layer_norm", "rms_norm")
        for n in (1023, 4096)
        for r in (False, True)
    ),
    norm("rms_norm", 4096, 16384),
    rope(4, 32, 2048, 128),
    rope(1, 32, 1, 128),
    adamw(GPT2_124M, max_norm=1.0),
    adamw(SMALL_MLP),
]

# The error of an in-place step needs copies of everything in float64: a small twin stands in.
TWINS = {"adamw_step_": adamw(((300, 768), (768, 33), (768,)), max_norm=1.0)}


def cases(op: str | None = None, quick: bool = False, device: str = "cpu") -> list[Case]:
    """The cases of one operation, or of all; quick: fewer. The emulator has one of the tests'."""
    if device == "emulator":
        return test_cases(op)[:1]
    chosen = GPU[::3] if quick else GPU
    if device == "cpu":
        chosen = QUICK if quick else TABLE + ODD
    return [case for case in chosen if op in (None, case.op)]


def error_case(case: Case) -> Case:
    """The case on which the error against float64 is measured: the case itself, or its twin."""
    return TWINS.get(case.op, case)
