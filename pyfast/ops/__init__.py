"""The doors: one function per operation, whatever runs it."""

from pyfast.ops.adamw import adamw_step_
from pyfast.ops.attention import attention
from pyfast.ops.cross_entropy import cross_entropy
from pyfast.ops.layer_norm import layer_norm
from pyfast.ops.linear_act import linear_act
from pyfast.ops.linear_cross_entropy import linear_cross_entropy
from pyfast.ops.linear_glu import linear_glu
from pyfast.ops.rms_norm import rms_norm
from pyfast.ops.rope import rope

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
