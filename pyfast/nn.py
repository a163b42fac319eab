"""Drop-in layers: torch.nn's arguments, parameter names and state dicts, over pyfast's operations.

Every layer with a twin in torch.nn is a subclass of it or has its parameter names, so `isinstance`
checks, LoRA wrappers, FSDP policies and checkpoints go on working; the extra arguments are keyword
arguments that default to the twin's behaviour.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast
from pyfast import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def _expect_act(layer: str, act: str) -> str:
    """`act`, refused at construction: the door would say so only at the first forward."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{layer}: act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    return act


class Linear(torch.nn.Linear):
    """torch.nn.Linear with an activation in the same pass: [..., in] -> [..., out].

    Args beyond torch's: `act`, one of `ACTIVATIONS` (ValueError otherwise).
    """

    act = "none"  # also for a torch.nn.Linear whose class was swapped to this one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str = "none",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act = _expect_act("Linear", act)

    def forward(self, input: Tensor) -> Tensor:
        return pyfast.linear_act(input, self.weight, self.bias, self.act)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act == "none" else f", act={self.act}")


class Conv1D(torch.nn.Module):
    """A linear layer whose weight is [in, out], as in Hugging Face's GPT-2 checkpoints.

    Arguments and parameters are those of `transformers.pytorch_utils.Conv1D` (`nf` outputs first,
    then `nx` inputs), plus `act`: act(x @ weight + bias), [..., nx] -> [..., nf].
    """

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        act: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.nf, self.nx, self.act = nf, nx, _expect_act("Conv1D", act)
        self.weight = torch.nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return pyfast.linear_act(x, self.weight.t(), self.bias, self.act)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}" + ("" if self.act == "none" else f", act={self.act}")


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm; forward(x, residual=r) returns (x + r, norm of that sum) in one pass.

    Mixed dtypes (autocast, or float32 norms in a bfloat16 model) are computed in the widest; the
    norm then comes in the dtype of x, or with a residual, as a sum does, in the widest.
    """

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, r, weight, bias = _widened(input, residual, self.weight, self.bias)
        out = pyfast.layer_norm(x, self.normalized_shape, weight, bias, self.eps, residual=r)
        return out if residual is not None else out.to(input.dtype)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm; forward(x, residual=r) returns (x + r, norm of that sum) in one pass.

    Mixed dtypes are treated as in `LayerNorm`.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        wide, r, weight = _widened(x, residual, self.weight)
        out = pyfast.rms_norm(wide, self.normalized_shape, weight, self.eps, residual=r)
        return out if residual is not None else out.to(x.dtype)


def _widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the widest of their dtypes; as they are, if some have none that is a float."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1 or not all(dtype.is_floating_point for dtype in dtypes):
        return tensors
    wide = functools.reduce(torch.promote_types, dtypes)
    return tuple(t if t is None else t.to(wide) for t in tensors)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss; class indices take pyfast's kernel, class probabilities torch's.

    Args beyond torch's: `loss_dtype`, the dtype of the loss (default: the input's).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.loss_dtype = loss_dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            loss = super().forward(input, target)
            return loss if self.loss_dtype is None else loss.to(self.loss_dtype)
        return pyfast.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dtype=self.loss_dtype,
        )


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """torch.nn.LinearCrossEntropyLoss; the logits of class-index targets never exist whole.

    Input [..., in_features] (torch: at most two dimensions), target [...]. `options` tunes torch's
    chunking and matters only where torch's path is taken: class probabilities and `out_features`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.out_features or target.is_floating_point():
            return super().forward(input, target)
        return pyfast.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
        )


class CausalSelfAttention(torch.nn.Module):
    """Causal multi-head self-attention: x [B, T, C] -> [B, T, C].

    Parameters and initialisation are those of `torch.nn.MultiheadAttention(embed_dim, num_heads)`
    (`in_proj_weight`, `in_proj_bias`, `out_proj`), so its state dict loads both ways.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"CausalSelfAttention: num_heads must divide embed_dim={embed_dim}; got {num_heads}"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.in_proj_bias = (
            torch.nn.Parameter(torch.zeros(3 * embed_dim, **factory)) if bias else None
        )
        self.out_proj = Linear(embed_dim, embed_dim, bias, **factory)
        torch.nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            torch.nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"CausalSelfAttention: x must be [B, T, C]; got {list(x.shape)}")
        batch, time, _ = x.shape
        qkv = pyfast.linear_act(x, self.in_proj_weight, self.in_proj_bias)  # [B, T, 3C]
        head_dim = self.embed_dim // self.num_heads
        heads = qkv.view(batch, time, 3, self.num_heads, head_dim).transpose(
            1, 3
        )  # [B, H, 3, T, D]
        query, key, value = heads.unbind(2)  # each [B, H, T, D]
        mixed = pyfast.attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


class SwiGLU(torch.nn.Module):
    """down(silu(gate(x)) * up(x)), [..., in] -> [..., in]: Shazeer 2020, "GLU variants".

    Parameters are named as in Hugging Face's LlamaMLP: `gate_proj`, `up_proj`, `down_proj`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = Linear(hidden_features, in_features, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if _plain(gate) and _plain(up):
            hidden = pyfast.linear_glu(x, gate.weight, up.weight, gate.bias, up.bias)
        else:
            hidden = F.silu(gate(x)) * up(x)
        return self.down_proj(hidden)


def _plain(layer: torch.nn.Module) -> bool:
    """Whether its weights are all there is to `layer`: no LoRA wrapper or hook to bypass."""
    return type(layer) is Linear and layer.act == "none" and not is_hooked(layer)


def is_hooked(layer: torch.nn.Module) -> bool:
    """Whether a call of `layer` does more than the forward of its class."""
    forward, backward = layer._forward_hooks, layer._backward_hooks
    hooks = (forward, layer._forward_pre_hooks, backward, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__  # as accelerate and others replace it
