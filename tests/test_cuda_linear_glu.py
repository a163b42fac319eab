"""linear_glu in CUDA C++ through its door, on the emulator: what the common tests do not reach."""

import contextlib
import dataclasses

import pytest
import torch

import pyfast
from pyfast import reference, testing
from tests import cuda_glu
from tests.cuda_gemm import TMA, TMA_WIDE
from tests.cuda_lanes import LANES, check, needs_emulator
from tests.emulator import Stats, Violation
from tests.emulator.cuda import emulated
from tests.run_case import each_tensor

pytestmark = needs_emulator
B = torch.bfloat16


def kernels(log) -> list[str]:
    return [launch.name for launch in log]


@pytest.mark.parametrize("act", ["none", "sigmoid", "mish", "elu"])
def test_linear_glu_gates_with_any_activation(act) -> None:
    """sigmoid, elu: their derivative follows from the output, which is made again."""
    check(testing.linear_glu(19, 24, 21, act, bias=True), torch.float32, 80)


@pytest.mark.parametrize(("dtype", "capability"), LANES, ids=str)
def test_linear_glu_of_whole_tiles(dtype, capability) -> None:
    """Every copy of 16 bytes; 72 columns leave padding between the halves of the gradients."""
    log = check(testing.linear_glu(64, 64, 72, bias=True), dtype, capability)
    assert kernels(log)[:2] == ["gemm_kernel", "glu_backward_kernel"]


@pytest.mark.parametrize(("capability", "threads", "blocks"), [(80, 128, 128), (90, TMA[3], 108)])
def test_linear_glu_takes_large_tiles_where_they_fill_a_gpu(capability, threads, blocks) -> None:
    """2048 x 512: of both weights 1024 columns, 128 tiles of 128 x 128; by maps on 9.0."""
    x, gate, up = (torch.randn(n, 48).to(B) for n in (2048, 512, 512))
    with emulated(capability, processors=108) as log, pyfast.using("cuda"):
        out, *saved = torch.ops.pyfast.linear_glu(x, gate, up, None, None, "silu", True)
    assert log[0].block[0] == threads and log[0].grid == (blocks, 1, 1)
    exact = [x.double() @ w.double().T for w in (gate, up)]
    for ours, truth in zip(saved, exact, strict=True):
        assert (ours - truth).abs().max() <= 2**-8 * truth.abs().max()
    truth = torch.nn.functional.silu(exact[0]) * exact[1]
    assert (out - truth).abs().max() <= 2**-7 * truth.abs().max()
    assert log[0].stats.bank_factor == 1 and log[0].stats.sector_efficiency > 0.99


@pytest.mark.parametrize("flipped", [(True, True), (True, False)], ids=str)
def test_linear_glu_of_transposed_weights(flipped) -> None:
    """The gradient of a weight has its layout where both are views of [K, N] matrices."""
    inputs = testing.linear_glu(19, 24, 21).inputs(torch.float32)
    names = [n for n, f in zip(("gate_weight", "up_weight"), flipped, strict=True) if f]
    inputs |= {name: inputs[name].t().contiguous().t() for name in names}
    live = each_tensor(inputs, lambda _, t: t.requires_grad_())
    with emulated(), pyfast.using("cuda"):
        out = pyfast.linear_glu(**live)
        grads = torch.autograd.grad(out.sum(), [live[n] for n in ("gate_weight", "up_weight")])
    plain = each_tensor(inputs, lambda _, t: t.detach().requires_grad_())
    total = reference.linear_glu(**plain).sum()
    truths = torch.autograd.grad(total, [plain[n] for n in ("gate_weight", "up_weight")])
    for grad, truth in zip(grads, truths, strict=True):
        assert torch.allclose(grad, truth, atol=1e-5)
        assert grad.is_contiguous() != all(flipped)


@pytest.mark.parametrize("wanted", ["x", "gate_weight", "up_bias"])
def test_linear_glu_makes_only_the_gradients_that_are_needed(wanted) -> None:
    inputs = testing.linear_glu(20, 24, 40, bias=True).inputs(B)
    inputs[wanted].requires_grad_()
    with emulated() as log, pyfast.using("cuda"):
        pyfast.linear_glu(**inputs).float().sum().backward()
    products = kernels(log)[1:].count("gemm_kernel")
    assert products == {"x": 1, "gate_weight": 2, "up_bias": 0}[wanted]
    (truth,) = torch.autograd.grad(reference.linear_glu(**inputs).float().sum(), inputs[wanted])
    assert (inputs[wanted].grad - truth).abs().max() <= 2**-6 * truth.abs().max()


@pytest.mark.parametrize("sizes", [(0, 8, 3), (5, 0, 3), (5, 8, 0)], ids=str)
def test_linear_glu_of_nothing(sizes) -> None:
    m, k, n = sizes
    names = ("x", "gate_weight", "up_weight", "gate_bias", "up_bias")
    shapes = ((m, k), (n, k), (n, k), (n,), (n,))
    inputs = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    live = each_tensor(inputs, lambda _, t: t.requires_grad_())
    with emulated(), pyfast.using("cuda"):
        pyfast.linear_glu(**live).sum().backward()
    plain = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    reference.linear_glu(**plain).sum().backward()
    for name, t in live.items():
        torch.testing.assert_close(t.grad, plain[name].grad)


def test_linear_glu_keeps_what_the_backward_wants_and_nothing_else() -> None:
    with emulated(), pyfast.using("cuda"):
        x, gate, up = torch.randn(5, 16), torch.randn(7, 16), torch.randn(7, 16)
        for save, kept in ((True, (5, 7)), (False, (0,))):
            _, *saved = torch.ops.pyfast.linear_glu(x, gate, up, None, None, "silu", save)
            assert [t.shape for t in saved] == [kept, kept]


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_glu_main_loop_is_lean(capability) -> None:
    """Counters of 512 more of depth: two weights cost no more instructions than one would."""
    runs = []
    for k in (256, 768):
        x, gate, up = (torch.randn(64, k).to(B) for _ in range(3))
        with emulated(capability) as log, pyfast.using("cuda"):
            torch.ops.pyfast.linear_glu(x, gate[:32], up[:32], None, None, "silu", False)
        runs.append(log[0].stats)
    more = {n: getattr(runs[1], n) - getattr(runs[0], n) for n in ("mma_flops", "load_bytes")}
    assert more == {"mma_flops": 2 * 64 * 64 * 512, "load_bytes": 2 * 128 * 512}
    integers = runs[1].integer_instructions - runs[0].integer_instructions
    assert integers / (more["mma_flops"] / 4096) <= 4
    assert runs[1].bank_factor == 1


def by_maps(sizes, tile, mutant: int = 0, **options) -> tuple[Stats, Stats]:
    """Forward and dx by tensor maps are right to the rounding of bfloat16; the counters of each."""
    (m, n, k), kernels = sizes, cuda_glu.module("sm_90a", mutant)
    torch.manual_seed(0)
    x, *weights = (torch.randn(rows, k).to(B) for rows in (m, n, n))
    biases = torch.randn(n).to(B), torch.randn(n).to(B)
    made, counted = cuda_glu.forward(kernels, x, *weights, biases, "silu", tile, **options)
    exact = [x.double() @ w.double().T + b.double() for w, b in zip(weights, biases, strict=True)]
    exact.insert(0, torch.nn.functional.silu(exact[0]) * exact[1])
    pair, *_ = cuda_glu.split(kernels, torch.randn(m, n).to(B), made[1], made[2], "silu")
    dx, counted_backward = cuda_glu.input_gradient(kernels, pair, *weights, tile, **options)
    halves = pair[:, :n].double(), pair[:, pair.shape[1] // 2 :][:, :n].double()
    exact.append(sum(half @ w.double() for half, w in zip(halves, weights, strict=True)))
    for ours, truth in zip([*made, dx], exact, strict=True):
        assert (ours - truth).abs().max() <= 2**-7 * truth.abs().max()
    return counted, counted_backward


@pytest.mark.parametrize("tile", [TMA, TMA_WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("sizes", [(136, 200, 328), (65, 8, 40), (128, 128, 64)], ids=str)
def test_linear_glu_by_tensor_maps_is_right(sizes, tile) -> None:
    """Short tiles, padding between the gradients, one block for all tiles and several."""
    by_maps(sizes, tile, order="greedy", processors=1)
    by_maps(sizes, tile, order="random", seed=2, perturb=True)


@pytest.mark.parametrize("tile", [TMA, TMA_WIDE], ids=["narrow", "wide"])
def test_linear_glu_by_tensor_maps_has_a_lean_main_loop(tile) -> None:
    """512 more of depth forward: whole boxes once, and next to nothing else to do."""
    (rows, cols), more = tile[:2], {}
    runs = [by_maps((rows, cols // 2, k), tile)[0] for k in (512, 1024)]
    first, last = (dataclasses.asdict(run) for run in runs)
    more = {name: last[name] - first[name] for name in last if name != "kernel"}
    assert more["mma_flops"] == 2 * rows * cols * 512
    assert more["load_bytes"] == more["distinct_read"] == 2 * (rows + cols) * 512
    assert more["load_sectors"] * 32 == more["load_bytes"]
    assert more["integer_instructions"] / (more["mma_flops"] / 4096) <= 1
    assert runs[1].bank_factor == 1


# 118, 127: barriers not initialised, a stage not free; 125: both halves of a tile of one weight;
# 126: the second weight not from its start.
@pytest.mark.parametrize("mutant", [0, 118, 125, 126, 127])
def test_linear_glu_by_tensor_maps_defect_is_caught(mutant) -> None:
    told = pytest.raises((AssertionError, Violation)) if mutant else contextlib.nullcontext()
    with told:
        by_maps((130, 72, 640), TMA, mutant, order="random", processors=1)
