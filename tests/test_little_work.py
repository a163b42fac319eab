"""What `auto` leaves to torch's own operators: little work, in torch's words and our errors."""

from collections.abc import Callable

import pytest
import torch

import pyfast
from pyfast import backend
from tests.run_case import Recorder

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


@pytest.mark.little_work
def test_little_work_broadcasts_nothing_that_a_kernel_would_refuse() -> None:
    x, targets = torch.ones(2, 3), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="linear_act: bias must be"):
        pyfast.linear_act(x, torch.ones(4, 3), torch.ones(1))
    with pytest.raises(ValueError, match="layer_norm: residual must be"):
        pyfast.layer_norm(x, (3,), residual=torch.ones(3))
    with pytest.raises(ValueError, match="linear_cross_entropy: target must be"):
        pyfast.linear_cross_entropy(torch.ones(2, 3, 4), torch.ones(5, 4), targets)
    with pytest.raises(ValueError, match="linear_glu: up_weight must be"):
        pyfast.linear_glu(x, torch.ones(4, 3), torch.ones(1, 3))


def runs_a_kernel(function: Callable[[], torch.Tensor]) -> bool:
    recorder = Recorder()
    with recorder:
        function()
    return bool(recorder.calls)


@pytest.mark.little_work
def test_little_work_ends_where_it_was_measured_to() -> None:
    threads = torch.get_num_threads()
    rows, classes = torch.ones(1024, 4), torch.ones(1024, 4)  # little work, but 4 MB of logits
    targets = torch.zeros(1024, dtype=torch.int64)
    assert runs_a_kernel(lambda: pyfast.linear_cross_entropy(rows, classes, targets))
    assert not runs_a_kernel(
        lambda: pyfast.linear_cross_entropy(rows[:256], classes, targets[:256])
    )
    x, weight = torch.ones(128, 128), torch.ones(128, 128)  # 2**21 multiply-adds
    wide = torch.ones(129, 128)
    try:
        torch.set_num_threads(2)
        assert not runs_a_kernel(lambda: pyfast.linear_act(x, weight))
        assert runs_a_kernel(lambda: pyfast.linear_act(x, wide))
        torch.set_num_threads(1)
        assert not runs_a_kernel(lambda: pyfast.linear_act(x, torch.ones(512, 128)))
        assert runs_a_kernel(lambda: pyfast.linear_act(x, torch.ones(513, 128)))
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():  # where a call of ours costs less
        assert runs_a_kernel(lambda: pyfast.linear_glu(x, weight, weight))
    assert not runs_a_kernel(lambda: pyfast.linear_glu(x.requires_grad_(), weight, weight))


@pytest.mark.little_work
@pytest.mark.parametrize("op", ["linear_act", "linear_glu", "linear_cross_entropy"])
def test_little_work_under_autocast_is_for_kernels(op: str) -> None:
    """They round once where torch's operators round after each, in bfloat16."""
    assert not runs_a_kernel(LITTLE[op])
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_a_kernel(LITTLE[op])
