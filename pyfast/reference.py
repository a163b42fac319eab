"""The plain-torch meaning of each operation: names and arguments of the doors in `pyfast.ops`.

These functions are differentiable by torch's own autograd, run on any device and dtype, and are
what a door falls back to where no kernel exists. In float64 they are the truth of the tests.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
}


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """act(x @ weight.T + bias): x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return ACTIVATIONS[act](F.linear(x, weight, bias))


def linear_glu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """act(x @ gate_weight.T + gate_bias) * (x @ up_weight.T + up_bias): [..., K] -> [..., N]."""
    return ACTIVATIONS[act](F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.cross_entropy` for class indices; the loss comes in `dtype` (default: that of `input`)."""
    loss = F.cross_entropy(
        input if dtype is None else input.to(torch.promote_types(input.dtype, dtype)),
        target,
        weight if weight is None or dtype is None else weight.to(dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss if dtype is None else loss.to(dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target): [..., K], [...]."""
    logits = F.linear(input, linear_weight, linear_bias)
    flat = logits.reshape(-1, logits.shape[-1])
    loss = cross_entropy(
        flat,
        target.reshape(-1),
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        dtype=dtype,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: [B, H, Tq, D] x [B, Hkv, Tk, D] -> [B, H, Tq, Dv]."""
    if is_causal and scale is not None and scale <= 0:  # torch 2.13 scales its -inf, too: NaN
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        is_causal = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.layer_norm`; with `residual`, (input + residual, norm of that sum)."""
    if residual is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    total = input + residual
    return total, F.layer_norm(total, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.rms_norm`; with `residual`, (input + residual, norm of that sum)."""
    if residual is None:
        return F.rms_norm(input, normalized_shape, weight, eps)
    total = input + residual
    return total, F.rms_norm(total, normalized_shape, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: x [B, H, T, D], cos and sin [T, D/2].

    Pairs are (i, i + D/2), as Hugging Face's Llama has them, or (2i, 2i + 1) when `interleaved`.
    """
    cos, sin = cos.to(torch.promote_types(x.dtype, torch.float32)), sin.to(cos.dtype)
    wide = x.to(cos.dtype)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _per_parameter(value: float | Sequence[float], count: int) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value] * count


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: float | Sequence[float],
    *,
    lr: float | Sequence[float] = 1e-3,
    betas: tuple[float, float] | Sequence[tuple[float, float]] = (0.9, 0.999),
    eps: float | Sequence[float] = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
    max_norm: float | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One AdamW step on all parameters in place; the global gradient norm before clipping.

    Decoupled weight decay: Loshchilov & Hutter, 2019; `decoupled=False` is Adam with L2 (Kingma &
    Ba, 2015); `max_exp_avg_sqs` makes it AMSGrad (Reddi et al., 2018). The gradient used is
    `grad * grad_scale`, scaled down so that its global norm is at most `max_norm`. Where
    `found_inf` is not 0 there is no step.
    """
    count = len(params)
    wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    norms = [torch.linalg.vector_norm(g.to(w)) for g, w in zip(grads, wide, strict=True)]
    norm = torch.stack([n.double() for n in norms]).norm() if norms else torch.zeros(())
    norm = norm * abs(grad_scale)
    if found_inf is not None and bool(found_inf):
        return norm.float()
    ratio = 1.0 if max_norm is None else max_norm / (float(norm) + 1e-6)
    clip = 1.0 if ratio >= 1.0 else ratio  # NaN stays: a broken gradient is not to look like a step
    pairs = betas if betas and isinstance(betas[0], Sequence) else [betas] * count
    settings = [_per_parameter(v, count) for v in (step, lr, eps, weight_decay)]
    for i, (t, rate, epsilon, decay) in enumerate(zip(*settings, strict=True)):
        beta1, beta2 = pairs[i]
        master = masters[i] if masters is not None else None
        p = (params[i] if master is None else master).to(wide[i])
        g = grads[i].to(wide[i]) * (grad_scale * clip * (-1.0 if maximize else 1.0))
        if decoupled:
            p = p * (1 - rate * decay)
        else:
            g = g + decay * p
        m = torch.lerp(exp_avgs[i].to(wide[i]), g, 1 - beta1)
        v = exp_avg_sqs[i].to(wide[i]) * beta2 + g * g * (1 - beta2)
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        if max_exp_avg_sqs is not None:
            v = torch.maximum(max_exp_avg_sqs[i].to(wide[i]), v)
            max_exp_avg_sqs[i].copy_(v)
        p = p - rate / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + epsilon)
        if master is not None:
            master.copy_(p)
        params[i].copy_(p)
    return norm.float()
