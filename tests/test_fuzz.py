"""Random sizes, dtypes, strides and modes: what fits is as accurate as torch, the rest raises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyfast import backend, reference, testing
from tests.run_case import assert_as_good_as_torch, strided

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

few = st.integers(0, 9)  # rows: none, one, less than a block
some = st.integers(1, 40)  # columns: less and more than the widest vector
flag = st.booleans()
acts = st.sampled_from(list(reference.ACTIVATIONS))
smoothing = st.sampled_from([0.0, 0.1, 1.0])
reductions = st.sampled_from(["mean", "sum", "none"])
CASES = {
    "linear_act": st.builds(testing.linear_act, few, some, some, acts, flag, flag),
    "linear_glu": st.builds(testing.linear_glu, few, some, some, acts, flag),
    "cross_entropy": st.builds(
        testing.cross_entropy,
        few,
        some,
        flag,
        label_smoothing=smoothing,
        reduction=reductions,
        ignore_index=st.sampled_from([-100, 0]),
    ),
    "linear_cross_entropy": st.builds(
        testing.linear_cross_entropy,
        few,
        some,
        some,
        flag,
        flag,
        label_smoothing=smoothing,
        reduction=reductions,
    ),
    "attention": st.builds(
        testing.attention,
        st.integers(1, 3),
        st.just(4),
        some,
        some,
        kv=st.sampled_from([1, 2, 4]),
        mask=st.sampled_from(["", "additive"]),
    )
    | st.builds(testing.attention, st.just(2), st.just(2), some, some, causal=st.just(True))
    | st.builds(testing.attention, st.just(1), st.just(2), some, some, tk=some),
    "rope": st.builds(
        testing.rope, few, few, few, st.integers(1, 20).map(lambda n: 2 * n), interleaved=flag
    ),
    "layer_norm": st.builds(
        testing.norm, st.just("layer_norm"), few, some, affine=flag, residual=flag
    ),
    "rms_norm": st.builds(testing.norm, st.just("rms_norm"), few, some, affine=flag, residual=flag),
    "adamw_step_": st.builds(
        testing.adamw,
        st.lists(st.lists(few, max_size=3).map(tuple), max_size=4).map(tuple),
        max_norm=st.sampled_from([None, 0.1, 1e9]),
        maximize=flag,
        decoupled=flag,
        weight_decay=st.sampled_from([0.0, 0.1]),
    ),
}
CHANGES: dict[str, Callable[[str, Tensor], Tensor] | None] = {
    "contiguous": None,
    "strided": strided,
    "transposed": lambda _, t: t.t().contiguous().t() if t.dim() == 2 else t,
    "offset": lambda _, t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("op", CASES)
def test_fuzz_matches_the_reference(op: str) -> None:
    @settings(max_examples=100)
    @given(CASES[op], st.sampled_from(testing.DTYPES), st.sampled_from(list(CHANGES)))
    def run(case: testing.Case, dtype: torch.dtype, change: str) -> None:
        assert_as_good_as_torch(case, dtype, CHANGES[change], slack=4.0)

    run()


def test_fuzz_covers_every_operation() -> None:
    assert set(CASES) == set(backend.OPS)


def schemas() -> list[Any]:
    """Of every operation, gradients included."""
    known = torch._C._jit_get_all_schemas()
    return sorted((s for s in known if s.name.startswith("pyfast::")), key=lambda s: s.name)


# Sizes and dtypes from small pools, so that arguments fit each other often enough to get far.
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 3, 3, 8]), max_size=5)
dtypes = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.int64])
layouts = st.sampled_from(["contiguous"] * 3 + ["strided", "transposed", "expanded"])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype, layout = draw(shapes), draw(dtypes), draw(layouts)
    if layout == "expanded":
        return torch.ones([1] * len(shape), dtype=dtype).expand(shape)
    t = (torch.arange(torch.Size(shape).numel()) % 7).to(dtype).view(shape)
    if layout == "strided":
        return strided("", t)
    return t.transpose(0, -1) if layout == "transposed" and shape else t


VALUES: dict[str, st.SearchStrategy] = {
    "Tensor": tensors(),
    "Optional[Tensor]": st.none() | tensors(),
    "List[Tensor]": st.lists(tensors(), max_size=3),
    "str": st.sampled_from(["none", "relu", "gelu", "mean", "sum", "", "nothing"]),
    "bool": flag,
    "int": st.sampled_from([-100, -1, 0, 1, 3, 2**62]),
    "float": st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e-5, float("nan"), float("inf")]),
}


@pytest.mark.parametrize("schema", schemas(), ids=lambda s: s.name.partition("::")[2])
def test_fuzz_of_the_schema_raises_or_answers(schema: Any) -> None:
    function = getattr(torch.ops.pyfast, schema.name.partition("::")[2]).default

    @settings(max_examples=150)
    @given(st.tuples(*(VALUES[str(argument.type)] for argument in schema.arguments)))
    def run(arguments: tuple) -> None:
        try:
            function(*arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            assert str(error)

    run()
