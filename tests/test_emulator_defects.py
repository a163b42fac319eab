"""Seeded defects: each is caught with the right kind of message, and its correct twin is clean."""

import pytest
import torch

from tests.emulator import Module, Stats, Violation, cuda, library, nvcc
from tests.test_emulator_instructions import SOURCE

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
ORDERS = ["fixed", "random", "greedy"]


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def o(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def ints(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


DEFECTS = {  # name: (grid, block, arguments before `bug`, words of the message)
    "missing_barrier": (1, 64, lambda: [x(64), o(64)], ["defects.cuh:", "shared"]),
    "missing_trailing_barrier": (1, 64, lambda: [x(256), o(256)], ["race", "defects.cuh:"]),
    "missing_syncwarp": (1, 32, lambda: [x(32), o(32)], ["race", "was written by", "lane"]),
    "off_by_one": (1, 32, lambda: [x(100), o(32), 100], ["out of bounds", "arg0[100]"]),
    "shared_off_by_one": (1, 32, lambda: [x(32), o(32)], ["out of bounds", "byte 128 of 128"]),
    "wrong_stride": (1, 32, lambda: [x(8, 32), o(32), 8, 32], ["out of bounds", "arg0"]),
    "missing_tail_mask": (4, 32, lambda: [x(100), o(100), 100], ["out of bounds", "block (3"]),
    "weak_wait_group": (1, 32, lambda: [ints(64, 4), ints(32, 4)], ["cp.async", "still"]),
    "double_add": (4, 32, lambda: [x(4, 32), o(32)], ["race", "arg1[0]"]),
    "uninitialised_accumulator": (1, 32, lambda: [x(4, 32), o(32)], ["uninitialised", "shared"]),
    "overflow_32_bits": (
        1,
        32,
        lambda: [x(32), o(32), 70000, 40000, 70000 * 40000],
        ["out of bounds", "read of 4 bytes"],
    ),
    "misaligned_vector": (1, 8, lambda: [x(40), o(32)], ["misaligned", "16 bytes"]),
    "divergent_barrier": (1, 64, lambda: [x(64), o(64)], ["divergence", "warp 1"]),
    "divergent_shuffle": (1, 32, lambda: [x(32), o(32)], ["divergence", "lane 16"]),
    "last_block": (
        8,
        1,
        lambda: [x(8), o(8), torch.zeros(1, dtype=torch.int32), o(1)],
        ["race", "arg1"],
    ),
    "relay": (
        4,
        1,
        lambda: [x(4), o(4), torch.zeros(4, dtype=torch.int32)],
        ["race", "arg1[0]"],
    ),
    "nobody_arrives": (1, 32, lambda: [o(32)], ["deadlock", "1 arrivals"]),
    "uninitialised_mbarrier": (1, 32, lambda: [o(32)], ["mbarrier", "initialised"]),
    "endless_loop": (1, 32, lambda: [o(32)], ["budget"]),
    "missing_proxy_fence": (1, 32, lambda: [x(32), o(32)], ["fence.proxy.async"]),
    "read_only_of_written": (1, 32, lambda: [x(32), o(64)], ["without coherence", "arg1[0]"]),
    "failing_assertion": (1, 32, lambda: [x(32), o(32)], ["assert"]),
    "local_out_of_bounds": (1, 32, lambda: [ints(32), ints(32)], ["out of bounds", "local"]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_caught_and_its_twin_is_clean(module: Module, name: str, order: str) -> None:
    grid, block, make, words = DEFECTS[name]
    budget = 100_000 if name == "endless_loop" else 3_000_000
    options = {"order": order, "seed": 1, "budget": budget}
    module.launch(name, grid, block, [*make(), 0], **options)
    with pytest.raises(Violation) as caught:
        module.launch(name, grid, block, [*make(), 1], **options)
    message = str(caught.value)
    assert all(word in message for word in [*words, f"kernel {name}"]), message


def test_last_block_needs_the_second_fence_too(module: Module) -> None:
    grid, block, make, _ = DEFECTS["last_block"]
    with pytest.raises(Violation, match="race"):
        module.launch("last_block", grid, block, [*make(), 2])


def test_correct_kernels_give_correct_results(module: Module) -> None:
    a, out = x(4), o(4)
    module.launch("relay", 4, 1, [a, out, torch.zeros(4, dtype=torch.int32), 0], order="random")
    torch.testing.assert_close(out, a.cumsum(0))
    a, part, count, out = x(8), o(8), torch.zeros(1, dtype=torch.int32), o(1)
    module.launch("last_block", 8, 1, [a, part, count, out, 0])
    torch.testing.assert_close(out[0], a.sum())


def test_uninitialised_global_memory(module: Module) -> None:
    out = torch.empty(32)
    module.launch("uninitialised_output", 1, 32, [x(32), out, 0], uninitialised=[out])
    out = torch.empty(32)
    with pytest.raises(Violation, match=r"uninitialised read: 4 bytes at arg1\[0\]"):
        module.launch("uninitialised_output", 1, 32, [x(32), out, 1], uninitialised=[out])


def test_dropped_padding_shows_as_bank_conflicts(module: Module) -> None:
    def run(bug: int) -> Stats:
        a, out = x(32, 32), o(32, 32)
        stats = module.launch("bank_conflicts", 1, 32, [a, out, bug])
        assert torch.equal(out, a.T)
        return stats

    right, wrong = run(0), run(1)
    assert right.bank_factor == 1
    assert wrong.shared_load_waves == 32 * wrong.shared_load_ideal
    assert wrong.shared_store_waves == wrong.shared_store_ideal


def test_a_view_is_checked_by_its_own_extent(module: Module) -> None:
    whole = x(200)
    with pytest.raises(Violation, match=r"arg0\[100\], byte 400 of 400"):
        module.launch("off_by_one", 1, 32, [whole[:100], o(32), 100, 1])


def test_checks_can_be_turned_off(module: Module) -> None:
    stats = module.launch("missing_barrier", 1, 64, [x(64), o(64), 1], check=False)
    assert stats.warp_instructions > 0


@pytest.mark.parametrize(
    ("mutant", "told"),
    [
        (("attention", 1 << 20), "a number planted in kernels/cuda; got 1048576"),
        (("no_such_file", 1), "a file of csrc/cuda; got 'no_such_file'"),
    ],
)
def test_a_mutant_that_is_none_is_refused(mutant: tuple[str, int], told: str) -> None:
    """It would pass for a kernel without a defect."""
    with pytest.raises(ValueError, match="emulated: mutant must .*" + told):
        cuda.expect_mutant(mutant)


def test_a_mutant_that_nothing_runs_is_refused() -> None:
    session = cuda._Session(80, {}, ("layer_norm", 1), "hyper")
    with pytest.raises(ValueError, match="emulated: mutant must be of what runs"):
        session.finish()
    session.mutated = True
    session.finish()
