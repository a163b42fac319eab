"""Defects put into the Triton sources on purpose: each must be caught by what the suite checks."""

import contextlib
import functools
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast import testing, triton_rooms
from tests.run_case import assert_as_good_as_torch

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests import triton_budgets
from tests.emulator.triton import emulated


@contextlib.contextmanager
def mutated(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """The Triton kernels with `old` replaced by `new` in one file, run for CPU tensors."""
    copy = folder / "kernels"
    shutil.copytree(triton_rooms.kernels_dir(), copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert old in text, f"{file} no longer holds {old!r}"
    (copy / file).write_text(text.replace(old, new))
    name = "pyfast.kernels"
    real = {m: sys.modules.pop(m) for m in list(sys.modules) if m.split(".")[:2] == name.split(".")}
    spec = importlib.util.spec_from_file_location(
        name, copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with pyfast.using("triton"):  # rooms registered now are imported from the copy
            yield
    finally:
        for module in [m for m in sys.modules if m.split(".")[:2] == name.split(".")]:
            del sys.modules[module]
        sys.modules.update(real)


def value(case: testing.Case, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients are as good as torch's, and no rule of memory is broken."""
    with emulated():
        assert_as_good_as_torch(case, dtype)


def many_rows() -> None:
    """A program has more rows than it keeps statistics of, the last one fewer."""
    with emulated(processors=1):
        assert_as_good_as_torch(testing.norm("layer_norm", 70, 4096), torch.float32)


def hostile_target() -> None:
    """A target that is no class is not read."""
    with emulated():
        loss = pyfast.cross_entropy(torch.randn(2, 1037), torch.tensor([2**40, 5]), reduction="sum")
    assert loss.isnan()


def budget(name: str) -> None:
    """The counters stay within their limits."""
    b = triton_budgets.budget(name)
    assert not triton_budgets.excesses(b, triton_budgets.counted(b))


@functools.cache
def norm(cols: int, residual: bool = False) -> Callable[[], None]:
    return functools.partial(value, testing.norm("layer_norm", 37, cols, residual=residual))


@functools.cache
def loss(**settings: object) -> Callable[[], None]:
    return functools.partial(value, testing.cross_entropy(9, 1031, **settings))


rope = functools.partial(value, testing.rope(2, 3, 5, 16))
step = functools.partial(value, testing.adamw(((5, 7), (300,)), max_norm=0.5))
smooth = {"label_smoothing": 0.1, "weighted": True}

# (what is wrong, file, text, replacement, the check that must fail)
DEFECTS = [
    (
        "no mask at the ends of a row",
        "norm_tiles.py",
        "values = tl.load(ptrs, mask=mask, other=0.0)",
        "values = tl.load(ptrs)",
        norm(80),
    ),
    (
        "no mask at the ends of a run",
        "norm_tiles.py",
        "run = tl.load(ptrs, mask=mask, other=0.0)",
        "run = tl.load(ptrs)",
        norm(53),
    ),
    (
        "a run that begins in its first sector",
        "norm_tiles.py",
        "mask = (offs >= shift) & (offs < shift + count * n_cols)",
        "mask = offs < shift + count * n_cols",
        norm(531),
    ),
    (
        "a run one row too long",
        "norm_tiles.py",
        "(offs < shift + count * n_cols)",
        "(offs < shift + (count + 1) * n_cols)",
        norm(53),
    ),
    (
        "the next row taken for columns",
        "norm_tiles.py",
        "tl.where(is_col, _turned(run, places, LAYOUT), 0.0)",
        "_turned(run, places, LAYOUT)",
        norm(53),
    ),
    (
        "columns past the row count in the variance",
        "norm.py",
        "v = tl.where(is_col, v - mean[None, :, None], 0.0)",
        "v = v - mean[None, :, None]",
        norm(53),
    ),
    (
        "the gradients of weight and bias in one place",
        "norm.py",
        "partial_ptr += tl.num_programs(0).to(tl.int64) * partial_row_stride",
        "partial_ptr += 0",
        norm(53),
    ),
    (
        "the statistics of the tile before",
        "norm.py",
        "rstds = tl.where(tiles == i, rstd[None, :], rstds)",
        "rstds = tl.where(tiles == i + 1, rstd[None, :], rstds)",
        norm(53),
    ),
    (
        "the statistics of other rows",
        "norm.py",
        "rstd = tl.gather(rstds, begin % STATS + slots, 0)",
        "rstd = tl.gather(rstds, slots, 0)",
        many_rows,
    ),
    (
        "rows past the last of a program",
        "norm_tiles.py",
        "tl.minimum(rows_each, tl.cdiv(n_rows - first, LAYOUT.period)).to(tl.int32)",
        "rows_each",
        many_rows,
    ),
    (
        "statistics of the first rows only",
        "norm.py",
        "rows = begin + tiles * ROWS",
        "rows = tiles * ROWS",
        many_rows,
    ),
    (
        "the sum normalised before it is rounded",
        "norm.py",
        "v = rounded.to(tl.float32)",
        "v = v * 1.01",
        norm(53, residual=True),
    ),
    (
        "the last partial rows left out",
        "column_sums.py",
        "for begin in range(0, n_rows, BLOCK_ROWS)",
        "for begin in range(0, n_rows - BLOCK_ROWS + 1, BLOCK_ROWS)",
        norm(53),
    ),
    (
        "partial rows past the last",
        "column_sums.py",
        "mask = (row_offs < n_rows)[:, None] & col_mask[None, :]",
        "mask = (row_offs <= n_rows)[:, None] & col_mask[None, :]",
        norm(53),
    ),
    (
        "the running sum not rescaled",
        "cross_entropy.py",
        "total *= tl.exp(peak - new_peak)",
        "total *= 1.0",
        functools.partial(value, testing.cross_entropy(3, 9000)),
    ),
    (
        "one class too many",
        "cross_entropy.py",
        "mask = (offs >= 0) & (offs < n_cols)",
        "mask = (offs >= 0) & (offs <= n_cols)",
        loss(),
    ),
    (
        "what is past the columns of short rows counted",
        "cross_entropy_tiles.py",
        "tl.where(is_col, tl.exp(x - _of_rows(top)), 0.0)",
        "tl.exp(x - _of_rows(top))",
        functools.partial(value, testing.cross_entropy(9, 131)),
    ),
    (
        "the last element of a short row taken for the next row's",
        "cross_entropy_tiles.py",
        "row = row_of(slots, n_cols)",
        "row = row_of(slots + 1, n_cols)",
        functools.partial(value, testing.cross_entropy(9, 131)),
    ),
    (
        "the weights of the classes forgotten in the gradient",
        "cross_entropy.py",
        "scale = picked + uniform * tl.load(totals_ptr + 1)",
        "scale = picked + uniform * n_cols",
        loss(**smooth),
    ),
    (
        "ignored rows in the mean",
        "class_weights.py",
        "counts = mask & (target != ignore_index)",
        "counts = mask",
        loss(),
    ),
    (
        "any target read",
        "cross_entropy.py",
        'target, mask=is_class, other=float("nan"))',
        "target)",
        hostile_target,
    ),
    (
        "the gradient turned the same way",
        "rope.py",
        "sin = -sin",
        "sin = sin",
        rope,
    ),
    (
        "heads past the last",
        "rope.py",
        "head_mask = (head_offs < n_heads)[:, None]",
        "head_mask = (head_offs <= n_heads)[:, None]",
        rope,
    ),
    (
        "elements stored while other threads may still load them",
        "adamw.py",
        "offs = whole + tl.arange(0, TAIL_BLOCK)",
        "offs = whole + tl.arange(0, TAIL)",
        step,
    ),
    (
        "the tail stepped twice",
        "adamw.py",
        "total += _update(arrays, numbers, clip, offs, offs < whole,",
        "total += _update(arrays, numbers, clip, offs, offs < end,",
        step,
    ),
    (
        "no clipping",
        "adamw.py",
        "(grad_factor * clip.to(keep.dtype))",
        "grad_factor",
        step,
    ),
    (
        "runs not read from the sector they begin in",
        "norm_tiles.py",
        "return ptr + (start - shift) + offs, mask, shift",
        "return ptr + start + offs, offs < count * n_cols, 0",
        functools.partial(budget, "rms_norm/512x1023 bfloat16"),
    ),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "check"),
    [defect[1:] for defect in DEFECTS],
    ids=[defect[0] for defect in DEFECTS],
)
def test_defect_is_caught(file, old, new, check, tmp_path) -> None:
    with mutated(tmp_path, file, old, new), pytest.raises(AssertionError):
        check()


def test_sources_as_they_are_pass(tmp_path) -> None:
    """In a copy too: what the defects fail by are the defects."""
    with mutated(tmp_path, "norm.py", "n_cols", "n_cols"):
        for check in dict.fromkeys(defect[4] for defect in DEFECTS):
            check()
