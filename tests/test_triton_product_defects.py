"""Defects put into the Triton sources of products and attention: each must be caught."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyfast
from pyfast import reference, testing
from tests.test_triton_defects import budget, mutated, value

pytest.importorskip("triton", reason="needs triton")

import triton

from tests.emulator.triton import emulated
from tests.triton_budget_cases import large_tiles


def forward(case: testing.Case) -> Callable[[], None]:
    """A check: the result alone, close to the reference's."""

    def check() -> None:
        inputs = case.inputs(torch.bfloat16)
        with emulated():
            ours = getattr(pyfast, case.op)(**inputs)
        theirs = getattr(reference, case.op)(**inputs)
        assert torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)

    return check


def both(case: testing.Case) -> Callable[[], None]:
    """A check: result and gradients."""
    return functools.partial(value, case, torch.bfloat16)


def large_backward(act: str) -> None:
    """Gradients with the tiles of large operands, on wgmma, the derivative and sums on the way."""
    dy, x = torch.randn(256, 256).bfloat16(), torch.randn(256, 128).bfloat16()
    args: tuple[Any, ...] = (dy, x, torch.randn(256, 128).bfloat16(), dy, act, True, True, True)
    with emulated(90), large_tiles():
        torch.ops.pyfast.linear_act_backward(*args)


def large_forward() -> None:
    """The result with the tiles of large operands, by map."""
    x, weight = torch.randn(128, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    with emulated(90), large_tiles():
        ours = pyfast.linear_act(x, weight)
    assert torch.allclose(ours.float(), x.float() @ weight.float().t(), rtol=2e-2, atol=2e-2)


def ignored_rows() -> None:
    """nan in a row that is ignored touches no gradient, on wgmma."""
    x, weight = torch.randn(40, 32).bfloat16(), torch.randn(64, 32).bfloat16().requires_grad_()
    x[20:] = float("nan")
    target = torch.arange(40).where(torch.arange(40) < 20, -100)
    with emulated(90):
        pyfast.linear_cross_entropy(x, weight, target).backward()
    assert weight.grad.isfinite().all()


stream = testing.attention(1, 1, 20, 16, tk=300)
attend = testing.attention(1, 2, 70, 16, kv=1, causal=True)
project = testing.linear_act(37, 29, 53, "relu")
gate = testing.linear_glu(9, 24, 21, bias=True)
score = testing.linear_cross_entropy(19, 24, 131, bias=True, label_smoothing=0.1)

# (what is wrong, file, text, replacement, the check that must fail)
DEFECTS = [
    (
        "the running sum of attention not rescaled",
        "attention.py",
        "total = total * correction + tl.sum(p, axis=1)",
        "total = total + tl.sum(p, axis=1)",
        forward(stream),
    ),
    (
        "the output of attention not rescaled",
        "attention.py",
        "acc * correction[:, None]",
        "acc",
        forward(stream),
    ),
    (
        "a query does not see its own key",
        "attention_scores.py",
        "tl.where(key_offs <= query_offs, s",
        "tl.where(key_offs < query_offs, s",
        forward(attend),
    ),
    (
        "keys past the last take part",
        "attention.py",
        's = tl.where(key_offs[None, :] < keys, s, float("-inf"))',
        "s += 0.0",
        forward(testing.attention(1, 1, 5, 16, tk=37)),
    ),
    (
        "rows of a head past its last",
        "attention_scores.py",
        "mask = row_offs[:, None] < rows",
        "mask = row_offs[:, None] <= rows",
        forward(attend),
    ),
    (
        "blocks of keys that no query sees",
        "attention.py",
        "end, whole = tl.minimum(keys, (block + 1) * BLOCK_M)",
        "end, whole = keys + 0 * block",
        functools.partial(budget, "attention/1x2:1x256x64 causal sm_80"),
    ),
    (
        "only the first head that shares its keys",
        "attention_backward.py",
        "head = kv_head * group + step // steps",
        "head = kv_head * group + 0 * step",
        both(attend),
    ),
    (
        "the softmax taken for constant in the gradient of the keys",
        "attention_backward.py",
        "precision=PRECISION) - delta[None, :])",
        "precision=PRECISION))",
        both(attend),
    ),
    (
        "one step too deep",
        "matmul.py",
        "(k_offs < A_K - start)",
        "(k_offs <= A_K - start)",
        forward(project),
    ),
    (
        "the last group of tiles taken for a whole one",
        "matmul.py",
        "rows = tl.minimum(row_tiles - first_row, GROUP_M)",
        "rows = tl.minimum(row_tiles, GROUP_M) + 1",
        forward(testing.linear_act(130, 29, 150, "relu")),
    ),
    (
        "parts of a product that overlap",
        "gradient_kernels.py",
        "tl.minimum((split + 1) * split_k, K)",
        "K",
        both(testing.linear_act(1100, 24, 72, "none")),
    ),
    (
        "a changed operand that is not passed on through swizzled memory",
        "gradient_kernels.py",
        "a = fence(wide.to(a.dtype))",
        "a = wide.to(a.dtype)",
        functools.partial(budget, "linear_act/1024x256->256 relu sm_80"),
    ),
    (
        "registers changed that a wgmma still reads",
        "gradient_kernels.py",
        "acc = settled(acc)",
        "pass",
        functools.partial(large_backward, "relu"),
    ),
    (
        "a tile copied over what a wgmma still reads",
        "gradient_kernels.py",
        "acc = settled(acc)",
        "pass",
        functools.partial(large_backward, "none"),
    ),
    (
        "the right half of a tile stored over the left",
        "linear_act.py",
        "row, col + acc.shape[1] // 2",
        "row, col",
        large_forward,
    ),
    (
        "copied rows that end in what was there",
        "packing.py",
        "(col_offs < width)",
        "(col_offs < cols)",
        forward(project),
    ),
    (
        "copied rows that do not count",
        "packing.py",
        "there = row_offs < tl.load(count_ptr)",
        "there = mask",
        ignored_rows,
    ),
    (
        "one bias for gate and up",
        "linear_glu.py",
        "up = _with_bias(up, up_bias_ptr, col, N)",
        "up = _with_bias(up, gate_bias_ptr, col, N)",
        forward(gate),
    ),
    (
        "the gate not activated in the gradient of up",
        "glu_backward.py",
        "dup = dy * activated",
        "dup = dy * gate",
        both(gate),
    ),
    (
        "tiles of logits put together without their maxima",
        "logit_tiles.py",
        "total = total * tl.exp(peak - top) + tile_total * tl.exp(tile_peak - top)",
        "total = total + tile_total",
        forward(score),
    ),
    (
        "the target's part not smoothed in the gradient",
        "logit_tiles.py",
        "hit = g * (1.0 - smoothing) * own",
        "hit = g * own",
        both(score),
    ),
    (
        "gradients of rows left in the order of the work",
        "linear_cross_entropy.py",
        "dx.index_copy_(0, p.index, summed.to(dx.dtype))",
        "dx.copy_(summed)",
        both(score),
    ),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "check"),
    [defect[1:] for defect in DEFECTS],
    ids=[defect[0] for defect in DEFECTS],
)
def test_defect_is_caught(file, old, new, check, tmp_path, request) -> None:
    if "registers changed" in request.node.name and not triton.__version__.startswith("3.7."):
        pytest.skip("Triton waits by itself since 3.8 before it changes what a wgmma still reads")
    with mutated(tmp_path, file, old, new), pytest.raises(AssertionError):
        check()


def test_sources_as_they_are_pass(tmp_path) -> None:
    """In a copy too: what the defects fail by are the defects."""
    checks = {id(defect[4]): defect[4] for defect in DEFECTS}.values()
    with mutated(tmp_path, "matmul.py", "row_tiles", "row_tiles"):
        for check in checks:
            check()
