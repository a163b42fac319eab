"""Results are the same bits for any number of threads, and in any process."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

# Large enough that every pass over the data is divided among threads, with pieces that do not fit.
CASES = [
    testing.norm("layer_norm", 1030, 768, residual=True),
    testing.norm("rms_norm", 1500, 300),
    testing.adamw(((3000, 100), (77,), (5000, 33)), max_norm=1.0),
    testing.attention(2, 4, 520, 64, causal=True),
    testing.attention(1, 8, 300, 128, kv=2),
    testing.cross_entropy(1000, 3000),
    testing.linear_cross_entropy(1500, 64, 3000),
    testing.linear_act(2500, 96, 200, "gelu"),
    testing.linear_act(500, 40, 768, "none"),
    testing.linear_act(7000, 17, 3, "relu"),
    testing.linear_act(2, 300, 500, "none"),
    testing.linear_glu(1300, 96, 200),
    testing.rope(2, 3, 300, 64),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fingerprint(case: Case, dtype: torch.dtype) -> str:
    """A hash of every result and gradient, in bits."""
    inputs = case.inputs(dtype)
    for name in case.grads:
        inputs[name].requires_grad_()
    with pyfast.deterministic(True):
        out = getattr(pyfast, case.op)(**inputs)
    results = list(out) if isinstance(out, tuple) else [out]
    if case.grads:
        leaves = [inputs[name] for name in case.grads]
        results += torch.autograd.grad(results, leaves, [torch.ones_like(o) for o in results])
    if case.op == "adamw_step_":
        results += inputs["params"] + inputs["exp_avgs"]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_gives_the_same_bits_for_any_number_of_threads(case, dtype, threads):
    found = set()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.add(fingerprint(case, dtype))
    assert len(found) == 1


def test_ops_give_the_same_bits_in_another_process():
    code = (
        "import json, torch; from tests.test_deterministic import CASES, fingerprint; "
        "print(json.dumps([fingerprint(c, torch.float32) for c in CASES]))"
    )
    root = Path(__file__).resolve().parent.parent
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout) == [fingerprint(c, torch.float32) for c in CASES]


def test_deterministic_mode_is_a_switch_and_a_block():
    assert not backend._deterministic
    with pyfast.deterministic(True):
        assert backend._deterministic
    assert not backend._deterministic
    pyfast.deterministic(True)
    try:
        assert backend._deterministic
    finally:
        pyfast.deterministic(False)
    with pytest.raises(TypeError, match="deterministic: mode must be a bool; got 1"):
        pyfast.deterministic(1)
