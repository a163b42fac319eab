"""Seeded defects of asynchronous kernels: each is caught, and its correct twin is clean."""

import pytest
import torch

from tests.emulator import Module, Violation, library, nvcc
from tests.test_emulator_instructions import SOURCE

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
FENCE, RACE = ["missing fence.proxy.async"], ["race"]
DEFECTS = {  # name: (grid, elements of x, of o, words of the message)
    "wrong_parity": (1, 32, 32, []),  # what it does depends on when the copy arrives
    "bytes_nobody_expects": (1, 32, 32, ["still being written by a copy"]),
    "too_few_bytes": (1, 32, 32, ["deadlock", "-64 bytes"]),
    "unpublished_mbarrier": (1, 32, 32, [*FENCE, "fence.mbarrier_init"]),
    "unfenced_overwrite": (1, 32, 32, [*FENCE, "asynchronous write"]),
    "wait_for_reads_only": (1, 32, 64, ["still being written by a bulk copy"]),
    "early_overwrite": (1, 32, 32, ["still being read by a bulk copy"]),
    "exit_before_the_store": (1, 32, 32, ["the block ends", "read by a bulk copy"]),
    "exit_before_the_load": (1, 64, 32, ["the block ends", "written by a copy"]),
    "uninitialised_store": (1, 32, 64, ["uninitialised"]),
    "exit_before_the_peer": (2, 32, 64, ["end"]),
}
ORDERS = ["fixed", "random", "greedy"]


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


def caught(words: list[str], kernel: str, module: Module, *args, **options) -> None:
    with pytest.raises(Violation) as found:
        module.launch(kernel, *args, budget=1_000_000, **options)
    message = str(found.value)
    assert all(word in message for word in [*words, f"kernel {kernel}", ".cuh:"]), message


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_caught_and_its_twin_is_clean(module: Module, name: str, order: str) -> None:
    grid, inputs, outputs, words = DEFECTS[name]
    x, o = torch.randn(inputs), torch.zeros(outputs)
    module.launch(name, grid, 32, [x, o, 0], order=order, seed=1)
    caught(words, name, module, grid, 32, [x, o, 1], order=order, seed=1)


def test_copies_arrive_late_in_random_order(module: Module) -> None:
    x, o = torch.randn(32), torch.zeros(32)
    words = ["race", "still being written by a copy"]
    caught(words, "wrong_parity", module, 1, 32, [x, o, 1], order="random")
    caught(["deadlock"], "wrong_parity", module, 1, 32, [x, o, 1], order="greedy")


@pytest.mark.parametrize("order", ORDERS)
def test_arrivals_from_other_blocks_want_the_scope_of_the_cluster(module, order: str) -> None:
    x, o = torch.randn(32), torch.zeros(32)
    module.launch("far_arrival", 2, 32, [x, o, 0], order=order)
    assert torch.equal(o, x.flip(0))
    for bug in (1, 2):  # released, or acquired, within the block only
        caught(RACE, "far_arrival", module, 2, 32, [x, o, bug], order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_release_to_the_cluster_does_not_reach_the_device(module: Module, order: str) -> None:
    def args(bug: int) -> list:
        return [torch.randn(1), torch.zeros(2), torch.zeros(1, dtype=torch.int32), bug]

    module.launch("narrow_scope", 2, 1, args(0), order=order)
    caught(RACE, "narrow_scope", module, 2, 1, args(1), order=order)


WGMMA = {  # bug: words
    1: FENCE,
    2: ["uninitialised read", "shared"],
    3: ["wgmma not waited for", "accumulator"],
    4: ["wgmma not waited for", "accumulator"],
    5: ["wgmma not waited for"],
    6: ["still being read by a wgmma"],
    7: ["divergence", "warpgroup"],
    8: ["missing wgmma.fence"],
    9: ["wgmma not waited for", "reads an accumulator"],
}


@pytest.mark.parametrize("bug", WGMMA)
def test_defects_around_wgmma_are_caught(module: Module, bug: int) -> None:
    x, y, o = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.zeros(64, 8)
    module.launch("wgmma_defects", 1, 128, [x, y, o, 0])
    torch.testing.assert_close(o.double(), x.double() @ y.double().T)
    caught(WGMMA[bug], "wgmma_defects", module, 1, 128, [x, y, o, bug])
