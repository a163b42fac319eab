"""The CUDA C++ kernels on the emulator: values and gradients through the doors, layouts, guards."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, testing
from tests.cuda_lanes import check, check_twice, needs_emulator
from tests.emulator.cuda import emulated
from tests.run_case import recorded, results, strided

pytestmark = needs_emulator

OPS = (
    "attention",
    "linear_act",
    "linear_glu",
    "layer_norm",
    "rms_norm",
    "cross_entropy",
    "linear_cross_entropy",
    "rope",
    "adamw_step_",
)
# Everything: the kernels of the two capabilities differ, as do those of float32 and 16 bits.
RUNS = [
    (case, dtype, capability)
    for case in testing.cases()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for capability in (80, 90)
]


@pytest.fixture
def on_cuda():
    """The CUDA rooms take CPU tensors, on the emulator; the log of their launches."""
    with emulated() as log, pyfast.using("cuda"):
        yield log


@pytest.mark.parametrize(("case", "dtype", "capability"), RUNS, ids=str)
def test_cuda_is_as_good_as_torch(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


# one row, one column; 8200: too wide for registers, 33001: for shared memory, too; 65793: a row of
# two blocks; 0: none
EDGES = [
    testing.norm("layer_norm", 3, 1),
    testing.norm("rms_norm", 1, 17, residual=True),
    testing.norm("layer_norm", 3, 8200, residual=True),
    testing.norm("rms_norm", 2, 9001),
    testing.norm("layer_norm", 2, 5003),
    testing.norm("layer_norm", 3, 33001, residual=True),
    testing.norm("rms_norm", 2, 33001),
    testing.norm("layer_norm", 0, 8),
    testing.norm("rms_norm", 1025, 8),  # runs of 512 rows, and one more
    testing.norm("layer_norm", 33, 761, residual=True),  # the longest in runs
    testing.cross_entropy(1, 1),
    testing.cross_entropy(2, 65793, label_smoothing=0.1),
    testing.cross_entropy(3, 5003, weighted=True),
    testing.cross_entropy(32775, 2),  # more rows than blocks in one dimension of a grid
    testing.rope(1, 1, 3, 2),
    testing.rope(2, 5, 3, 80),
    testing.rope(0, 2, 3, 8),
]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_cuda_takes_any_size(case) -> None:
    check(case, torch.bfloat16, 80)


@pytest.mark.parametrize(("size", "value_size"), [(80, 72), (90, 96), (192, 192)])
def test_cuda_attention_takes_the_kernel_of_its_head_size(size, value_size) -> None:
    """On capability 9.0, where the products of a kernel are of all its features."""
    case = testing.attention(1, 2, 70, size, tk=140, causal=True)

    def narrow(name: str, t: Tensor) -> Tensor:
        return t[..., :value_size] if name == "value" else t

    for launch in check(case, torch.bfloat16, 90, narrow):
        assert f"Li{max(-(-size // 16) * 16, value_size)}E" in launch.binary.mangled


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("cols", [4104, 8195, 25608])
def test_cuda_norms_in_strips_keep_the_digits_of_float32(op, cols) -> None:
    check(testing.norm(op, 35, cols, residual=True), torch.float32, 90)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("rows", "cols"), [(2300, 24), (300, 4104)])
def test_cuda_norms_keep_the_statistics_of_many_rows_apart(op, rows, cols) -> None:
    """More than 32 for each team, which move together; in registers and in strips."""
    check(testing.norm(op, rows, cols), torch.float32, 80, processors=1)


def misaligned(_: str, t: Tensor) -> Tensor:
    """The same values one element into a larger tensor."""
    if not t.numel() or t.dtype == torch.int64:
        return t
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


@pytest.mark.parametrize("change", [strided, misaligned], ids=["strided", "misaligned"])
@pytest.mark.parametrize("op", OPS)
def test_cuda_takes_any_layout(op, change) -> None:
    check(testing.cases(op)[0], torch.float32, 80, change)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("name", "gap"), [("x", 2), ("cos", 1), ("sin", 2)])
def test_cuda_rope_reads_rows_at_any_distance(name, gap, interleaved) -> None:
    """Four elements at once only where every row begins at a multiple of them."""

    def apart(which: str, t: Tensor) -> Tensor:
        return torch.cat((t, t[..., :gap]), -1)[..., : t.shape[-1]] if which == name else t

    check(testing.rope(2, 3, 5, 16, interleaved), torch.float32, 80, apart)


def test_cuda_rope_takes_several_sequences_and_pairs_with_one_thread() -> None:
    """Five sequences for two blocks; 129 pairs, none with another, for 128 threads."""
    log = check(testing.rope(5, 2, 7, 16), torch.float32, 80, processors=1)
    assert {launch.grid[:2] for launch in log} == {(7, 2)}
    log = check(testing.rope(1, 2, 3, 258), torch.float32, 80)
    assert {launch.block[0] for launch in log} == {128}


# Operands that kernels read by their own strides.
FAR = [("attention", name) for name in ("query", "key", "value")]
FAR += [("linear_act", "x"), ("linear_act", "weight"), ("cross_entropy", "input"), ("rope", "x")]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("op", "far"), FAR)
def test_cuda_reads_rows_further_apart_than_32_bits_count(op, far, capability) -> None:
    """The last one is 2**31 elements after the first; what lies between them is never touched."""

    def spread(name: str, t: Tensor) -> Tensor:
        if name != far:
            return t
        rows = t.dim() - 2  # the dimension
        apart = 2**31 // (t.shape[rows] - 1) // 8 * 8 + 8
        outer = [t.shape[-1] * t.shape[d + 1 : rows].numel() for d in range(rows)]
        strides = [*outer, apart, 1]
        return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)

    check(testing.cases(op)[0], torch.bfloat16, capability, spread)


@pytest.mark.parametrize("op", OPS)
def test_cuda_gives_the_same_bits_in_every_schedule(op) -> None:
    case = testing.cases(op)[-1]
    runs = []
    for order in ("greedy", "random"):
        with emulated(order=order, seed=5), pyfast.using("cuda"):
            runs.append(results(case, getattr(pyfast, op), case.inputs(torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", OPS[:-1])  # adamw_step_ is there to write
def test_cuda_leaves_its_inputs_alone(op, on_cuda) -> None:
    for function, args in recorded(testing.cases(op)[0]):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        with pyfast.using("cuda"):
            function(*args)
        same = (torch.equal(a, b) for a, b in zip(args, before, strict=True) if torch.is_tensor(a))
        assert all(same), function


def test_compiled_functions_run_cuda(on_cuda) -> None:
    weight = torch.randn(33, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        return pyfast.layer_norm(x, (33,), weight).square().sum()

    function(torch.randn(3, 33)).backward()
    kernels = [launch.name for launch in on_cuda]
    directions = "forward", "backward"
    assert kernels == [*(f"norm_run_{d}_kernel" for d in directions), "column_sums_kernel"]


def wrong(t: Tensor) -> dict[str, Any]:
    """Replacements of a tensor argument that no room may accept."""
    bad = {"rank up": t.unsqueeze(0), "int32": t.to(torch.int32), "complex": t.to(torch.cfloat)}
    bad |= {"bool": t > 0, "sparse": t.to_sparse()}
    for dim in range(t.dim()):
        bad[f"dim {dim} doubled"] = torch.cat((t, t), dim)
        bad[f"dim {dim} one short"] = t.narrow(dim, 0, t.shape[dim] - 1)
    return bad


# sizes that nothing else must match
FREE = {("rope", "x", "dim 0"), ("rope", "x", "dim 1"), ("cross_entropy", "logits", "dim 1")}
FREE |= {("attention", "q", "dim 1"), ("attention", "q", "dim 2"), ("attention", "v", "dim 3")}
FREE |= {("linear_act", "x", "dim 0"), ("linear_glu", "x", "dim 0")}
FREE |= {("linear_cross_entropy", "weight", "dim 0")}


@pytest.mark.parametrize("op", OPS)
def test_rooms_refuse_what_they_could_not_read_safely(op) -> None:
    """Called below the doors; nothing may be launched."""
    calls = recorded(testing.cases(op)[0])
    with emulated() as log, pyfast.using("cuda"):
        for function, args in calls:
            for i, argument in enumerate(function._schema.arguments):
                value = args[i][0] if isinstance(args[i], list) and args[i] else args[i]
                if not isinstance(value, Tensor):
                    continue
                for words, bad in wrong(value).items():
                    if (op, argument.name, words[:5]) in FREE:
                        continue
                    put = [bad, *args[i][1:]] if isinstance(args[i], list) else bad
                    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
                        function(*args[:i], put, *args[i + 1 :])
                        pytest.fail(f"{function}: {argument.name}: {words} was accepted")
    assert not log


@pytest.mark.parametrize("op", OPS)
def test_rooms_refuse_tensors_of_another_device(op) -> None:
    for function, args in recorded(testing.cases(op)[0]):
        for argument, value in zip(function._schema.arguments, args, strict=True):
            first = value[0] if isinstance(value, list) and value else value
            if not isinstance(first, Tensor) or argument.name == "hyper":
                continue
            told = pytest.raises(RuntimeError, match=rf"{argument.name}.* must be on (a CUDA|cuda)")
            with emulated(on_host=argument.name) as log, pyfast.using("cuda"), told:
                function(*args)
            assert not log


def test_cuda_refuses_cpu_tensors_in_one_sentence() -> None:
    """Without the emulator, where they are what they are."""
    with pyfast.using("cuda"), pytest.raises(RuntimeError, match="x must be on a CUDA device"):
        pyfast.rms_norm(torch.ones(2, 8), (8,))


def test_using_cuda_shows_what_it_covered_again() -> None:
    def table() -> str:
        return torch._C._dispatch_dump_table("pyfast::layer_norm").split("CUDA")[0]

    before = table()
    with pyfast.using("cuda"):
        assert table() != before and "cuda_rooms" in table()
        assert backend.choose("layer_norm", "cpu").backend == "cuda"
    assert table() == before
    assert backend.choose("layer_norm", "cuda").backend == "cuda"
