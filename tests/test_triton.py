"""The Triton kernels on the emulator: values and gradients through the doors, schedules, guards."""

import inspect
import itertools
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, testing, triton_rooms
from tests import run_case
from tests.run_case import assert_as_good_as_torch, recorded, results, strided

triton = pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import compiled, emulated  # noqa: E402

OPS = ("layer_norm", "rms_norm", "cross_entropy", "rope", "adamw_step_")
# Every case on both capabilities; float16, which differs from bfloat16 in conversions only, once.
RUNS = [
    (case, dtype, capability)
    for op in OPS
    for i, case in enumerate(testing.cases(op))
    for dtype, capability in ((torch.float32, 80), (torch.bfloat16, 90), (torch.float16, 90))
    if i == 0 or dtype != torch.float16
]
PRESENT = [op for op in backend.OPS if triton_rooms.blocker(op) is None]


@pytest.fixture
def on_triton():
    """Triton runs CPU tensors, on the emulator; the log of its launches."""
    with emulated() as log, pyfast.using("triton"):
        yield log


@pytest.mark.parametrize(("case", "dtype", "capability"), RUNS, ids=str)
def test_triton_is_as_good_as_torch(case, dtype, capability) -> None:
    with emulated(capability) as log, pyfast.using("triton"):
        assert_as_good_as_torch(case, dtype)
    assert log and {launch.binary.capability for launch in log} == {capability}
    # the same kernels again, in another order of the warps, with all that is approximate shifted
    with emulated(capability, order="random", seed=1, perturb=True), pyfast.using("triton"):
        assert_as_good_as_torch(case, dtype)


# one row, one column; 8200: too wide for registers; 65793: past 64k classes; 2: one pair; 0: none
EDGES = [
    testing.norm("layer_norm", 3, 1),
    testing.norm("rms_norm", 1, 17, residual=True),
    testing.norm("layer_norm", 3, 5001, residual=True),
    testing.norm("layer_norm", 3, 8200, residual=True),
    testing.norm("rms_norm", 2, 9001),
    testing.norm("layer_norm", 0, 8),
    testing.cross_entropy(1, 1),
    testing.cross_entropy(2, 65793, label_smoothing=0.1),
    testing.rope(1, 1, 3, 2),
    testing.rope(2, 5, 3, 80),
    testing.rope(0, 2, 3, 8),
]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_triton_takes_any_size(case, on_triton) -> None:
    assert_as_good_as_torch(case, torch.bfloat16)
    with emulated(order="random", seed=2, perturb=True):
        assert_as_good_as_torch(case, torch.bfloat16)


def misaligned(_: str, t: Tensor) -> Tensor:
    """The same values one element into a larger tensor."""
    if not t.numel() or t.dtype == torch.int64:
        return t
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


@pytest.mark.parametrize("change", [strided, misaligned], ids=["strided", "misaligned"])
@pytest.mark.parametrize("op", OPS)
def test_triton_takes_any_layout(op, change, on_triton) -> None:
    assert_as_good_as_torch(testing.cases(op)[0], torch.float32, change)


@pytest.mark.parametrize("op", OPS)
def test_triton_gives_the_same_bits_in_every_schedule(op) -> None:
    case = testing.cases(op)[-1]
    runs = []
    for order in ("greedy", "random"):
        with emulated(order=order, seed=5), pyfast.using("triton"):
            runs.append(results(case, getattr(pyfast, op), case.inputs(torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", OPS[:-1])  # adamw_step_ is there to write
def test_triton_leaves_its_inputs_alone(op, on_triton) -> None:
    for function, args in recorded(testing.cases(op)[0]):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        function(*args)
        same = (torch.equal(a, b) for a, b in zip(args, before, strict=True) if torch.is_tensor(a))
        assert all(same), function


def test_compiled_functions_run_triton(on_triton) -> None:
    weight = torch.randn(33, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        return pyfast.layer_norm(x, (33,), weight).square().sum()

    function(torch.randn(3, 33)).backward()
    kernels = [launch.name for launch in on_triton]
    assert kernels == ["norm_forward_kernel", "norm_backward_kernel", "column_sums_kernel"]


@pytest.mark.parametrize("op", PRESENT)
def test_rooms_have_the_arguments_of_the_schemas(op) -> None:
    module = triton_rooms._module(triton_rooms.FILES.get(op, op))
    for name in (op, f"{op}_backward"):
        if hasattr(torch.ops.pyfast, name):
            schema = getattr(torch.ops.pyfast, name).default._schema
            room = getattr(module, f"{name.rstrip('_')}_triton")
            assert list(inspect.signature(room).parameters) == [a.name for a in schema.arguments]


@pytest.mark.parametrize(
    "path", sorted(triton_rooms.kernels_dir().glob("*.py")), ids=lambda p: p.stem
)
def test_triton_sources_keep_the_rules(path) -> None:
    """Nothing waits for the device, adds in an order of chance, or is tuned behind one's back."""
    words = r"\.item\(|\.tolist\(|\.cpu\(|synchronize|tl\.atomic|autotune"
    assert not re.findall(words, path.read_text())


def wrong(t: Tensor) -> dict[str, Any]:
    """Replacements of a tensor argument that no room may accept."""
    bad = {"rank up": t.unsqueeze(0), "int32": t.to(torch.int32), "complex": t.to(torch.cfloat)}
    bad["bool"] = t > 0
    for dim in range(t.dim()):
        bad[f"dim {dim} doubled"] = torch.cat((t, t), dim)
        bad[f"dim {dim} one short"] = t.narrow(dim, 0, t.shape[dim] - 1)
    return bad


# sizes that nothing else must match
FREE = {("rope", "x", "dim 0"), ("rope", "x", "dim 1"), ("cross_entropy", "logits", "dim 1")}


@pytest.mark.parametrize("op", OPS)
def test_rooms_refuse_what_they_could_not_read_safely(op, on_triton) -> None:
    """Called below the doors; nothing may be launched."""
    launched = mock.Mock(side_effect=AssertionError("launched"))
    for function, args in recorded(testing.cases(op)[0]):
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", launched):
            for i, argument in enumerate(function._schema.arguments):
                value = args[i][0] if isinstance(args[i], list) and args[i] else args[i]
                if not isinstance(value, Tensor):
                    continue
                for words, bad in wrong(value).items():
                    if (op, argument.name, words[:5]) in FREE:
                        continue
                    put = [bad, *args[i][1:]] if isinstance(args[i], list) else bad
                    told = f"{function}: {argument.name}: {words}"
                    with pytest.raises((RuntimeError, TypeError, ValueError)):
                        function(*args[:i], put, *args[i + 1 :])
                        pytest.fail(f"{told} was accepted")


def adamw_lists(kinds: list[tuple], grown: int = 0) -> dict[str, list[Tensor]]:
    """Parameters of (dtype, dtype of gradient, of moments, size)."""
    make = testing.Maker(torch.float32)
    lists: dict[str, list[Tensor]] = {n: [] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    for param, grad, moment, size in kinds:
        shape = (size + grown,)
        lists["params"].append(make.normal(*shape).to(param))
        lists["grads"].append(make.normal(*shape, scale=0.1).to(grad))
        lists["exp_avgs"].append(make.normal(*shape, scale=0.1).to(moment))
        lists["exp_avg_sqs"].append(make.normal(*shape, scale=0.1).square().to(moment))
    return lists


F, B, D = torch.float32, torch.bfloat16, torch.float64
MIXED = [(F, F, F, 40), (B, B, B, 16500), (B, F, F, 33), (torch.float16, F, F, 5), (D, D, D, 7)]


def test_adamw_steps_parameters_of_all_dtypes_in_one_launch(on_triton) -> None:
    """16500: more than a chunk. Masters for the second and third, one setting for each."""
    ours, theirs = adamw_lists(MIXED), adamw_lists(MIXED)
    settings = {"step": [1.0, 2.0, 3.0, 4.0, 5.0], "lr": [1e-1, 1e-2, 1e-3, 1e-2, 1e-1]}
    settings |= {"weight_decay": 0.1, "max_norm": 1.0, "grad_scale": 0.5}
    states = []
    for lists, function in ((ours, pyfast.adamw_step_), (theirs, pyfast.reference.adamw_step_)):
        masters = [None, *(p.float() for p in lists["params"][1:3]), None, None]
        peaks = [v.clone() * 0.9 for v in lists["exp_avg_sqs"]]
        norm = function(**lists, **settings, masters=masters, max_exp_avg_sqs=peaks)
        kept = [m for m in masters if m is not None]
        states.append([norm, *itertools.chain(*lists.values()), *peaks, *kept])
    for our, their in zip(*states, strict=True):
        error = max(4 * torch.finfo(our.dtype).eps, 2e-6)  # the reference's norm is of float32
        assert our.dtype == their.dtype
        assert torch.allclose(our, their, rtol=error, atol=error * float(their.abs().max()))
    names = [launch.name for launch in on_triton]
    assert names == ["adamw_norm_kernel", "adamw_final_kernel", "adamw_update_kernel"]


def test_adamw_masters_keep_what_bfloat16_would_lose(on_triton) -> None:
    """Steps too small for bfloat16 add up in the master, whose rounding the parameter is."""
    param, grad = torch.ones(50, dtype=B), torch.ones(50, dtype=B)
    master = param.float()
    m, v = torch.zeros(50), torch.zeros(50)
    for step in range(1, 4):
        pyfast.adamw_step_(
            [param], [grad], [m], [v], step, lr=1e-3, weight_decay=0.0, masters=[master]
        )
    assert torch.allclose(master, torch.full((50,), 1 - 3e-3), rtol=1e-6)
    assert torch.equal(param, master.bfloat16())


def test_adamw_refuses_memory_written_twice(on_triton) -> None:
    lists = adamw_lists([(F, F, F, 40), (F, F, F, 40)])
    lists["exp_avgs"][1] = lists["params"][0]
    args = [*lists.values(), [], [], torch.ones(2, 6, dtype=D), True, False, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"must not share memory with"):
        torch.ops.pyfast.adamw_step_(*args)
    lists["params"][0] = torch.zeros(1).expand(40)
    lists["exp_avgs"][1] = torch.zeros(40)
    with pytest.raises(ValueError, match=r"params\[0\] must not overlap itself"):
        torch.ops.pyfast.adamw_step_(*args[:0], *lists.values(), *args[4:])


def test_adamw_of_nothing_has_norm_0(on_triton) -> None:
    assert pyfast.adamw_step_([], [], [], [], 1) == 0
    empty = [torch.empty(0)]
    assert pyfast.adamw_step_(empty, [torch.empty(0)], [torch.empty(0)], [torch.empty(0)], 1) == 0
    assert not on_triton


def test_emulator_leaves_triton_as_it_was() -> None:
    from triton.runtime import driver

    before = vars(driver).get("_active")
    with pytest.raises(KeyError), emulated(90), compiled(80):
        raise KeyError
    assert vars(driver).get("_active") is before
    assert torch.empty.__module__ != run_case.__name__ and not hasattr(torch.empty, "__wrapped__")
