"""The doors: one function per operation, with a CPU kernel, GPU kernels and a plain-torch meaning."""

from pyfast.reference import (
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

__all__ = [
    "adamw_step_",
    "attention",
    "cross_entropy",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "linear_glu",
    "rms_norm",
    "rope",
]
