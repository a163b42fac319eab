"""Lanes, barriers, atomics, address spaces, calls and control flow on the emulator."""

import numpy as np
import pytest
import torch

from tests.emulator import Module, library, nvcc
from tests.test_emulator_instructions import SOURCE

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
LANE = torch.arange(32)


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


def ints(*shape: int, low: int = -1000, high: int = 1000) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32)


def test_shuffles(module: Module) -> None:
    a, o = ints(32), torch.zeros(4, 32, dtype=torch.int32)
    module.launch("shuffles", 1, 32, [a, o])
    assert torch.equal(o[0], a[LANE ^ 5])
    assert torch.equal(o[1], a[torch.where(LANE >= 3, LANE - 3, LANE)])
    assert torch.equal(o[2], a[torch.where(LANE % 8 < 5, LANE + 3, LANE)])
    assert torch.equal(o[3], a[LANE // 16 * 16 + 13])


def test_votes(module: Module) -> None:
    a, o = ints(32, low=0), torch.zeros(4, 32, dtype=torch.int32)
    module.launch("votes", 1, 32, [a, o])
    ballot = sum(1 << i for i in range(32) if a[i] & 1)
    assert (o[0] == np.int64(ballot).astype(np.int32).item()).all()
    assert (o[1] == 2).all()
    same = [sum(1 << j for j in range(32) if a[j] % 5 == a[i] % 5) for i in range(32)]
    assert o[2].tolist() == np.array(same, dtype=np.uint32).view(np.int32).tolist()
    assert o[3].tolist() == [127] * 7 + [0] * 25


def test_reductions(module: Module) -> None:
    a, o = ints(32), torch.zeros(4, 32, dtype=torch.int32)
    module.launch("reductions", 1, 32, [a, o])
    unsigned = a.numpy().view(np.uint32)
    assert (o[0] == a.sum()).all() and (o[1] == a.min()).all()
    assert (o[2].numpy().view(np.uint32) == unsigned.max()).all()
    assert (o[3].numpy().view(np.uint32) == np.bitwise_xor.reduce(unsigned)).all()


def test_elect_chooses_the_lowest_member() -> None:
    ptx = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry elect(.param .u64 p) {
  .reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<3>;
  ld.param.u64 %rd0, [p];
  mov.u32 %r0, %laneid;
  setp.lt.u32 %p0, %r0, 4;
  @%p0 bra $out;
  elect.sync %r1|%p1, 0xfffffff0;
  selp.u32 %r2, 100, 0, %p1;
  add.u32 %r2, %r2, %r1;
  mad.wide.u32 %rd1, %r0, 4, %rd0;
  st.global.u32 [%rd1], %r2;
$out:
  ret;
}
"""
    o = torch.zeros(32, dtype=torch.int32)
    Module(ptx).launch("elect", 1, 32, [o])
    assert o.tolist() == [0] * 4 + [104] + [4] * 27


@pytest.mark.parametrize("negative", [0, 1, 96])
def test_barrier_reductions(module: Module, negative: int) -> None:
    a, o = torch.ones(96, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    a[:negative] = -1
    module.launch("barrier_reductions", 1, 96, [a, o])
    assert (o == (96 - negative) * 4 + 2 * (negative == 0) + (negative < 96)).all()


@pytest.mark.parametrize("order", ["fixed", "random", "greedy"])
def test_named_barriers_order_producer_and_consumer(module: Module, order: str) -> None:
    a, o = ints(4, 64), torch.zeros(4, 64, dtype=torch.int32)
    module.launch("named_barriers", 1, 128, [a, o, 4], order=order)
    assert torch.equal(o, 3 * a[:, torch.arange(64) ^ 33])


def test_atomics(module: Module) -> None:
    a = ints(256)
    o = torch.zeros(10, dtype=torch.int32)
    o[3], o[7], o[9] = -1, 50, 5
    f, d = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    h, b = torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)
    stats = module.launch("atomics", 4, 64, [a, o, f, d, h, b])
    x = a.numpy().view(np.uint32)
    wanted = [x.sum(dtype=np.uint32), a.min().item(), x.max(), np.bitwise_and.reduce(x | 255)]
    wanted += [np.bitwise_or.reduce(x & 255), np.bitwise_xor.reduce(x)]
    got = o.numpy().view(np.uint32)
    assert got[:6].tolist() == [int(v) % 2**32 for v in wanted]
    assert got[6] == 256 % 101 and got[7] == (50 - 256) % 101
    assert got[8] == 77 and got[9] == 6
    total = float((a & 7).sum())
    assert f.item() == total and d.item() == total
    assert h.tolist() == [256, 512] and b.tolist() == [256, 512]  # bf16 stays at 256 + 1
    assert stats.atomic_operations == 14 * 256


def test_shared_atomics(module: Module) -> None:
    a, o = ints(500, low=0), torch.zeros(16, dtype=torch.int32)
    module.launch("shared_histogram", 1, 128, [a, o, 500], order="random", seed=5)
    assert torch.equal(o, torch.bincount(a & 15, minlength=16).int())


def test_lanes_that_spin_do_not_starve_the_others(module: Module) -> None:
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    module.launch("spin_lock", 2, 64, [lock, count], budget=5_000_000)
    assert count.item() == 128


def test_address_spaces(module: Module) -> None:
    a, o = ints(32), torch.zeros(32, dtype=torch.int32)
    module.launch("spaces", 1, 32, [a, o])
    local = a[:, None] + torch.arange(8) ** 2
    shared = local[LANE, a.long() & 7]
    wanted = torch.where(LANE % 2 == 1, shared[LANE ^ 1], local[:, 3])
    assert torch.equal(o, (wanted + (LANE % 4 + 1) * 10 + 7).int())


def test_calls_of_device_functions(module: Module) -> None:
    a, o = ints(32), torch.zeros(32, dtype=torch.float64)
    pair = (5).to_bytes(8, "little") + np.float64(0.25).tobytes()
    module.launch("calls", 1, 32, [a, o, pair])

    def twice(x: int, y: float, by: int) -> tuple[int, float]:
        return (by, y) if x < 0 else (x * by, y + by)

    for t, x in enumerate(a.tolist()):
        r = twice(x, 0.25, 2)
        if t & 1:
            r = twice(*r, 5)
        assert o[t].item() == sum(r)


def test_divergent_control_flow(module: Module) -> None:
    a, o = ints(32, low=0), torch.zeros(32, dtype=torch.int32)
    module.launch("control", 1, 32, [a, o])
    steps = []
    for value in a.tolist():
        x, n = value & 63, 0
        while x > 1:
            x, n = (3 * x + 1 if x & 1 else x // 2), n + 1
        branches = [n + 11, n * 3, n - 5, n ^ 77, -n, n << 2]
        branches += [n + n.bit_count()] * 2
        steps.append(branches[value & 7])
    wanted = [steps[10 if t + 1 == 9 else (t + 1) % 32] for t in range(32)]
    wanted[9] = 0
    assert o.tolist() == wanted


def test_vector_accesses(module: Module) -> None:
    a = ints(32, 4, low=-(2**31), high=2**31 - 1)
    s = torch.randint(-(2**15), 2**15 - 1, (32, 2), dtype=torch.int16)
    o, u = torch.zeros(32, 2, dtype=torch.int64), torch.zeros(32, 4, dtype=torch.uint8)
    stats = module.launch("vectors", 1, 32, [a, o, s, u])
    assert torch.equal(o[:, 0], a[:, 0].long() + a[:, 1])
    assert torch.equal(o[:, 1], a[:, 2].long() * a[:, 3])
    assert torch.equal(u[:, 0], s[:, 0].to(torch.uint8))
    assert (u[:, 2:] == torch.tensor([3, 4])).all()
    assert torch.equal(u[:, 1], (s[:, 1] >> 8).to(torch.uint8))
    assert (stats.load_bytes, stats.load_sectors) == (32 * 20, 20)
    assert (stats.store_bytes, stats.store_sectors) == (32 * 20, 20)
