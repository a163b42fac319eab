"""Cases of every operation, one list for tests and bench: inputs, bytes and FLOPs.

Tests run `CASES` on every backend and dtype; `bench/cases.py` makes larger ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyfast import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Maker:
    """Makes the tensors of a case: the same values for every dtype, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values, drawn in float32 and rounded to the dtype."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    `make(Maker)` gives its keyword arguments; `grads` names those that have gradients; `elements`
    is what must move at least once in forward and in backward, in elements of the dtype; `flops` is
    the arithmetic of both. `constants` may not be converted to another dtype (float32 tables).
    """

    op: str
    name: str
    make: Callable[[Maker], dict[str, Any]]
    grads: tuple[str, ...]
    elements: tuple[int, int]
    flops: tuple[int, int]
    constants: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of one call."""
        return {**self.make(Maker(dtype, seed)), **self.settings}

    def __str__(self) -> str:
        return f"{self.op}/{self.name}"


def linear_act(m: int, k: int, n: int, act: str, bias: bool = True, flipped: bool = False) -> Case:
    """x [m, k], weight [n, k], or a view of a [k, n] matrix if `flipped`."""

    def make(t: Maker) -> dict[str, Any]:
        weight = t.normal(k, n, scale=k**-0.5).t() if flipped else t.normal(n, k, scale=k**-0.5)
        return {"x": t.normal(m, k), "weight": weight, "bias": t.normal(n) if bias else None}

    grads = ("x", "weight", "bias") if bias else ("x", "weight")
    name = f"{m}x{k}->{n} {act}" + (" flipped" if flipped else "") + ("" if bias else " no bias")
    moved, flops = m * k + n * k + m * n, 2 * m * n * k
    return Case(
        "linear_act",
        name,
        make,
        grads,
        (moved, 2 * moved),
        (flops, 2 * flops),
        settings={"act": act},
    )


def linear_glu(m: int, k: int, n: int, act: str = "silu", bias: bool = False) -> Case:
    """x [m, k], two weights [n, k]."""

    def make(t: Maker) -> dict[str, Any]:
        gate, up = t.normal(n, k, scale=k**-0.5), t.normal(n, k, scale=k**-0.5)
        biases = {"gate_bias": t.normal(n), "up_bias": t.normal(n)} if bias else {}
        return {"x": t.normal(m, k), "gate_weight": gate, "up_weight": up, **biases}

    grads = ("x", "gate_weight", "up_weight") + (("gate_bias", "up_bias") if bias else ())
    moved, flops = m * k + 2 * n * k + m * n, 4 * m * n * k
    name = f"{m}x{k}->{n} {act}" + (" bias" if bias else "")
    return Case(
        "linear_glu",
        name,
        make,
        grads,
        (moved, 2 * moved),
        (flops, 2 * flops),
        settings={"act": act},
    )


def cross_entropy(rows: int, classes: int, weighted: bool = False, **settings: Any) -> Case:
    """Logits [rows, classes]; every seventh target is ignored."""

    def make(t: Maker) -> dict[str, Any]:
        target = t.integers(classes, rows)
        target[::7] = settings.get("ignore_index", -100)
        weight = {"weight": t.normal(classes).abs() + t.dtype.itemsize * 0.1} if weighted else {}
        return {"input": t.normal(rows, classes, scale=3.0), "target": target, **weight}

    words = " ".join(f"{k}={v}" for k, v in settings.items()) + (" weighted" if weighted else "")
    size = rows * classes
    return Case(
        "cross_entropy",
        f"{rows}x{classes} {words}".strip(),
        make,
        ("input",),
        (size, 2 * size),
        (4 * size, 4 * size),
        settings=settings,
    )


def linear_cross_entropy(
    rows: int, k: int, classes: int, bias: bool = False, weighted: bool = False, **settings: Any
) -> Case:
    """input [rows, k], linear_weight [classes, k]; every seventh target is ignored."""

    def make(t: Maker) -> dict[str, Any]:
        target = t.integers(classes, rows)
        target[::7] = -100
        extra = {"linear_bias": t.normal(classes)} if bias else {}
        if weighted:
            extra["weight"] = t.normal(classes).abs() + 0.5
        head = t.normal(classes, k, scale=2 * k**-0.5)
        return {"input": t.normal(rows, k), "linear_weight": head, "target": target, **extra}

    words = " ".join(f"{k}={v}" for k, v in settings.items()) + (" bias" if bias else "")
    moved, flops = rows * k + classes * k, 2 * rows * k * classes
    return Case(
        "linear_cross_entropy",
        f"{rows}x{k}->{classes} {words}{' weighted' if weighted else ''}".strip(),
        make,
        ("input", "linear_weight") + (("linear_bias",) if bias else ()),
        (moved, moved),
        (flops, 2 * flops),
        settings=settings,
    )


def attention(
    b: int,
    h: int,
    tq: int,
    d: int,
    *,
    tk: int = 0,
    kv: int = 0,
    mask: str = "",
    causal: bool = False,
) -> Case:
    """query [b, h, tq, d] as a view of [b, tq, h, d]; kv heads; mask "bool", "additive" or none."""
    tk, kv = tk or tq, kv or h

    def make(t: Maker) -> dict[str, Any]:
        q, k, v = (t.normal(b, n, c, d).transpose(1, 2) for n, c in ((tq, h), (tk, kv), (tk, kv)))
        inputs = {"query": q, "key": k, "value": v}
        if mask == "bool":
            inputs["attn_mask"] = t.integers(4, b, 1, tq, tk) > 0
        if mask == "additive":
            inputs["attn_mask"] = t.normal(1, h, tq, tk)
        return inputs

    settings = {"is_causal": causal, "enable_gqa": kv != h}
    grads = ("query", "key", "value") + (("attn_mask",) if mask == "additive" else ())
    pairs = b * h * (sum(min(i + 1, tk) for i in range(tq)) if causal else tq * tk)
    moved = b * d * (2 * h * tq + 2 * kv * tk)
    words = (" causal" if causal else "") + f" {mask}" * bool(mask)
    name = f"{b}x{h}{f':{kv}' if kv != h else ''}x{tq}{f':{tk}' if tk != tq else ''}x{d}{words}"
    return Case(
        "attention",
        name,
        make,
        grads,
        (moved, 2 * moved),
        (4 * d * pairs, 10 * d * pairs),
        settings=settings,
    )


def norm(op: str, rows: int, cols: int, *, affine: bool = True, residual: bool = False) -> Case:
    """input [rows, cols] for "layer_norm" or "rms_norm"."""
    names = (("weight", "bias") if op == "layer_norm" else ("weight",)) if affine else ()

    def make(t: Maker) -> dict[str, Any]:
        inputs = {"input": t.normal(rows, cols) + 0.5}
        inputs |= {"residual": t.normal(rows, cols)} if residual else {}
        return inputs | {name: t.normal(cols) for name in names}

    grads = ("input", *names) + (("residual",) if residual else ())
    size = rows * cols
    words = (" residual" if residual else "") + ("" if affine else " plain")
    return Case(
        op,
        f"{rows}x{cols}{words}",
        make,
        grads,
        ((4 if residual else 2) * size, (4 if residual else 3) * size),
        (8 * size, 12 * size),
        settings={"normalized_shape": (cols,)},
    )


def rope(b: int, h: int, t: int, d: int, interleaved: bool = False) -> Case:
    """x [b, h, t, d] as a view of [b, t, h, d]."""

    def make(m: Maker) -> dict[str, Any]:
        angle = torch.arange(t)[:, None] / 10000 ** (torch.arange(d // 2) / (d // 2))
        x = m.normal(b, t, h, d).transpose(1, 2)
        return {"x": x, "cos": angle.cos(), "sin": angle.sin()}

    size = prod((b, h, t, d))
    return Case(
        "rope",
        f"{b}x{h}x{t}x{d}" + (" interleaved" if interleaved else ""),
        make,
        ("x",),
        (2 * size, 2 * size),
        (3 * size, 3 * size),
        ("cos", "sin"),
        {"interleaved": interleaved},
    )


def adamw(sizes: tuple[tuple[int, ...], ...], **settings: Any) -> Case:
    """Parameters of `sizes` with moments as after a few steps; it has no gradient, it steps."""

    def make(t: Maker) -> dict[str, Any]:
        lists = {
            name: [t.normal(*size, scale=scale) for size in sizes]
            for name, scale in (("params", 1.0), ("grads", 0.1), ("exp_avgs", 0.1))
        }
        lists["exp_avg_sqs"] = [t.normal(*size, scale=0.1) ** 2 for size in sizes]
        return {**lists, "step": 7}

    count = sum(prod(size) for size in sizes)
    return Case(
        "adamw_step_",
        " ".join([f"{len(sizes)} tensors", *(f"{k}={v}" for k, v in settings.items())]),
        make,
        (),
        (7 * count, 0),
        (15 * count, 0),
        settings=settings,
    )


# 37, 53, 29: odd and shorter than a tile; 130x600->270: past one block each way, two slices of
# depth; 2 rows: the path that packs nothing; 1100 rows: two chunks of the weight gradient.
CASES = [
    *(linear_act(37, 29, 53, act) for act in reference.ACTIVATIONS),
    linear_act(130, 600, 270, "gelu_tanh", flipped=True),
    linear_act(2, 70, 300, "silu", bias=False),
    linear_act(2, 70, 300, "relu", flipped=True),
    linear_act(1100, 33, 40, "gelu"),
    linear_act(70, 29, 768, "mish"),  # bias gradients in pieces of 252: the last is short
    linear_act(33, 530, 61, "none"),
    linear_glu(37, 29, 53),
    linear_glu(130, 70, 300, "gelu_tanh", bias=True),
    linear_glu(2, 70, 33),
    cross_entropy(21, 131),
    cross_entropy(21, 1030, label_smoothing=0.1, reduction="sum"),
    cross_entropy(21, 33, weighted=True, ignore_index=3, label_smoothing=0.2),
    cross_entropy(5, 4, weighted=True, reduction="none"),
    linear_cross_entropy(45, 33, 301),
    linear_cross_entropy(45, 70, 1030, bias=True, label_smoothing=0.1, reduction="sum"),
    linear_cross_entropy(19, 8, 33, bias=True, weighted=True, label_smoothing=0.1),
    linear_cross_entropy(19, 33, 67, reduction="none"),
    attention(2, 3, 37, 16, causal=True),
    attention(1, 4, 70, 64, kv=2, causal=True),
    attention(2, 2, 33, 24, tk=130, mask="bool"),
    attention(1, 2, 130, 40, tk=33, mask="additive"),
    attention(2, 2, 1, 32, tk=70),
    attention(1, 1, 19, 256, causal=True),
    *(norm(op, 37, 53, residual=True) for op in ("layer_norm", "rms_norm")),
    *(norm(op, 70, 768) for op in ("layer_norm", "rms_norm")),
    *(norm(op, 5, 3, affine=False) for op in ("layer_norm", "rms_norm")),
    rope(2, 3, 19, 16),
    rope(1, 2, 7, 10, interleaved=True),
    adamw(((5, 7), (1,), (130, 33)), weight_decay=0.1),
    adamw(((40,), (3, 3)), max_norm=0.5, maximize=True, decoupled=False),
]


def cases(op: str | None = None) -> list[Case]:
    """The cases of one operation, or of all."""
    return [case for case in CASES if op in (None, case.op)]
