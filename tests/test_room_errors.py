"""Calls of torch.ops.pyfast that no room can take: one sentence in the house form."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

import pyfast
from bench.devices import emulated, emulated_backends
from pyfast import backend, testing
from tests.run_case import recorded

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")
HERE = ["cpp", *emulated_backends()]
ERRORS = (RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    with pyfast.using(name) if name == "cpp" else emulated(name):
        yield


@pytest.mark.parametrize("room", HERE)
@pytest.mark.parametrize("op", backend.OPS)
def test_rooms_refuse_in_one_sentence(op, room) -> None:
    """None, which torch.ops takes for any tensor; one dimension too many."""
    for function, args in recorded(testing.cases(op)[0]):
        for i, argument in enumerate(function._schema.arguments):
            if not isinstance(argument.type, torch.TensorType):
                continue
            for bad in (None, args[i][None]):
                with running(room), pytest.raises(ERRORS, match=rf"^{op}: .*\w+ must .+; got .+"):
                    function(*args[:i], bad, *args[i + 1 :])
                    pytest.fail(f"{function}: {argument.name} was accepted")
