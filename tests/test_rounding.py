"""What is computed in float32 is rounded once, when it is stored; on every backend.

The tolerance of a 16-bit result hides a second rounding on the way. Counting shows it: of results
that are rounded once, next to none differs from the rounded truth; of others one in ten and more.
"""

import pytest
import torch

import pyfast
from bench.devices import emulated, emulated_backends
from pyfast import reference, testing
from tests.run_case import in_float64, results

B = torch.bfloat16
# (case, how many of its results: outputs, then gradients; what has gone through another 16-bit
# matrix, as the gradients of a product's operands have, is rounded more than once on purpose)
CASES = [
    (testing.rope(2, 3, 19, 16), 2),
    (testing.rope(2, 3, 19, 16, interleaved=True), 2),
    (testing.norm("layer_norm", 37, 264), 4),
    (testing.norm("rms_norm", 37, 264), 3),
    (testing.cross_entropy(45, 131, label_smoothing=0.1, reduction="none"), 2),
    (testing.cross_entropy(9, 1031, reduction="none"), 2),
    (testing.linear_act(37, 29, 53, "gelu"), 1),
    (testing.linear_glu(37, 29, 53), 1),
]


def differing(case: testing.Case, count: int) -> list[float]:
    """The part of each result that is not its truth, rounded."""
    inputs = case.inputs(B)
    ours = results(case, getattr(pyfast, case.op), inputs)[:count]
    truths = results(case, getattr(reference, case.op), in_float64(case, inputs))
    return [float((a != b.to(a.dtype)).double().mean()) for a, b in zip(ours, truths, strict=False)]


@pytest.mark.parametrize("backend", ["cpp", *emulated_backends()])
@pytest.mark.parametrize(("case", "count"), CASES, ids=str)
def test_results_are_rounded_once(case, count, backend) -> None:
    with pyfast.using(backend) if backend == "cpp" else emulated(backend):
        found = differing(case, count)
    assert max(found) < 0.02, found
