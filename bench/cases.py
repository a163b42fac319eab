"""The cases of the bench: the functions of pyfast.testing at the sizes of real models."""

from pyfast.testing import (
    Case,
    adamw,
    attention,
    cross_entropy,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    norm,
    rope,
)

GPT2_124M = ((50257, 768), (1024, 768), *((2304, 768), (768, 768), (3072, 768), (768, 3072)) * 12)
CASES = [
    linear_act(2048, 768, 3072, "gelu_tanh"),
    linear_act(2048, 768, 3072, "none"),
    linear_act(2048, 3072, 768, "none"),
    linear_act(32, 64, 64, "none"),
    linear_glu(2048, 768, 2048),
    cross_entropy(1024, 50257),
    linear_cross_entropy(1024, 768, 50257),
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


def cases(op: str | None = None) -> list[Case]:
    """The cases of one operation, or of all."""
    return [case for case in CASES if op in (None, case.op)]
