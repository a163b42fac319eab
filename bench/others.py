"""Contestants of a GPU that are neither ours nor plain torch: torch's kernels by name, libraries.

Attention by each of torch's own kernels (flash, memory-efficient, cuDNN's), Liger-Kernel and
flash-attention where they are installed. One that refuses a case is left out by the bench, with its
reason.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.devices import Cpu
from pyfast.testing import Case

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
Function = Callable[..., Any]


def functions(case: Case, device: Cpu) -> dict[str, Function]:
    """Functions with the arguments of the operation, by the contestant's name."""
    if device.type != "cuda":
        return {}
    found: dict[str, Function] = {}
    if case.op == "attention":
        found |= {name: _sdpa(kernel) for name, kernel in SDPA.items()}
        if find_spec("flash_attn") and fits_flash_attention(case):
            found["flash-attn"] = flash_attention
    if find_spec("liger_kernel") and case.op in LIGER and fits_liger(case):
        found["liger"] = LIGER[case.op]
    return found


def fits_flash_attention(case: Case) -> bool:
    """It takes no mask, and aligns a causal one to the last key where torch has the first."""
    inputs = case.inputs(torch.bfloat16)
    square = inputs["query"].shape[2] == inputs["key"].shape[2]
    return "attn_mask" not in inputs and (square or not inputs["is_causal"])


def fits_liger(case: Case) -> bool:
    """Its layer_norm adds no residual, its norms have weights, and its gate is silu."""
    if case.op == "linear_glu":
        return case.settings["act"] == "silu" and "gate_bias" not in case.grads
    residual = case.op == "layer_norm" and "residual" in case.grads
    return not residual and ("weight" in case.grads or not case.op.endswith("norm"))


def _sdpa(kernel: SDPBackend) -> Function:
    def attention(**inputs: Any) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(**inputs)

    return attention


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """[B, H, T, D] by flash-attention's function, which wants [B, T, H, D]."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # [B, T, H, D]
    return flash_attn_func(q, k, v, causal=is_causal).transpose(1, 2)


def _liger() -> Any:
    from liger_kernel.transformers import functional

    return functional


def liger_cross_entropy(**inputs: Any) -> Tensor:
    """With gradients it writes them over the logits: only its first call has the right numbers."""
    return _liger().liger_cross_entropy(**inputs)


def liger_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    return _liger().liger_fused_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, **settings
    )


def liger_layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor
) -> Tensor:
    return _liger().liger_layer_norm(input, weight, bias, 1e-5)


def liger_rms_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor,
    residual: Tensor | None = None,
) -> Any:
    eps = torch.finfo(input.dtype).eps
    if residual is None:
        return _liger().liger_rms_norm(input, weight, eps, in_place=False)
    out, total = _liger().liger_fused_add_rms_norm(input, residual, weight, eps, in_place=False)
    return total, out


def liger_linear_glu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, act: str) -> Tensor:
    """Two products of torch's, and its own kernel for the rest."""
    return _liger().liger_swiglu(F.linear(x, gate_weight), F.linear(x, up_weight))


LIGER: dict[str, Function] = {
    "cross_entropy": liger_cross_entropy,
    "linear_cross_entropy": liger_linear_cross_entropy,
    "layer_norm": liger_layer_norm,
    "rms_norm": liger_rms_norm,
    "linear_glu": liger_linear_glu,
}
