"""Memory-bound Triton kernels move what they must and fill their sectors, for every row length."""

import pytest
import torch

import pyfast
from pyfast import testing

triton = pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import Launch, emulated  # noqa: E402
from tests.run_case import results  # noqa: E402

CACHE = 64 * 1024  # bytes: what is not used again soon moves again
B, H, F = torch.bfloat16, torch.float16, torch.float32
CAPABILITY = {F: 80, B: 90, H: 80}


def launches(case: testing.Case, dtype: torch.dtype, cache: int = CACHE) -> list[Launch]:
    """Forward and backward on one processor, whose programs have as much to do as of real sizes."""
    with (
        emulated(CAPABILITY[dtype], processors=1, cache_bytes=cache) as log,
        pyfast.using("triton"),
    ):
        results(case, getattr(pyfast, case.op), case.inputs(dtype))
    return log


def assert_bars(launch: Launch, asked: float) -> None:
    """By the issue: 1.02 of the bytes, 0.97 of the sectors.

    `asked` are the bytes of all sectors that warps ask for, per byte that must move: lanes that
    load the same number cannot hide half-empty sectors from it, as they can from the efficiency.
    """
    stats = launch.stats
    least = stats.compulsory
    assert (stats.dram_read + stats.dram_written) / least <= 1.02, launch
    assert stats.sector_efficiency >= 0.97, launch
    assert 32 * (stats.load_sectors + stats.store_sectors) / least <= asked, launch


# One row of a tile to 128; rows of whole sectors and 2 to 30 bytes more; one short of and past what
# covers a tile; 513: where a run shares the most with the next; 904 and 452: the first that can be
# loaded 16 bytes at a time and are no runs.
NORMS = [
    *((cols, B) for cols in (5, 64, 129, 255, 257, 512, 513, 776, 904, 1001)),
    *((cols, F) for cols in (1, 31, 263, 512, 513, 1009)),
    *((cols, H) for cols in (8, 333, 1023)),
]


@pytest.mark.parametrize(("cols", "dtype"), NORMS, ids=str)
def test_norms_fill_sectors_for_every_row_length(cols, dtype) -> None:
    """128 rows for each program: the weight is read by each."""
    op = "rms_norm" if cols % 2 else "layer_norm"
    with_residual = cols % 4 == 1
    programs = 16 if dtype == F and cols <= 512 else 8
    rows = programs * 128 if cols > 40 else 2048
    forward, backward, *_ = launches(testing.norm(op, rows, cols, residual=with_residual), dtype)
    assert_bars(forward, 1.05)
    assert_bars(backward, 1.05)


@pytest.mark.parametrize("cols", [4097, 5000])
def test_long_rows_fill_sectors(cols) -> None:
    """Past the runs: each program has rows that begin alike. 128 are enough where no weight is."""
    for launch in launches(testing.norm("layer_norm", 128, cols, affine=False), B):
        assert_bars(launch, 1.05)


@pytest.mark.parametrize(("cols", "dtype"), [(8193, B), (8208, B), (9001, F), (8200, F)], ids=str)
def test_rows_too_wide_for_registers_fill_sectors(cols, dtype) -> None:
    """Of 64 rows, with their weights. Each is read once more: a part of 256 KB of level 2, less
    than a multiprocessor has of it, holds it.
    """
    for launch in launches(testing.norm("layer_norm", 64, cols), dtype, 256 * 1024):
        stats = launch.stats
        assert (stats.dram_read + stats.dram_written) / stats.compulsory <= 1.02, launch
        assert stats.sector_efficiency >= 0.97, launch


@pytest.mark.parametrize("dtype", [B, F], ids=str)
@pytest.mark.parametrize("classes", [1024, 1025, 4095, 32003])
def test_cross_entropy_fills_sectors_from_1024_classes_on(classes, dtype) -> None:
    """A row asks for a sector of its target, its logit, its loss and its pair: of 1025 in bfloat16
    106 bytes more than they are, beside 2050. They move once all the same.
    """
    case = testing.cross_entropy(2**17 // classes, classes)
    found = {launch.name: launch for launch in launches(case, dtype)}
    assert_bars(found["cross_entropy_forward_kernel"], 1.075 if classes < 1536 else 1.05)
    assert_bars(found["cross_entropy_backward_kernel"], 1.05)


@pytest.mark.parametrize("dtype", [B, F], ids=str)
@pytest.mark.parametrize("classes", [2, 10, 17, 64, 100, 128, 255, 257, 520, 999, 1001])
def test_cross_entropy_fills_sectors_below_1024_classes(classes, dtype) -> None:
    """Rows are taken many at a time, with their targets and results, which are loaded once.

    They do not wait for banks either: rows of 64 turned to columns as they lie took 14 times as
    long forward. Of rows short of 128 bytes those that 32 lanes read begin where they do.
    """
    case = testing.cross_entropy(2**16 // max(4, classes), classes)
    found = {launch.name: launch for launch in launches(case, dtype)}
    backward = found["cross_entropy_tile_backward_kernel"]
    forward = found["cross_entropy_tile_forward_kernel"]
    assert_bars(forward, 1.01)
    few = classes * dtype.itemsize < 128
    assert forward.stats.bank_factor <= (1.75 if few else 1.07)
    assert_bars(backward, 1.05)
    assert backward.stats.bank_factor <= 1.1


@pytest.mark.parametrize("dtype", [B, F], ids=str)
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128])
def test_rope_fills_sectors_of_heads_that_are_whole_ones(size, dtype) -> None:
    """Halves that end within a sector are loaded and stored with each other: 0.84 was of 80."""
    case = testing.rope(2, 8, 64, size, interleaved=size % 64 == 0)
    for launch in launches(case, dtype):
        assert_bars(launch, 1.02)


@pytest.mark.parametrize(("size", "least"), [(40, 0.90), (72, 0.89), (66, 0.52)])
def test_rope_of_odd_heads_shares_sectors_with_the_next_head(size, least) -> None:
    """A warp loads 8 or 2 bytes a lane of one or half a head, which begins within a sector; what it
    shares is asked for twice, and the angles' by the program of the next position.
    """
    for launch in launches(testing.rope(2, 8, 64, size), B):
        stats = launch.stats
        assert (stats.dram_read + stats.dram_written) / stats.compulsory <= 1.08, launch
        assert stats.sector_efficiency >= least, launch


@pytest.mark.parametrize("dtype", [B, F], ids=str)
def test_adamw_fills_sectors_of_odd_parameters(dtype) -> None:
    """What it finishes with is a few numbers and no traffic."""
    update, *_ = launches(testing.adamw(((401, 411), (777,), (1,))), dtype)
    assert update.name == "adamw_update_kernel"
    assert_bars(update, 1.05)
