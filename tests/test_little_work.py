"""What `auto` leaves to torch's own operators: little work, in torch's words and our errors."""

import pytest
import torch

import pyfast
from pyfast import backend

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

TORCHS = (
    "MmBackward0",
    "NativeLayerNormBackward0",
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "NllLossBackward0",
)
LITTLE = {
    "linear_act": lambda: pyfast.linear_act(torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)),
    "layer_norm": lambda: pyfast.layer_norm(torch.ones(2, 3, requires_grad=True), (3,)),
    "linear_glu": lambda: pyfast.linear_glu(
        torch.ones(2, 3, requires_grad=True), torch.ones(4, 3), torch.ones(4, 3)
    ),
    "linear_cross_entropy": lambda: pyfast.linear_cross_entropy(
        torch.ones(2, 3, requires_grad=True), torch.ones(4, 3), torch.tensor([0, 3])
    ),
    "attention": lambda: pyfast.attention(*[torch.ones(1, 1, 4, 8, requires_grad=True)] * 3),
    "cross_entropy": lambda: pyfast.cross_entropy(
        torch.ones(2, 3, requires_grad=True), torch.tensor([0, 2])
    ),
}


@pytest.mark.little_work
@pytest.mark.parametrize("op", LITTLE)
def test_little_work_is_left_to_torch_unless_kernels_are_asked_for(op: str) -> None:
    ours = f"{op}Backward"

    def formula() -> str:
        node = LITTLE[op]().grad_fn
        while node.name() not in (ours, *TORCHS) and node.next_functions:
            node = node.next_functions[0][0]
        return node.name()

    assert formula() in TORCHS
    with pyfast.using("cpp"):
        assert formula() == ours
    with pyfast.deterministic(True):
        assert formula() == ours
    assert backend.choose(op, "cpu", torch.bfloat16).little == -1


@pytest.mark.little_work
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_norms_without_gradients_are_torchs(dtype: torch.dtype) -> None:
    function, torchs = pyfast.layer_norm, torch.nn.functional.layer_norm
    x, r, weight = (
        torch.randn(3, 5).to(dtype),
        torch.randn(3, 5).to(dtype),
        torch.randn(5).to(dtype),
    )
    with torch.no_grad():
        assert torch.equal(function(x, (5,), weight), torchs(x, (5,), weight))
        total, out = function(x, 5, weight, residual=r)
        assert torch.equal(total, x + r) and torch.equal(out, torchs(x + r, (5,), weight))
        with pytest.raises(ValueError, match="layer_norm: weight must be"):
            function(x, (5,), weight[:4])
        with pytest.raises(ValueError, match="layer_norm: eps must be at least 0"):
            function(x, (5,), weight, eps=-1.0)


@pytest.mark.little_work
def test_little_work_answers_a_bad_target_in_our_words() -> None:
    with pytest.raises((ValueError, RuntimeError), match="cross_entropy: target"):
        pyfast.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3]))
    with pytest.raises((ValueError, RuntimeError), match="linear_cross_entropy: target"):
        pyfast.linear_cross_entropy(torch.ones(2, 3), torch.ones(3, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="linear_glu: gate_bias must be"):
        x = torch.ones(2, 3, requires_grad=True)
        pyfast.linear_glu(x, torch.ones(4, 3), torch.ones(4, 3), torch.ones(1))


@pytest.mark.little_work
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_little_norms_of_16_bits_are_torchs_where_its_gradients_are_exact(
    dtype: torch.dtype,
) -> None:
    for rows, formula in ((8, "NativeLayerNormBackward0"), (9, "layer_normBackward")):
        x = torch.randn(rows, 5).to(dtype).requires_grad_()
        assert pyfast.layer_norm(x, (5,)).grad_fn.name() == formula


@pytest.mark.little_work
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_cross_entropies_have_few_rows(dtype: torch.dtype) -> None:
    for rows, formula in ((256, "NllLossBackward0"), (257, "cross_entropyBackward")):
        x = torch.randn(rows, 5).to(dtype).requires_grad_()
        node = pyfast.cross_entropy(x, torch.zeros(rows, dtype=torch.int64)).grad_fn
        names = [node.name(), *(n.name() for n, _ in node.next_functions if n)]
        assert formula in names
