"""What the rooms of linear layers share: guards, and the layout of a weight gradient."""

from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.activations import ACTIVATIONS


def check_linear(
    op: str, x: Tensor, weight: Tensor, act: str, name: str = "weight"
) -> tuple[int, int, int]:
    """(M, N, K) of x [M, K] and weight [N, K], after the guards."""
    guards.first(op, "x", x, 2)
    m, k = x.shape
    guards.expect(weight.dim() == 2, op, name, "have 2 dimensions, [N, K]", list(weight.shape))
    n = weight.shape[0]
    guards.expect_like(op, name, weight, x, (n, k))
    guards.expect(act in ACTIVATIONS, op, "act", f"be one of {', '.join(ACTIVATIONS)}", repr(act))
    return m, n, k


def is_transposed(weight: Tensor) -> bool:
    """Whether [N, K] is the transpose of a row-major matrix: its gradient comes in that layout."""
    return weight.stride(0) == 1 and weight.stride(1) != 1 and weight.stride(1) >= weight.shape[0]


def empty_weight(like: Tensor, n: int, k: int, transposed: bool, needed: bool) -> Tensor:
    """Room for the gradient of a weight [N, K]; empty where it is not needed."""
    if not needed:
        return like.new_empty(0)
    return like.new_empty(k, n).t() if transposed else like.new_empty(n, k)
