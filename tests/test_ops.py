"""What every operation promises, on the cases of pyfast.testing: values, gradients, manners."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, reference, testing
from pyfast.testing import Case
from tests.run_case import (
    assert_as_good_as_torch,
    cotangent,
    each_tensor,
    recorded,
    results,
    strided,
)

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

CASES = testing.cases()
DIFFERENTIABLE = [case for case in CASES if case.grads]
FIRST = [next(case for case in CASES if case.op == op) for op in backend.OPS]  # one per operation
FIRST_DIFFERENTIABLE = [case for case in FIRST if case.grads]
ISAS = backend.extension().supported_isas() if backend.extension() else []


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backend.extension().isa()
    backend.select_isa(request.param)
    yield request.param
    backend.select_isa(before)


def cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    return each_tensor(inputs, lambda _, t: t.clone())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_is_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(case, dtype)


@pytest.mark.parametrize("isa", ISAS[:-1], indirect=True)  # the last is the default
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_is_as_accurate_on_every_instruction_set(case: Case, isa: str) -> None:
    for dtype in testing.DTYPES:
        assert_as_good_as_torch(case, dtype)


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_leaves_its_inputs_and_repeats_its_gradients(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    before = cloned(inputs)
    for name in case.grads:
        inputs[name].requires_grad_()
    out = getattr(pyfast, case.op)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    kept = [o.detach().clone() for o in outs]
    leaves = [inputs[name] for name in case.grads]
    cotangents = [cotangent(o) for o in outs]
    first = torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outs, kept, strict=True))
    assert all(torch.equal(o, cotangent(o)) for o in cotangents)
    for name, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(value, inputs[name]), name


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_gives_the_gradients_asked_for_and_no_other(case: Case) -> None:
    everything = dict(zip(case.grads, gradients_of(case, case.grads), strict=True))
    for size in range(len(case.grads)):
        for wanted in itertools.combinations(case.grads, size):
            for name, grad in zip(case.grads, gradients_of(case, wanted), strict=True):
                if name in wanted:
                    torch.testing.assert_close(grad, everything[name])
                else:
                    assert grad is None


def gradients_of(case: Case, wanted: tuple[str, ...]) -> list[Tensor | None]:
    inputs = case.inputs(torch.float32)
    for name in wanted:
        inputs[name].requires_grad_()
    out = getattr(pyfast, case.op)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    assert [o.requires_grad for o in outs].count(True) == (len(outs) if wanted else 0) or (
        case.op.endswith("norm") and wanted  # the sum does not depend on weight and bias
    )
    outs = [o for o in outs if o.grad_fn is not None]
    if outs:
        torch.autograd.backward(outs, [cotangent(o) for o in outs])
    return [inputs[name].grad for name in case.grads]


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_takes_any_strides(case: Case) -> None:
    plain, views = case.inputs(torch.float32), each_tensor(case.inputs(torch.float32), strided)
    leaves = [views[name].requires_grad_() for name in case.grads]
    function = getattr(pyfast, case.op)
    out = function(**views)
    outs = list(out) if isinstance(out, tuple) else [out]
    if leaves:
        torch.autograd.backward(outs, [cotangent(o) for o in outs])
        found = outs + [leaf.grad for leaf in leaves]
    else:
        found = outs + [t for name in ("params", "exp_avgs", "exp_avg_sqs") for t in views[name]]
    for a, b in zip(found, results(case, function, plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_takes_gradients_of_any_strides(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    leaves = [inputs[name].requires_grad_() for name in case.grads]
    out = getattr(pyfast, case.op)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    plain = [cotangent(o) for o in outs]
    first = torch.autograd.grad(outs, leaves, plain, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, [strided("", t) for t in plain], retain_graph=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    total = sum(o.sum() for o in outs)  # the gradient of a sum is one number, expanded
    ones = [torch.ones_like(o) for o in outs]
    third = torch.autograd.grad(total, leaves, retain_graph=True)
    for a, b in zip(third, torch.autograd.grad(outs, leaves, ones), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_passes_opcheck(case: Case) -> None:
    for op, args in recorded(case):
        if op.__name__.split(".")[0] == case.op and case.grads:
            names = [argument.name for argument in op._schema.arguments]
            args = tuple(
                value.requires_grad_() if name in names_in_schema(case) else value
                for name, value in zip(names, args, strict=True)
            )
        torch.library.opcheck(op, args)


def names_in_schema(case: Case) -> set[str]:
    """Of the inputs that have gradients: the short ones the schema has."""
    short = {"query": "q", "key": "k", "value": "v", "linear_weight": "weight"}
    first = "logits" if case.op == "cross_entropy" else "x"
    return {short.get(name, first if name == "input" else name) for name in case.grads}


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_op_gradient_matches_finite_differences(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    leaves = [inputs[name].requires_grad_() for name in case.grads]

    def function(*values: Tensor) -> Any:
        return getattr(pyfast, case.op)(**inputs | dict(zip(case.grads, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_compiles_into_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    function = getattr(pyfast, case.op)
    eager = results(case, function, case.inputs(torch.float32))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(case, compiled, case.inputs(torch.float32)), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_refuses_double_backward(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    leaves = [inputs[name].requires_grad_() for name in case.grads]
    out = getattr(pyfast, case.op)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, [cotangent(o) for o in outs], create_graph=True)
    with pytest.raises(RuntimeError, match=r"\w+: order of the derivative must be 1"):
        grads[0].sum().backward()


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_knows_shapes_on_other_devices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYFAST_REQUIRE", raising=False)  # asks for kernels cuda has not yet
    real = results(case, getattr(pyfast, case.op), case.inputs(torch.float32))
    with torch._subclasses.FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no kernel for cuda yet: the reference is taken
        out = getattr(pyfast, case.op)(**on_fake_cuda(case.inputs(torch.float32)))
    outs = list(out) if isinstance(out, tuple) else [out]
    for fake, o in zip(outs, real, strict=False):
        assert (fake.shape, fake.dtype, fake.device.type) == (o.shape, o.dtype, "cuda")


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_fakes_keep_the_device(case: Case) -> None:
    for op, args in recorded(case):
        real = torch.utils._pytree.tree_leaves(op(*args))
        with torch._subclasses.FakeTensorMode():
            fakes = torch.utils._pytree.tree_leaves(op(*on_fake_cuda({"": list(args)})[""]))
        for fake, o in zip(fakes, real, strict=True):
            assert (fake.shape, fake.dtype, fake.device.type) == (o.shape, o.dtype, "cuda")


def on_fake_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    def placeholder(_: str, t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    return each_tensor(inputs, placeholder)


@pytest.mark.parametrize("case", FIRST_DIFFERENTIABLE, ids=str)
def test_op_follows_autocast_as_torch_does(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(case, getattr(pyfast, case.op), inputs)
        theirs = results(case, getattr(reference, case.op), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_gives_the_same_bits_every_time(case: Case) -> None:
    function = getattr(pyfast, case.op)
    first = results(case, function, case.inputs(torch.bfloat16))
    second = results(case, function, case.inputs(torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
