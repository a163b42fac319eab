"""Rows of every length move once, in whole sectors: kernels bound by memory, over many sizes."""

import pytest
import torch

import pyfast
from pyfast import testing
from tests.cuda_lanes import needs_emulator
from tests.emulator.cuda import Launch, emulated
from tests.run_case import results

pytestmark = needs_emulator

CACHE = 64 * 1024  # bytes: far less than any level 2, as in the budgets
B, H, F = torch.bfloat16, torch.float16, torch.float32


def moved_once(
    case: testing.Case, dtype: torch.dtype, capability: int, banks: float = 1.05
) -> None:
    """Of each large launch: bytes move once through a small cache, and sectors are used whole."""
    with emulated(capability, processors=1, cache_bytes=CACHE) as log, pyfast.using("cuda"):
        results(case, getattr(pyfast, case.op), case.inputs(dtype))

    def least(launch: Launch) -> int:
        return launch.stats.distinct_read + launch.stats.distinct_written

    for launch in log:
        if least(launch) * 50 < sum(map(least, log)):
            continue
        moved = launch.stats.dram_read + launch.stats.dram_written
        assert moved <= 1.02 * least(launch), launch.name
        assert launch.stats.sector_efficiency >= 0.97, launch.name
        assert launch.stats.bank_factor <= banks, launch.name


# Rows that are taken in runs: with 1 to 32 lanes and up to three packs each, of whole packs and
# sectors and not; the longest of either size. Of tiny rows, which fill no warp, single elements at
# both ends meet in the banks of shared memory.
SHORT = [(1, B), (5, F), (8, B), (17, H), (17, F), (24, B), (31, H), (33, F), (64, B), (65, H)]
SHORT += [(100, F), (127, B), (129, F), (255, H), (257, B), (263, F), (381, F), (500, H)]
SHORT += [(513, B), (703, H), (761, B)]


@pytest.mark.parametrize(("cols", "dtype"), SHORT, ids=str)
def test_short_rows_move_their_bytes_once(cols, dtype) -> None:
    op, residual = ("rms_norm", "layer_norm")[cols // 2 % 2], cols % 4 == 1
    rows = min(4096, max(256, 131072 // cols) + cols % 16)
    case = testing.norm(op, rows, cols, residual=residual)
    moved_once(case, dtype, 80 if dtype == F else 90, 1.05 if cols > 100 else 1.5)


# Borders of the kernels and of sectors with their neighbours, and primes. Weight and bias are read
# once for each distance of a row from a sector: 32 rows of each hide that in float32, but 64 are
# wanted of 16 bits past 2048 columns.
WIDTHS = (763, 769, 990, 991, 1007, 1023, 1025, 1537, 2047, 2049, 3001)
NORMS = [
    (op, 512, cols, dtype, (i + j) % 3 == 1)
    for i, cols in enumerate(WIDTHS)
    for j, (op, dtype) in enumerate(
        [
            (("layer_norm", "rms_norm")[i % 2], (B, H)[i // 2 % 2]),
            (("rms_norm", "layer_norm")[i % 2], F),
        ]
    )
]
NORMS += [("layer_norm", 512, 383, F, True), ("rms_norm", 512, 4096, B, False)]
# Past what the registers of a block hold: rows in shared memory, of whole sectors and of any
# length; past 16384 columns (24576 in rms_norm) backward is two launches over strips.
NORMS += [("layer_norm", 64, 8224, B, True), ("rms_norm", 32, 16391, H, False)]
NORMS += [("rms_norm", 96, 8199, B, False), ("layer_norm", 24, 16383, H, False)]
NORMS += [("rms_norm", 256, 4099, F, False), ("layer_norm", 40, 8191, F, True)]


@pytest.mark.parametrize(("op", "rows", "cols", "dtype", "residual"), NORMS, ids=str)
def test_norms_of_any_length_move_their_bytes_once(op, rows, cols, dtype, residual) -> None:
    case = testing.norm(op, rows, cols, residual=residual)
    moved_once(case, dtype, 80 if dtype == F else 90)


# the vocabulary of GPT-2 with one class more; past 65536 a row is of several blocks
LOSSES = [(16, 991, F), (16, 1003, H), (16, 1025, B), (16, 2047, F), (16, 4097, B), (8, 8191, H)]
LOSSES += [(8, 16385, F), (3, 50258, B), (2, 65537, B), (2, 131071, F)]


@pytest.mark.parametrize(("rows", "cols", "dtype"), LOSSES, ids=str)
def test_cross_entropy_of_any_length_moves_its_bytes_once(rows, cols, dtype) -> None:
    moved_once(testing.cross_entropy(rows, cols), dtype, 80 if dtype == F else 90)


LONG = [("layer_norm", 8199, B), ("rms_norm", 8193, H), ("layer_norm", 8209, F)]
LONG += [("rms_norm", 16391, B), ("layer_norm", 13003, H)]


@pytest.mark.parametrize(("op", "cols", "dtype"), LONG, ids=str)
def test_long_rows_are_read_once(op, cols, dtype) -> None:
    """Forward, one launch of any length: the weight is kept with the row."""
    inputs = testing.norm(op, 64, cols).inputs(dtype)
    machine = emulated(80, processors=1, cache_bytes=CACHE)
    with torch.no_grad(), machine as log, pyfast.using("cuda"):
        getattr(pyfast, op)(**inputs)
    (launch,) = log
    moved = launch.stats.dram_read + launch.stats.dram_written
    assert moved <= 1.02 * launch.stats.compulsory
    size = inputs["input"].element_size()
    assert launch.stats.load_bytes <= 1.02 * size * (64 + 2) * cols
    assert launch.stats.sector_efficiency >= 0.97


@pytest.mark.parametrize(
    ("op", "cols", "dtype"), [("layer_norm", 8199, B), ("rms_norm", 16416, H)], ids=str
)
def test_gradients_of_long_rows_read_them_once(op, cols, dtype) -> None:
    """In one launch, of row and grad_out."""
    case = testing.norm(op, 32, cols)
    with emulated(90, processors=1, cache_bytes=CACHE) as log, pyfast.using("cuda"):
        results(case, getattr(pyfast, op), case.inputs(dtype))
    _, backward, *sums = log
    assert {launch.name.split("<")[0] for launch in sums} == {"column_sums_kernel"}
    assert backward.stats.load_bytes <= 1.02 * dtype.itemsize * (2 * 32 + 1) * cols


# heads of whole sectors and not; one step of odd lists
@pytest.mark.parametrize(
    ("size", "dtype"), [(64, B), (80, H), (96, F), (128, B), (256, F)], ids=str
)
def test_rope_of_any_size_moves_its_bytes_once(size, dtype) -> None:
    moved_once(testing.rope(2, 4, 128, size), dtype, 80 if dtype == F else 90)


@pytest.mark.parametrize("sizes", [((4099,), (1,), (1021, 3)), ((257, 255), (16385,))], ids=str)
def test_adamw_of_any_sizes_moves_its_bytes_once(sizes) -> None:
    for dtype in (F, B):
        moved_once(testing.adamw(sizes), dtype, 80)
