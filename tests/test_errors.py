"""Wrong calls: one sentence in the house form from the doors, no crash from torch.ops.pyfast."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case

SENTENCE = r"{op}: .+ must .+; got .+"
ERRORS = (ValueError, TypeError, RuntimeError)
FIRST = [testing.cases(op)[0] for op in backend.OPS]
ACTS = "none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, leaky_relu, elu, softplus, mish"


def t(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


WRONG = [  # the call, the kind of error, its whole message
    (
        lambda: pyfast.linear_act(t(2, 3), t(4, 5)),
        ValueError,
        "linear_act: x must end in K=5 to match weight [4, 5]; got [2, 3]",
    ),
    (
        lambda: pyfast.linear_act(t(2, 3), t(4, 3), t(3)),
        ValueError,
        "linear_act: bias must be [N=4]; got [3]",
    ),
    (
        lambda: pyfast.linear_act(t(2, 3), t(4, 3), act="gelu_fast"),
        ValueError,
        f"linear_act: act must be one of {ACTS}; got 'gelu_fast'",
    ),
    (
        lambda: pyfast.linear_act(t(2, 3), t(4, 3).double()),
        TypeError,
        "linear_act: weight must have the dtype of x, torch.float32; got torch.float64",
    ),
    (
        lambda: pyfast.linear_act(ids(2, 3), ids(4, 3)),
        TypeError,
        "linear_act: x must be float32, bfloat16, float16 or float64; got torch.int64",
    ),
    (
        lambda: pyfast.linear_act(t(2, 3), t(4, 3, device="meta")),
        RuntimeError,
        "linear_act: weight must be on the device of x, cpu; got meta",
    ),
    (
        lambda: pyfast.linear_glu(t(2, 3), t(4, 3), t(5, 3)),
        ValueError,
        "linear_glu: up_weight must be [N=4, K=3]; got [5, 3]",
    ),
    (
        lambda: pyfast.cross_entropy(t(2, 3), ids(3)),
        ValueError,
        "cross_entropy: target must be [2], to match input [2, 3]; got [3]",
    ),
    (
        lambda: pyfast.cross_entropy(t(2, 3), ids(2), label_smoothing=1.5),
        ValueError,
        "cross_entropy: label_smoothing must be in [0, 1]; got 1.5",
    ),
    (
        lambda: pyfast.cross_entropy(t(2, 3), ids(2), reduction="average"),
        ValueError,
        "cross_entropy: reduction must be one of none, mean, sum; got 'average'",
    ),
    (
        lambda: pyfast.linear_cross_entropy(t(2, 3), t(5, 4), ids(2)),
        ValueError,
        "linear_cross_entropy: input must end in K=4 to match linear_weight [5, 4]; got [2, 3]",
    ),
    (
        lambda: pyfast.attention(t(1, 2, 3, 300), t(1, 2, 3, 300), t(1, 2, 3, 300)),
        ValueError,
        "attention: query must have a head size from 1 to 256; got 300",
    ),
    (
        lambda: pyfast.attention(t(1, 2, 3, 8), t(1, 2, 3, 8), t(1, 2, 3, 8), dropout_p=0.1),
        ValueError,
        "attention: dropout_p must be 0; got 0.1; drop the output of the layer instead",
    ),
    (
        lambda: pyfast.attention(t(1, 4, 3, 8), t(1, 2, 3, 8), t(1, 2, 3, 8)),
        ValueError,
        "attention: key must have as many heads as query's 4; got [1, 2, 3, 8]; "
        "pass enable_gqa=True",
    ),
    (
        lambda: pyfast.rope(t(1, 2, 4, 5), t(4, 2), t(4, 2)),
        ValueError,
        "rope: x must end in an even head size; got [1, 2, 4, 5]",
    ),
    (
        lambda: pyfast.layer_norm(t(2, 3), (4,)),
        ValueError,
        "layer_norm: input must end in normalized_shape [4]; got [2, 3]",
    ),
    (
        lambda: pyfast.layer_norm(t(2, 3), (3,), eps=float("nan")),
        ValueError,
        "layer_norm: eps must be at least 0; got nan",
    ),
    (
        lambda: pyfast.layer_norm(t(2, 3), (3,), t(3), t(3).double()),
        TypeError,
        "layer_norm: bias must have the dtype of weight, torch.float32; got torch.float64",
    ),
    (
        lambda: pyfast.rms_norm(t(2, 3), (3,), residual=t(3)),
        ValueError,
        "rms_norm: residual must be [2, 3], as input; got [3]",
    ),
    (
        lambda: pyfast.rms_norm(t(2, 3), (3,), t(4)),
        ValueError,
        "rms_norm: weight must be [3]; got [4]",
    ),
    (
        lambda: pyfast.adamw_step_([t(2)], [t(2)], [t(2)], [t(3)], 1),
        ValueError,
        "adamw_step_: exp_avg_sqs[0] must be [2] as params[0]; got [3]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[m[:50] for *_, m in WRONG])
def test_door_says_what_is_wrong(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert caught.type is error


def tensor_arguments(case: Case) -> list[str]:
    inputs = case.inputs(torch.float32)
    return [name for name, value in inputs.items() if isinstance(value, Tensor | list)]


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in FIRST for name in tensor_arguments(case)],
    ids=lambda value: value if isinstance(value, str) else value.op,
)
def test_door_speaks_in_one_sentence(case: Case, name: str) -> None:
    inputs = case.inputs(torch.float32)
    value = inputs[name]
    one = value if isinstance(value, Tensor) else value[0]
    for bad in (
        "a word",
        one.to(torch.cfloat),
        one.to(torch.int16),
        one.to("meta"),
        one.new_zeros(()),
    ):
        wrong = bad if isinstance(value, Tensor) else [bad, *value[1:]]
        with pytest.raises(ERRORS) as caught:
            getattr(pyfast, case.op)(**{**inputs, name: wrong})
        sentence = SENTENCE.format(op=case.op)
        assert re.fullmatch(sentence, str(caught.value)), (bad, str(caught.value))


@pytest.mark.parametrize("classes", [5, 70])
def test_cross_entropy_names_the_target_out_of_range(classes: int) -> None:
    for bad in (classes, -1, 2**40):
        target = torch.tensor([0, bad])
        with pytest.raises((ValueError, IndexError, RuntimeError), match=str(bad)):
            pyfast.cross_entropy(t(2, classes), target)
        with pytest.raises((ValueError, IndexError, RuntimeError), match=str(bad)):
            pyfast.linear_cross_entropy(t(2, 3), t(classes, 3), target)


@pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")
def test_hostile_calls_of_torch_ops_do_not_crash() -> None:
    # in its own process, so that a crash is a failure with a name
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_calls"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, f"{last}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    raised, answered = map(int, re.findall(r"\d+", last))
    assert raised > 1000 and answered > 100
