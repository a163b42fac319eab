"""Traffic whose bytes are known exactly, the same wherever memory lies; and branch tables."""

import pytest
import torch

from tests.emulator import Module, Stats, Unsupported, library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")

SWEEP = """
.version 8.4
.target sm_80
.address_size 64
.visible .entry sweep(.param .u64 x, .param .u64 out, .param .u32 passes, .param .u32 chunks)
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [out];
    ld.param.u32 %r1, [passes];
    ld.param.u32 %r2, [chunks];
    mov.u32 %r3, %tid.x;
    mul.wide.u32 %rd3, %r3, 16;
    add.u64 %rd1, %rd1, %rd3;
    add.u64 %rd2, %rd2, %rd3;
PASS:
    mov.u32 %r4, 0;
CHUNK:
    mul.wide.u32 %rd4, %r4, 512;
    add.u64 %rd5, %rd1, %rd4;
    add.u64 %rd6, %rd2, %rd4;
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd5];
    st.global.v4.b32 [%rd6], {%r5, %r6, %r7, %r8};
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, %r2;
    @%p1 bra CHUNK;
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra PASS;
    ret;
}
"""
CHUNKS = 16
SIZE = 512 * CHUNKS  # bytes of x and of out


def sweep(passes: int, l2_bytes: int, offset: int = 0) -> Stats:
    """One warp copies x to out, from the first byte to the last, `passes` times."""
    memory = torch.randn(2, SIZE // 4 + offset)
    x, out = memory[:, offset:]
    stats = Module(SWEEP).launch("sweep", 1, 32, [x, out, passes, CHUNKS], l2_bytes=l2_bytes)
    assert torch.equal(x, out)
    return stats


@pytest.mark.parametrize(
    ("passes", "l2_bytes", "read", "written"),
    [
        (1, 0, 1, 1),  # 0: everything stays
        (3, 0, 1, 1),
        (1, 1024, 1, 1),
        (3, 1024, 3, 3),  # two chunks: nothing is there when it is wanted again
        (3, 2 * SIZE, 1, 1),  # both fit, to the byte
        (3, 2 * SIZE - 32, 3, 3),  # one sector less, and the oldest is always the next one wanted
    ],
)
def test_dram_bytes_are_what_does_not_stay(passes, l2_bytes, read, written) -> None:
    stats = sweep(passes, l2_bytes)
    assert (stats.dram_read, stats.dram_written) == (read * SIZE, written * SIZE)
    assert stats.load_bytes == stats.store_bytes == passes * SIZE
    assert stats.load_sectors == stats.store_sectors == passes * SIZE // 32
    assert stats.distinct_read == stats.distinct_written == SIZE


@pytest.mark.parametrize("l2_bytes", [0, 1024])
def test_what_was_read_and_then_written_goes_back(l2_bytes) -> None:
    x = torch.randn(SIZE // 4)
    stats = Module(SWEEP).launch("sweep", 1, 32, [x, x, 1, CHUNKS], l2_bytes=l2_bytes)
    assert (stats.dram_read, stats.dram_written) == (SIZE, SIZE)


def test_counters_do_not_depend_on_addresses_or_on_what_ran_before() -> None:
    first = sweep(2, 4096)
    sweep(3, 0, offset=4)  # 16 bytes on: other sectors, and nothing of it may stay
    for offset in (0, 8, 64, 1000):  # multiples of a sector
        assert sweep(2, 4096, offset) == first
    assert (
        sweep(1, 0, offset=4).load_sectors == SIZE // 32 + CHUNKS
    )  # every chunk begins in one more


JUMP = """
.version 8.4
.target sm_80
.address_size 64
.visible .entry jump(.param .u64 out)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.u64 %rd1, %rd1, %rd2;
    and.b32 %r2, %r1, 3;
$L_table: TABLE
    brx.idx %r2, $L_table;
$L_a:
    mov.u32 %r3, 10;
    bra.uni $L_end;
$L_b:
    mov.u32 %r3, 20;
    bra.uni $L_end;
$L_c:
    mov.u32 %r3, 30;
$L_end:
    st.global.u32 [%rd1], %r3;
    ret;
}
"""


@pytest.mark.parametrize(
    "table",
    [
        ".branchtargets $L_a, $L_b, $L_c, $L_a;",
        "\n\t.branchtargets\n\t$L_a,\n\t$L_b,\n\t$L_c,\n\t$L_a;",  # as newer compilers write it
    ],
    ids=["one line", "many lines"],
)
def test_branch_tables(table) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    stats = Module(JUMP.replace("TABLE", table)).launch("jump", 1, 32, [out])
    assert out.tolist() == [10, 20, 30, 10] * 8
    assert stats.store_sectors == 4  # of all lanes together, where their paths have joined


def test_branch_without_a_table_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="branchtargets"):
        Module(JUMP.replace("TABLE", ""))
