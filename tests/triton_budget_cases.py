"""The calls whose cost is kept in tests/budgets.json, and the limits they must keep."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import pyfast
from bench.cases import all_count
from pyfast import testing, triton_rooms
from tests.run_case import results

COMPILED_FOR = 80, 90, 100  # capabilities whose registers are kept
# Per kernel: what moves through memory with a small cache and what warps ask for in whole sectors,
# both per byte that must move; waves through shared memory per wave without bank conflicts. Of
# products of matrices: multiplications executed per one that is needed.
LIMITS = {"moved": 1.02, "asked": 1.05, "banks": 1.05, "multiplied": 1.0}
# As compiled, in the main loop of products: integer instructions for each of tensor cores' of
# 16 x 8 x 16, and the part of the bytes that is loaded 16 at a time and past the registers.
INTEGERS, WIDE = 4.0, 0.85


@dataclass(frozen=True)
class Budget:
    """One call whose launches are counted.

    `more` has other limits by kernel, with the reason beside them where they are written; `useful`
    the FLOPs that all launches of a kernel must do; `large` gives small operands the tiles of large
    ones. `processors` are few, so that a program has as much to do as it has of a real size.
    """

    name: str
    capability: int  # it is run for
    call: Callable[[], Any]
    more: dict[str, dict[str, float]] = field(default_factory=dict)
    processors: int = 1
    useful: dict[str, int] = field(default_factory=dict)
    large: bool = False
    compiled_for: tuple[int, ...] = COMPILED_FOR


def case_budget(case: testing.Case, dtype: torch.dtype, **settings: Any) -> Budget:
    """Forward and backward of a case."""
    name = f"{case} {str(dtype).removeprefix('torch.')}"
    call = functools.partial(_forward_and_backward, case, dtype)
    return Budget(name, RUN_FOR[dtype], call, **settings)


def _forward_and_backward(case: testing.Case, dtype: torch.dtype) -> None:
    results(case, getattr(pyfast, case.op), case.inputs(dtype))


def adamw_budget(
    name: str, dtypes: tuple[torch.dtype, ...], master: bool, **settings: Any
) -> Budget:
    """A step of two parameters, one of them small; dtypes of parameter, gradient and moments."""

    def call() -> None:
        make = testing.Maker(torch.float32)
        sizes = (400, 410), (777,)
        lists = [[make.normal(*s).to(t) for s in sizes] for t in (*dtypes, dtypes[-1])]
        lists[3] = [v.abs() for v in lists[3]]
        masters = [p.float() for p in lists[0]] if master else None
        pyfast.adamw_step_(*lists, 3, masters=masters, **settings)

    return Budget(f"adamw_step_/{name}", RUN_FOR[dtypes[0]], call)


MATMULS = ("linear_act", "gradient_product", "linear_glu", "glu_backward", "logit_tiles")


@contextlib.contextmanager
def large_tiles() -> Iterator[None]:
    """Products take the tiles of large matrices, whatever their size."""
    config = triton_rooms._module("matmul").launch_config
    size = 1 << 16

    def as_if_large(capability: Any, dtype: torch.dtype, *_: int) -> Any:
        return config(capability, dtype, size, size, size)

    with contextlib.ExitStack() as stack:
        for name in MATMULS:
            module = triton_rooms._module(name)
            stack.enter_context(mock.patch.object(module, "launch_config", as_if_large))
        backward = triton_rooms._module("gradient_product")
        stack.enter_context(mock.patch.object(backward, "split_count", lambda *_: 1))
        yield


def tensor_budget(case: testing.Case, capability: int, **settings: Any) -> Budget:
    """Forward and backward of a case in bfloat16 with large tiles; sm_100 compiles as sm_90."""
    call = functools.partial(_forward_and_backward, case, torch.bfloat16)
    compiled_for = (80,) if capability == 80 else (90, 100)
    settings = {"processors": 2, "large": True, "compiled_for": compiled_for} | settings
    return Budget(f"{case} sm_{capability}", capability, call, **settings)


# The kernel of gradients by the capability a budget is run for: wgmma reads by tensor map.
GRADIENTS = {80: "gradient_product_kernel", 90: "mapped_gradient_kernel"}


def linear_act_budget(m: int, k: int, n: int, act: str, capability: int) -> Budget:
    product = 2 * m * k * n
    useful = {"_linear_act_forward_kernel": product, GRADIENTS[capability]: 2 * product}
    return tensor_budget(testing.linear_act(m, k, n, act), capability, useful=useful)


def linear_glu_budget(m: int, k: int, n: int, capability: int) -> Budget:
    names = "_linear_glu_forward_kernel", "_glu_input_gradient_kernel", GRADIENTS[capability]
    useful = dict.fromkeys(names, 4 * m * k * n)
    return tensor_budget(testing.linear_glu(m, k, n), capability, useful=useful)


def linear_cross_entropy_budget(rows: int, k: int, classes: int, capability: int) -> Budget:
    product = 2 * rows * k * classes
    useful = {"_logit_tiles_kernel": product, "_slab_kernel": product}
    useful[GRADIENTS[capability]] = 2 * product
    case = all_count(testing.linear_cross_entropy(rows, k, classes, bias=True))
    return tensor_budget(case, capability, useful=useful)


def attention_budget(time: int, size: int, capability: int) -> Budget:
    """Causal, two heads of queries on one of keys; half of each tile on the diagonal is for naught.

    Two products forward, three for dQ and four for dK and dV.
    """
    heads = 2
    each = 2 * heads * size * time * (time + 1) // 2
    names = (f"_attention_{k}_kernel" for k in ("forward", "backward_dq", "backward_dkdv"))
    useful = {name: each * count for name, count in zip(names, (2, 3, 4), strict=True)}
    tiles = dict.fromkeys(useful, 64) | {"_attention_forward_kernel": 64 if size > 128 else 128}
    if capability == 90 and size > 64:
        tiles["_attention_forward_kernel"] = 128
        tiles["_attention_backward_dkdv_kernel"] = 128 if size <= 128 else 64
    more = {name: {"multiplied": 1 + tile / time} for name, tile in tiles.items()}
    case = testing.attention(1, heads, time, size, kv=1, causal=True)
    return tensor_budget(case, capability, useful=useful, more=more)


F, B = torch.float32, torch.bfloat16
RUN_FOR = {F: 80, B: 90}
# 768, 1000: rows of whole sectors and not; 1023: odd. 512 rows on one processor: 64 or 128 for each
# program, as of 100,000 rows on a large GPU. 50257: GPT-2's, odd. 5 classes in 8 are one sector.
BUDGETS = [
    case_budget(testing.norm("layer_norm", 512, 768), B),
    case_budget(testing.norm("layer_norm", 512, 1000, residual=True), B),
    case_budget(testing.norm("rms_norm", 512, 1023), B),
    case_budget(testing.norm("rms_norm", 512, 768, residual=True), F),
    case_budget(testing.cross_entropy(3, 50257), B),
    case_budget(testing.cross_entropy(3, 50257, label_smoothing=0.1), F),
    case_budget(testing.cross_entropy(3, 32000), B),
    case_budget(testing.rope(2, 4, 32, 64), B),
    case_budget(testing.rope(2, 4, 32, 128, interleaved=True), F),
    adamw_budget("float32", (F, F, F), False),
    adamw_budget("bfloat16 with masters, clipped", (B, B, F), True, max_norm=1.0),
    # Depth 1024: what a weight gradient is summed over is long, its bias gradient once per tile.
    linear_act_budget(1024, 256, 256, "none", 80),
    linear_act_budget(1024, 256, 256, "relu", 80),
    linear_act_budget(256, 256, 256, "gelu", 90),
    linear_act_budget(1024, 256, 256, "relu", 90),
    *(linear_glu_budget(256, 256, 256, c) for c in (80, 90)),
    *(linear_cross_entropy_budget(1024, 256, 512, c) for c in (80, 90)),
    *(attention_budget(256, size, c) for size in (64, 128, 256) for c in (80, 90)),
]
