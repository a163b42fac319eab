"""Defects compiled into the CUDA kernels (-DPYFAST_MUTANT=n): each must be caught by the checks."""

import functools
import re
from collections.abc import Callable

import pytest
import torch

import pyfast
from pyfast import testing
from tests import test_cuda_attention_defects, test_cuda_gemm
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import ROOT, emulated
from tests.run_case import assert_as_good_as_torch

pytestmark = needs_emulator


def value(case: testing.Case, mutant: tuple[str, int] | None, dtype=torch.float32) -> None:
    """Values and gradients are as good as torch's, and no rule of memory is broken."""
    with emulated(mutant=mutant), pyfast.using("cuda"):
        assert_as_good_as_torch(case, dtype)


def hostile_target(mutant: tuple[str, int] | None) -> None:
    """A target that is no class is not read."""
    with emulated(mutant=mutant), pyfast.using("cuda"):
        loss = pyfast.cross_entropy(torch.randn(2, 37), torch.tensor([2**40, 5]), reduction="sum")
    assert loss.isnan()


def skipped(mutant: tuple[str, int] | None) -> None:
    """No step where infinity was found."""
    lists = [[torch.ones(5)] for _ in range(4)]
    with emulated(mutant=mutant), pyfast.using("cuda"):
        pyfast.adamw_step_(*lists, 1, found_inf=torch.ones(()))
    assert torch.equal(lists[0][0], torch.ones(5))


def rows_of_nan(mutant: tuple[str, int] | None) -> None:
    """They leave the rows beside them alone, which share words with them."""
    x = torch.randn(4, 8201, dtype=torch.bfloat16)
    x[1::2] = float("nan")
    with emulated(mutant=mutant), pyfast.using("cuda"):
        out = pyfast.layer_norm(x, (8201,))
    assert out[::2].isfinite().all()


def norm(cols: int) -> Callable[..., None]:
    return functools.partial(value, testing.norm("layer_norm", 37, cols))


def loss(rows: int, classes: int, **settings: object) -> Callable[..., None]:
    return functools.partial(value, testing.cross_entropy(rows, classes, **settings))


glu = functools.partial(value, testing.linear_glu(19, 24, 21, bias=True))
# 600 classes: ten tiles, more than a thread of the join has of them
score = functools.partial(
    value, testing.linear_cross_entropy(19, 24, 600, bias=True, label_smoothing=0.1)
)
rope = functools.partial(value, testing.rope(2, 3, 5, 16))
step = functools.partial(value, testing.adamw(((5, 7), (300,)), max_norm=0.5))

# (what is wrong, file, number, the check that must fail)
DEFECTS = [
    ("no barrier before partial sums are read", "layer_norm", 1, norm(530)),
    ("columns past the row in the variance", "layer_norm", 2, norm(530)),
    ("gradients of weight and bias in one place", "layer_norm", 3, norm(530)),
    ("no barrier before the statistics are read", "layer_norm", 4, norm(528)),  # one team
    ("a column past a long row, of its neighbour", "layer_norm", 6, rows_of_nan),
    ("long rows measured before they have come", "layer_norm", 14, norm(8201)),
    ("long rows measured before all threads have theirs", "layer_norm", 15, norm(8201)),
    ("a long row stored before it is made", "layer_norm", 16, norm(8201)),
    ("a long row fetched where one is being stored", "layer_norm", 17, norm(8201)),
    ("long rows read before all threads have theirs", "layer_norm", 10, norm(8201)),
    ("a gradient of a long row stored before it is made", "layer_norm", 11, norm(8201)),
    ("a long row fetched in the place of one being stored", "layer_norm", 12, norm(8201)),
    ("long rows read before they have come", "layer_norm", 13, norm(5001)),
    ("a row of a run written before its neighbour is read", "layer_norm", 7, norm(53)),
    ("columns of neighbours in a row of a run", "layer_norm", 8, norm(53)),
    ("a gradient written before its neighbour is read", "layer_norm", 9, norm(53)),
    ("the running sum not rescaled", "cross_entropy", 1, loss(3, 9000)),
    ("any target read", "cross_entropy", 2, hostile_target),
    ("weights forgotten in the gradient", "cross_entropy", 3,
     loss(9, 131, label_smoothing=0.1, weighted=True)),
    ("ignored rows in the mean", "cross_entropy", 4, loss(9, 131)),
    ("one class too many", "cross_entropy", 5, loss(9, 131)),
    ("gate and factor exchanged", "linear_glu", 121, glu),
    ("rows past both weights", "linear_glu", 122, glu),
    ("no barrier before columns are read", "linear_glu", 123, glu),
    ("the second weight not from its start", "linear_glu", 124, glu),
    ("rows not gathered", "linear_cross_entropy", 131, score),
    ("classes past the last", "linear_cross_entropy", 132, score),
    ("no barrier before maxima are read", "linear_cross_entropy", 133, score),
    ("the target not told from others", "linear_cross_entropy", 134, score),
    ("tiles joined without a common maximum", "linear_cross_entropy", 135, score),
    ("elements stepped twice", "adamw", 1, step),
    ("no clipping", "adamw", 2, step),
    ("stepped where infinity was found", "adamw", 3, skipped),
    ("heads past the last", "rope", 1, rope),
    ("the gradient turned the same way", "rope", 2, rope),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "number", "check"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS]
)
def test_defect_is_caught(file, number, check) -> None:
    with pytest.raises(AssertionError):
        check((file, number))


@pytest.mark.parametrize("check", [d[3] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_kernels_as_they_are_pass(check) -> None:
    """What the defects fail by are the defects."""
    check(None)


# Those of the products and of attention, whose tests launch single kernels, stand beside these.
ELSEWHERE = {*test_cuda_gemm.DEFECTS, *range(111, 120), 125, 126, 127}
ELSEWHERE |= {number for _, number in test_cuda_attention_defects.DEFECTS}
ELSEWHERE |= set(test_cuda_attention_defects.DECODE_DEFECTS)


def test_every_defect_that_can_be_put_in_has_its_check() -> None:
    planted = [
        int(number)
        for path in (ROOT / "kernels" / "cuda").glob("*.cuh")
        for number in re.findall(r"mutant\((\d+)\)", path.read_text())
    ]
    assert set(planted) == {number for _, _, number, _ in DEFECTS} | ELSEWHERE
    assert len(planted) >= 40
