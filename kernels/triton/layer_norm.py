"""layer_norm in Triton."""

from torch import Tensor

from pyfast.kernels.norm_rooms import norm_backward, norm_forward

OP = "layer_norm"


def layer_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, sum, mean, rstd); sum is x + residual, or empty."""
    return tuple(norm_forward(OP, x, residual, weight, bias, eps, centre=True))


def layer_norm_backward_triton(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias); what is not needed is empty."""
    return norm_backward(OP, grad_out, grad_sum, x, mean, rstd, weight, need_weight, need_bias)
