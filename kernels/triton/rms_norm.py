"""rms_norm in Triton."""

from torch import Tensor

from pyfast.kernels.norm_rooms import norm_backward, norm_forward

OP = "rms_norm"


def rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum, rstd); sum is x + residual, or empty."""
    made = norm_forward(OP, x, residual, weight, None, eps, centre=False)
    return made.out, made.sum, made.rstd


def rms_norm_backward_triton(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_weight); grad_weight is empty where it is not needed."""
    made = norm_backward(OP, grad_out, grad_sum, x, None, rstd, weight, need_weight, False)
    return made[:2]
