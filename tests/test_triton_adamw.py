"""adamw_step_ in Triton with its numbers on the GPU, as CUDA graphs want it; on the emulator."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast import testing, triton_rooms

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import Launch, emulated

adamw_table = triton_rooms._module("adamw_table")
F, B = torch.float32, torch.bfloat16
# As on a GPU: tensors made from numbers of the host, copies between devices, waiting for a number.
OF_THE_HOST = ("aten.lift_fresh", "aten._to_copy", "aten._local_scalar_dense", "aten._pin_memory")


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def numbers_on_the_gpu() -> Iterator[None]:
    """The emulator's tensors are the CPU's, from where hyper would be taken for the host's."""
    with mock.patch.object(adamw_table, "_expect_hyper_within_reach", lambda *_: True):
        yield


def arguments(count: int) -> tuple[list, Tensor]:
    """Lists of `count` parameters of both dtypes, some empty, one of two chunks; and hyper."""
    make = testing.Maker(F)
    sizes = [0 if i % 10 == 7 else 16385 if i == 3 else 1 + i for i in range(count)]
    dtypes = [B if i % 3 == 1 else F for i in range(count)]
    lists = [[make.normal(n).to(d) for n, d in zip(sizes, dtypes, strict=True)] for _ in range(4)]
    lists[3] = [v.abs() for v in lists[3]]
    hyper = torch.tensor([[1e-2, 0.9, 0.99, 1e-8, 0.1, 1.0 + i] for i in range(count)]).double()
    return [*lists, [], []], hyper


def stepped(count: int, on_gpu: bool) -> tuple[list[Tensor], list[Launch]]:
    """What `count` parameters are after a step, and the launches."""
    lists, hyper = arguments(count)
    numbers = numbers_on_the_gpu() if on_gpu else contextlib.nullcontext()
    with emulated() as log, pyfast.using("triton"), numbers:
        norm = torch.ops.pyfast.adamw_step_(*lists, hyper, True, False, 1.0, 1.0)
    return [norm, *lists[0], *lists[2], *lists[3]], log


@pytest.mark.parametrize("count", [1, 14, 33])
def test_adamw_takes_its_numbers_from_the_gpu(count) -> None:
    """14 rows of the table are one launch that writes 126 numbers, 33 are three."""
    ours, log = stepped(count, on_gpu=True)
    theirs, _ = stepped(count, on_gpu=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    names = [launch.name for launch in log]
    written = {1: 1, 14: 1, 33: 3}[count]
    assert names[:written] == ["adamw_write_kernel"] * written
    assert names[written:] == ["adamw_norm_kernel", "adamw_final_kernel", "adamw_update_kernel"]


def test_adamw_writes_its_table_with_one_kernel() -> None:
    """Compiled once, whatever the numbers: small, large, multiples of 16."""
    launches = [launch for count in (1, 5, 33) for launch in stepped(count, on_gpu=True)[1]]
    assert len({n.binary.ptx for n in launches if n.name == "adamw_write_kernel"}) == 1


def test_adamw_that_is_captured_takes_nothing_from_the_host() -> None:
    """A graph would read such memory again when it may be another's."""
    lists, hyper = arguments(20)
    with emulated(), Names() as names:
        adamw_table.Step(*lists, hyper, True, False, 1.0)
    assert any(name.startswith(OF_THE_HOST) for name in names.found)
    with emulated(), numbers_on_the_gpu(), Names() as names:
        adamw_table.Step(*lists, hyper, True, False, 1.0)
    assert not any(name.startswith(OF_THE_HOST) for name in names.found), names.found


def test_adamw_refuses_numbers_of_the_host_in_a_capture() -> None:
    """They would be those of the capture in every replay."""
    gpu, hyper = torch.device("cuda", 0), torch.ones(1, 6)
    refused = pytest.raises(RuntimeError, match=r"hyper must be on cuda:0 while a CUDA graph is")
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True), refused:
        adamw_table._expect_hyper_within_reach(hyper, gpu)
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False):
        assert not adamw_table._expect_hyper_within_reach(hyper, gpu)
    with pytest.raises(RuntimeError, match=r"hyper must be on the cpu or cpu; got meta"):
        adamw_table._expect_hyper_within_reach(hyper.to("meta"), torch.device("cpu"))
