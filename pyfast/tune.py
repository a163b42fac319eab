"""`pyfast tune`: measure ahead of time which kernels are the quickest on this machine's GPU.

Forward and backward of each operation at the sizes of common models; what is known already is not
measured again.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import pyfast
from pyfast import backend, reference, testing
from pyfast.testing import Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cases(tokens: int, width: int, classes: int) -> list[Case]:
    """One call of each operation in a transformer of this width, on so many tokens."""
    heads, head = max(1, width // 64), min(64, width)
    return [
        testing.linear_act(tokens, width, 4 * width, "gelu_tanh"),
        testing.linear_act(tokens, width, width, "none"),
        testing.linear_act(tokens, 4 * width, width, "none"),
        testing.linear_glu(tokens, width, 4 * width),
        testing.cross_entropy(tokens, classes),
        testing.linear_cross_entropy(tokens, width, classes),
        testing.attention(1, heads, tokens, head, causal=True),
        testing.rope(1, heads, tokens, head),
        *(
            testing.norm(op, tokens, width, residual=residual)
            for op in ("layer_norm", "rms_norm")
            for residual in (False, True)
        ),
        testing.adamw(((width, width), (width,))),
    ]


def main(dtypes: list[str], tokens: list[int], widths: list[int], classes: int) -> int:
    """Measure every operation at every one of these, telling each winner; 0.

    Raises:
        ValueError: a size is not above 0.
        RuntimeError: there is no GPU, or nothing may be measured.
    """
    for name, sizes in (("tokens", tokens), ("widths", widths), ("classes", [classes])):
        if min(sizes) < 1:
            raise ValueError(f"tune: {name} must be above 0; got {min(sizes)}")
    if not torch.cuda.is_available():
        raise RuntimeError("tune: there must be a GPU; torch sees none")
    if not backend.measures():
        raise RuntimeError("tune: measuring must be on; it is off by a setting: see pyfast doctor")
    for count, width in itertools.product(tokens, widths):
        for case in cases(count, width, classes):
            for dtype in dtypes:
                for line in tune(case, DTYPES[dtype], "cuda"):
                    print(line, flush=True)
    return 0


def tune(case: Case, dtype: torch.dtype, device: str) -> Iterator[str]:
    """Measure one case; a line for people for what was found."""
    winners = backend.measured
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), case.inputs(dtype))
    before, winners.asked = set(winners.known), ""
    run(case, getattr(pyfast, case.op), inputs)  # its rooms measure themselves
    asked = winners.asked
    if asked and asked not in winners.known:
        plain, ours = getattr(reference, case.op), getattr(pyfast, case.op)
        candidates = {
            "pyfast": lambda: run(case, ours, inputs),
            "torch": lambda: run(case, plain, inputs),
        }
        winners.pick(asked, candidates, measure=True)
    for key in sorted(set(winners.known) - before):
        yield f"{winners.known[key]:8} {key}"


def run(case: Case, function: object, inputs: dict) -> None:
    """Forward, and backward where there is one."""
    live = {
        name: value.detach().requires_grad_() if name in case.grads else value
        for name, value in inputs.items()
    }
    out = function(**live)  # type: ignore[operator]
    outs = out if isinstance(out, tuple) else (out,)
    if case.grads:
        torch.autograd.grad(outs, [live[n] for n in case.grads], [torch.ones_like(o) for o in outs])
