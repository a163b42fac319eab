"""rope in Triton, on the emulator: what its cases leave open of layouts, heads and splits."""

import pytest
import torch

import pyfast
from pyfast import testing

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import emulated
from tests.triton_lanes import check


@pytest.mark.parametrize("strides", [(132, 16, 33, 1), (136, 17, 34, 1), (141, 16, 32, 1)], ids=str)
def test_rope_reads_strides_with_no_divisor_in_common(strides) -> None:
    """Each but one a multiple of the others' divisor; tables that are slices of wider ones."""
    x = torch.randn(2 * 141).as_strided((2, 2, 4, 16), strides)
    cos, sin = torch.randn(4, 11)[:, 2:10], torch.randn(4, 8)
    with emulated(), pyfast.using("triton"):
        ours = pyfast.rope(x, cos, sin)
    torch.testing.assert_close(ours, pyfast.reference.rope(x, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_takes_more_heads_than_a_program_holds(interleaved) -> None:
    check(testing.rope(1, 70, 1, 64, interleaved=interleaved), torch.bfloat16, 90)


@pytest.mark.parametrize(("processors", "splits"), [(4, 5), (1, 2)])
def test_rope_writes_each_element_once(processors, splits) -> None:
    """Also where the batch is split among programs, of which each has one or several of it."""
    log = check(testing.rope(5, 2, 7, 16), torch.float32, 80, processors=processors)
    for launch in log:
        assert launch.grid[1] == splits
        assert launch.stats.benign_writes == 0
        assert launch.stats.store_bytes == launch.stats.distinct_written
