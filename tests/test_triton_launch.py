"""The launch configurations: pure functions, right for every size."""

import pytest

from pyfast import triton_rooms

pytest.importorskip("triton", reason="needs triton")
norm, norm_wide, cross_entropy, rope = map(
    triton_rooms._module, ("norm", "norm_wide", "cross_entropy", "rope")
)

COLS = [1, 2, 3, 7, 8, 16, 31, 33, 53, 64, 100, 511, 512, 513, 768, 1000, 1023, 1024, 4095, 8191]
COLS += [8192]
ITEMS = pytest.mark.parametrize("itemsize", [2, 4])


@ITEMS
@pytest.mark.parametrize("cols", COLS)
def test_norm_tiles_cover_their_rows(cols, itemsize) -> None:
    if not norm.fits(cols, itemsize):
        assert cols > 8192 - 32 // itemsize
        return
    for rows, processors in ((1, 132), (5, 1), (1000, 4), (100_000, 132)):
        config = norm.launch_config(rows, cols, itemsize, processors)
        tile, sector = config.layout, 32 // itemsize
        assert config.programs * config.rows_each >= rows
        assert cols % tile.group == 0 and tile.sector == sector
        assert config.rows_each % tile.rows == 0 and config.tiles * tile.rows >= 8
        assert config.stats % tile.rows == 0 and tile.rows <= config.stats
        assert config.programs <= max(tile.period, 64 * processors)
        assert tile.period * cols % sector == 0 or tile.run  # the weight lies like every row
        if tile.run:
            furthest = max(i * tile.rows * cols % sector for i in range(sector))
            assert tile.run >= furthest + tile.rows * cols and tile.period == 1
            assert cols * tile.run < 2**31  # places are divided by a product
        furthest = 0 if tile.run else sector - tile.group
        assert tile.each * tile.side >= -(-cols // 8) * 8 + furthest
        assert tile.each * tile.rows * tile.side <= 16 * 32 * config.num_warps


@ITEMS
def test_norm_programs_fill_the_processors(itemsize) -> None:
    config = norm.launch_config(100_000, 4096, itemsize, 132)
    assert 0.95 <= config.programs * config.num_warps / (132 * 32) <= 1
    assert config.rows_each % 8 == 0  # whole sectors of statistics
    assert norm.launch_config(300, 4096, itemsize, 132).rows_each == 2  # first of all busy
    few = norm.launch_config(2000, 64, itemsize, 132)
    assert few.rows_each == few.layout.rows and few.programs > 60


def test_wide_norm_has_a_part_for_every_program() -> None:
    for rows, cols in ((1, 8193), (7, 16384), (5000, 100_000)):
        config = norm_wide.launch_config(rows, cols, 2, 132)
        period = config.sector // config.group
        assert config.parts % period == 0 and 1 <= config.parts < rows + period
        assert config.strips * norm_wide.STRIP_COLS >= cols + config.sector - config.group


@ITEMS
def test_cross_entropy_reads_16_bytes_where_rows_allow(itemsize) -> None:
    for cols in (32000, 50304, 128256):
        config = cross_entropy.launch_config(cols, cols, itemsize, 0)
        assert config.group * itemsize >= 16
        assert config.width == 32 * config.num_warps * 16 // itemsize
    odd = cross_entropy.launch_config(50257, 50257, itemsize, 0)
    assert odd.group == 1 and odd.chunks < config.chunks
    assert cross_entropy.launch_config(32000, 32001, itemsize, 0).group == 1
    assert cross_entropy.launch_config(32000, 32000, itemsize, itemsize).group == 1


def test_cross_entropy_of_few_classes_takes_one_warp() -> None:
    assert cross_entropy.launch_config(10, 10, 4, 0).num_warps == 1
    assert cross_entropy.launch_config(200_000, 200_000, 2, 0).num_warps == 8


def test_rope_splits_the_batch_only_where_positions_are_few() -> None:
    def config(batch: int, length: int):
        strides = (length * 12 * 64, 64, 12 * 64, 1)
        return rope.launch_config((batch, 12, length, 64), strides, 2, 0, 132)

    assert config(8, 4096).splits == 1
    assert config(64, 1).splits == 64
    assert config(1, 1).splits == 1
    assert config(8, 4096).group == 8


def test_rope_groups_divide_every_offset() -> None:
    for size, stride in ((64, 64), (80, 240), (10, 10), (64, 65)):
        group = rope.launch_config((2, 3, 5, size), (15 * stride, stride, 3 * stride, 1), 2, 0, 4)
        assert stride % group.group == 0 and (size // 2) % group.group == 0
        assert group.block_half >= size // 2
