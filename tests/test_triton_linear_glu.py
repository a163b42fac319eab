"""linear_glu in Triton, on the emulator: every case, real tile shapes, any layout."""

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import testing, triton_rooms

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import emulated
from tests.run_case import strided
from tests.triton_lanes import LANES, check, check_twice, runs

linear_glu, glu_backward = map(triton_rooms._module, ("linear_glu", "glu_backward"))
B = torch.bfloat16


@pytest.mark.parametrize(
    ("case", "dtype", "capability"), runs(testing.cases("linear_glu")), ids=str
)
def test_linear_glu_is_as_good_as_torch(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


@pytest.mark.parametrize("act", ["none", "sigmoid", "mish"])
def test_linear_glu_gates_with_any_activation(act) -> None:
    """sigmoid: a derivative that follows from the output, here computed again."""
    check(testing.linear_glu(19, 24, 21, act, bias=True), torch.float32, 80, strided)


@pytest.mark.parametrize(("dtype", "capability"), LANES, ids=str)
@pytest.mark.parametrize("flipped", ["gate_weight", "up_weight"])
def test_linear_glu_reads_each_weight_by_its_own_strides(flipped, dtype, capability) -> None:
    """One lies as [K, N], the other in the rows of a wider matrix."""

    def change(name: str, t: Tensor) -> Tensor:
        if name == flipped:
            return t.t().contiguous().t()
        return torch.cat((t, t[:, :8]), 1)[:, : t.shape[1]] if name.endswith("weight") else t

    check(testing.linear_glu(19, 136, 32, bias=True), dtype, capability, change)


@pytest.mark.parametrize("flipped", [False, True])
def test_linear_glu_reads_no_row_past_a_weight(flipped) -> None:
    """One is packed, with zeros behind its 20 rows; behind those of the other is other memory."""
    x, wide = torch.randn(19, 136).half(), torch.randn(40, 136).half()
    weights = [wide[:20], torch.randn(136, 20).half().t()]
    gate, up = weights[::-1] if flipped else weights
    with emulated(80), pyfast.using("triton"):
        ours = pyfast.linear_glu(x, gate, up)
    theirs = pyfast.reference.linear_glu(x, gate, up)
    torch.testing.assert_close(ours, theirs, atol=1e-1, rtol=1e-2)


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_glu_with_large_tiles(capability, monkeypatch) -> None:
    size = (divmod(capability, 10), B, 8192, 4096, 1024)
    large, whole = linear_glu.glu_launch_config(*size), glu_backward.launch_config(*size)
    assert large.block_m == 128
    monkeypatch.setattr(linear_glu, "launch_config", lambda *_: large)
    monkeypatch.setattr(linear_glu, "glu_launch_config", lambda *_: large)
    monkeypatch.setattr(glu_backward, "launch_config", lambda *_: whole)
    check(testing.linear_glu(130, 80, 272), B, capability, processors=2)


@pytest.mark.parametrize("needed", ["x", "gate_weight", "up_bias"])
def test_linear_glu_makes_the_gradients_that_are_needed(needed) -> None:
    inputs = testing.linear_glu(9, 24, 21, bias=True).inputs(torch.float32)
    inputs[needed].requires_grad_()
    with emulated(), pyfast.using("triton"):
        pyfast.linear_glu(**inputs).sum().backward()
    (truth,) = torch.autograd.grad(pyfast.reference.linear_glu(**inputs).sum(), inputs[needed])
    assert torch.allclose(inputs[needed].grad, truth, atol=1e-4)
