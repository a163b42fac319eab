"""linear_act in Triton, on the emulator: every case, real tile shapes, any layout, guards."""

import pytest
import torch

import pyfast
from pyfast import testing, triton_rooms
from pyfast.reference import ACTIVATIONS

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import compiled, emulated
from tests.run_case import strided
from tests.triton_lanes import LANES, check, check_twice, runs

matmul = triton_rooms._module("matmul")
linear_act = triton_rooms._module("linear_act")
gradient_product = triton_rooms._module("gradient_product")
tensor_maps = triton_rooms._module("tensor_maps")
B = torch.bfloat16

# Every activation once, in one lane after the other; relu and gelu, whose derivatives are taken in
# different places, in all of them.
BY_ACT = [(testing.linear_act(37, 29, 53, a), *LANES[i % 3]) for i, a in enumerate(ACTIVATIONS)]
BY_ACT += [(testing.linear_act(37, 29, 53, a), *lane) for a in ("relu", "gelu") for lane in LANES]
OTHERS = runs(testing.cases("linear_act")[len(ACTIVATIONS) :])


@pytest.mark.parametrize(("case", "dtype", "capability"), BY_ACT[:11], ids=str)
def test_linear_act_knows_every_activation(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


@pytest.mark.parametrize(("case", "dtype", "capability"), BY_ACT[11:] + OTHERS[:3], ids=str)
def test_linear_act_is_as_good_as_torch(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


@pytest.mark.parametrize(("case", "dtype", "capability"), OTHERS[3:], ids=str)
def test_linear_act_of_thin_matrices_is_as_good_as_torch(case, dtype, capability) -> None:
    """Two rows: tiles of 16. 1100 rows of few columns: the weight gradient in parts."""
    check(case, dtype, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_linear_act_with_large_tiles(act, capability, monkeypatch) -> None:
    """130, 260: past one tile each way; two programs, so that each takes tile after tile.

    144, 272: multiples of 16, which are copied by 16 bytes while the tile before is multiplied.
    """
    large = matmul.launch_config(divmod(capability, 10), B, 8192, 4096, 1024)
    for module in (linear_act, gradient_product):
        monkeypatch.setattr(module, "launch_config", lambda *_: large)
    assert large.block_m == 128 and large.persistent == (capability == 90)
    k, n = (144, 272) if act == "relu" else (136, 260)
    log = check(testing.linear_act(130, k, n, act), B, capability, processors=2)
    assert all(launch.grid[0] == 2 for launch in log[:1]) or capability == 80


@pytest.mark.parametrize("op", ["linear_act"])
def test_linear_act_reads_any_strides(op) -> None:
    check(testing.linear_act(20, 33, 18, "silu"), torch.float32, 80, strided)


def test_linear_act_takes_a_gradient_stretched_over_its_elements() -> None:
    """As loss.sum() gives it: one number, with strides of 0."""
    x, weight = torch.randn(5, 24).requires_grad_(), torch.randn(9, 24).requires_grad_()
    with emulated(), pyfast.using("triton"):
        pyfast.linear_act(x, weight, act="relu").sum().backward()
    truth = torch.relu(x.detach().requires_grad_() @ weight.detach().t())
    assert torch.allclose(x.grad, (truth > 0).float() @ weight.detach(), atol=1e-5)
    assert torch.allclose(weight.grad, (truth > 0).float().t() @ x.detach(), atol=1e-5)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_linear_act_makes_only_the_gradient_that_is_needed(act, needed) -> None:
    inputs = testing.linear_act(19, 24, 21, act).inputs(torch.float32)
    inputs[needed].requires_grad_()
    with emulated() as log, pyfast.using("triton"):
        pyfast.linear_act(**inputs).sum().backward()
    (truth,) = torch.autograd.grad(pyfast.reference.linear_act(**inputs).sum(), inputs[needed])
    assert torch.allclose(inputs[needed].grad, truth, atol=1e-4)
    assert sum("product" in launch.name for launch in log) == (needed != "bias")


def test_linear_act_saves_what_its_derivative_needs() -> None:
    x, weight = torch.randn(5, 24), torch.randn(9, 24)
    for act in ACTIVATIONS:
        with emulated() as log, pyfast.using("triton"):
            _, preact = torch.ops.pyfast.linear_act(x, weight, None, act, True)
        from_output = act == "none" or act in linear_act.GRAD_FROM_OUTPUT
        assert preact.shape == ((0,) if from_output else (5, 9)), act
        assert log[-1].stats.distinct_written == 4 * 45 * (1 if from_output else 2), act


def test_linear_act_of_nothing() -> None:
    for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        x, weight = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
        bias = torch.randn(n, requires_grad=True)
        with emulated(), pyfast.using("triton"):
            out = pyfast.linear_act(x, weight, bias, act="gelu")
            out.sum().backward()
        assert torch.allclose(out, pyfast.reference.linear_act(x, weight, bias, act="gelu"))
        assert x.grad.shape == (m, k) and weight.grad.shape == (n, k) and bias.grad.shape == (n,)


def test_linear_act_gives_the_same_bits_in_every_schedule() -> None:
    """Also where the weight gradient is summed from parts."""
    x, weight = torch.randn(1100, 24), torch.randn(72, 24)
    dy, out = torch.randn(1100, 72), torch.randn(1100, 72)
    runs = []
    for order in ("greedy", "random"):
        with emulated(order=order, seed=3), pyfast.using("triton"):
            args = (dy, x, weight, out, "relu", True, True, True)
            runs.append(torch.ops.pyfast.linear_act_backward(*args))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operands_lie_in_rows_or_in_depth() -> None:
    whole = torch.zeros(40, 64, dtype=B)
    found = {
        "rows": [whole, whole[:, :8], whole[3:, 8:57], whole[::2]],
        "depth": [whole.t(), whole[:, 16:].t()],
        "any": [whole[:, 1:], whole[:, ::2], whole[:, :1].expand(40, 64), torch.zeros(5, 9).to(B)],
    }
    for name, tensors in found.items():
        assert [tensor_maps.order(t) for t in tensors] == [name] * len(tensors)
    assert tensor_maps.whole_order(whole[:, :57]) == "any"  # 8 at a time would pass the end
    with emulated():
        packed = tensor_maps.packed(torch.zeros(5, 9).to(B).t())
    assert packed.shape == (16, 5) and tensor_maps.whole_order(packed) == "depth"


def test_linear_act_reads_by_tensor_map_and_needs_no_allocator() -> None:
    """Maps are parameters: 128 bytes each. Nothing is asked of triton.set_allocator."""
    x, weight = torch.randn(64, 64).to(B), torch.randn(72, 64).to(B)
    dy, out = torch.randn(64, 72).to(B), torch.randn(64, 72).to(B)
    with compiled(90) as log, pyfast.using("triton"):
        torch.ops.pyfast.linear_act(x, weight, None, "relu", True)
        torch.ops.pyfast.linear_act_backward(dy, x, weight, out, "relu", True, True, False)
    for launch in log:
        assert "cp.async.bulk.tensor.2d.shared::cta.global" in launch.binary.ptx
        assert "cp.async.cg" not in launch.binary.ptx
        assert launch.binary.ptx.count("[128]") >= 3
        assert "tensormap.replace" not in launch.binary.ptx  # made on the device, in scratch
    assert len(log) == 3


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_launch_config_fills_the_gpu(capability) -> None:
    for dtype in (torch.float32, B, torch.float16):
        for m, n in ((1, 8), (16, 4096), (17, 17), (512, 512), (8192, 768), (8192, 50257)):
            config = matmul.launch_config(capability, dtype, m, n, 768)
            stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
            assert (
                stage * (config.num_stages - 1) <= (99 if capability[0] in (8, 12) else 227) << 10
            )
            assert config.programs(m, n, 132) <= config.tiles(m, n)
            if config.block_m == 128:
                assert config.tiles(m, n) >= matmul.PROGRAMS
            splits = matmul.split_count(config, m, n, 8192)
            assert splits == 1 or splits * config.tiles(m, n) <= matmul.PROGRAMS
