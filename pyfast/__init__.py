"""Fused training kernels for PyTorch: drop-in functions, layers, optimizer, models, training."""

from pyfast.backend import deterministic, using  # isort: skip

from pyfast.ops import (
    adamw_step_,
    attention,
    cross_entropy,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    linear_glu,
    rms_norm,
    rope,
)

__version__ = "0.1.0"

__all__ = [
    "adamw_step_",
    "attention",
    "cross_entropy",
    "deterministic",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "linear_glu",
    "rms_norm",
    "rope",
    "using",
]
