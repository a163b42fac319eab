"""What orders memory, and what does not, instruction by instruction, as PTX: no nvcc is needed."""

import contextlib

import pytest
import torch

from tests.emulator import Module, Violation, library
from tests.test_emulator_wgmma import TEXT, TYPES, WIDE

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")


def run(body: str, grid: int, block: int, **options: str) -> list[int]:
    """`body` with %t the thread, %x a word of global memory, %s 256 bytes of shared; 64 words."""
    text = f""".version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 x) {{
  .reg .pred %p<3>; .reg .b32 %t; .reg .b32 %s; .reg .b32 %r<6>; .reg .b64 %x; .reg .b64 %own;
  .shared .align 128 .b8 shared[256];
  mov.u32 %t, %tid.x; mov.u32 %s, shared; ld.param.u64 %x, [x];
  mad.wide.u32 %own, %t, 4, %x;
  {body}
  ret;
}}
"""
    words = torch.arange(1, 65, dtype=torch.int32)
    Module(text).launch("k", grid, block, [words], **options)
    return words.tolist()


def raised(words: str | None) -> contextlib.AbstractContextManager:
    return pytest.raises(Violation, match=words) if words else contextlib.nullcontext()


@pytest.mark.parametrize("order", ["relaxed", "acq_rel"])
def test_a_write_waits_for_all_who_read(order) -> None:
    """Two threads read a word and count; the third writes it when it has seen both."""
    seen = "relaxed" if order == "relaxed" else "acquire"
    body = f"""
  setp.eq.u32 %p0, %t, 64;
  @%p0 st.shared.v2.b32 [%s], {{0, 0}};
  bar.sync 0;
  and.b32 %r0, %t, 31; setp.ne.u32 %p1, %r0, 0;
  @%p1 bra $end;
  @%p0 bra $wait;
  ld.shared.b32 %r0, [%s];
  atom.{order}.cta.shared.add.u32 %r1, [%s+4], 1;
  bra $end;
$wait:
  ld.{seen}.cta.shared.b32 %r1, [%s+4];
  setp.lt.u32 %p2, %r1, 2;
  @%p2 bra $wait;
  st.shared.b32 [%s], %t;
$end:"""
    with raised("race.*was read" if order == "relaxed" else None):
        run(body, 1, 96)


@pytest.mark.parametrize("scope", ["cta", "gpu", "sys"])
def test_relaxed_accesses_race_outside_their_scope(scope) -> None:
    body = f"mov.u32 %r0, %ctaid.x; st.relaxed.{scope}.global.b32 [%x], %r0;"
    with raised("race" if scope == "cta" else None):
        run(body, 2, 1)
    run(body, 1, 64)


@pytest.mark.parametrize("late", [False, True])
def test_wgmma_wants_a_fence_after_its_registers(late) -> None:
    instruction, one, _ = TYPES["bf16"]
    text = TEXT.replace("INSTRUCTION", instruction).replace("ONE", one).replace("STORE", WIDE)
    text = text.replace("ROW", "32").replace("PAIR", "8")
    change, fence = "add.u32 %a0, %a0, 0;", "wgmma.fence.sync.aligned;"
    text = text.replace(fence, fence + change if late else change + fence)
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    args = [a.view(torch.uint8), b.view(torch.uint8), torch.zeros(64, 8)]
    with raised("missing wgmma.fence" if late else None):
        Module(text).launch("product", 1, 128, args)


def test_shuffles_tell_which_lanes_are_in_range() -> None:
    found = {}
    for mode, by, clamp in (("up", 3, 0), ("down", 5, 31), ("bfly", 16, 0xF0F), ("idx", 9, 31)):
        body = f"""shfl.sync.{mode}.b32 %r0|%p0, %t, {by}, {clamp}, -1; selp.u32 %r0, 1, 0, %p0;
  st.global.b32 [%own], %r0;"""
        found[mode] = run(body, 1, 32)[:32]
    assert found["up"] == [0] * 3 + [1] * 29 and found["down"] == [1] * 27 + [0] * 5
    # by the ISA a partner counts up to lane & 15 here: those of the upper half are below it
    assert found["bfly"] == [0] * 16 + [1] * 16
    assert found["idx"] == [1] * 32


@pytest.mark.parametrize("wait", ["cp.async.wait_all;", "", "cp.async.wait_group 0;"])
def test_wait_all_waits_for_what_is_in_no_group(wait) -> None:
    body = f"""
  mad.lo.u32 %r0, %t, 4, %s;
  cp.async.ca.shared.global [%r0], [%own], 4;
  {wait}
  ld.shared.b32 %r1, [%r0]; add.u32 %r1, %r1, 100; st.global.b32 [%own], %r1;"""
    with raised(None if "all" in wait else "cp.async"):
        assert run(body, 1, 32)[:32] == list(range(101, 133))


def test_a_copy_that_ignores_its_source_writes_zeros() -> None:
    body = """
  mad.lo.u32 %r0, %t, 4, %s; setp.gt.u32 %p0, %t, 20;
  cp.async.ca.shared.global [%r0], [%own], 4, %p0;
  cp.async.wait_all;
  ld.shared.b32 %r1, [%r0]; st.global.b32 [%own], %r1;"""
    assert run(body, 1, 32)[:32] == [*range(1, 22), *[0] * 11]
