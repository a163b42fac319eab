"""The activations of `pyfast.reference` and their derivatives, in float32, for any kernel.

As in csrc/activation.h: the derivative of an activation in `GRAD_FROM_OUTPUT` follows from its
output, so that nothing but the output is saved; that of the others from the pre-activation.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

ACTIVATIONS = (
    "none",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "leaky_relu",
    "elu",
    "softplus",
    "mish",
)
GRAD_FROM_OUTPUT = frozenset({"relu", "sigmoid", "tanh", "leaky_relu", "elu"})


@triton.jit
def _gelu_tanh_sigmoid(x):
    """sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): gelu(x) ~ x sigmoid(2u) (Hendrycks, 2016)."""
    return tl.sigmoid(x * (x * x * 0.0713548162726009 + 1.5957691216057308))


@triton.jit
def _tanh_softplus(x):
    """tanh(log(1 + w)) = (w^2 + 2w) / (w^2 + 2w + 2), w = e^x; 1 beyond x = 20."""
    w = tl.exp(tl.minimum(x, 20.0))
    n = w * (w + 2.0)
    return n / (n + 2.0)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x), elementwise; x float32."""
    if ACT == "none":
        y = x
    elif ACT == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACT == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * _gelu_tanh_sigmoid(x)
    elif ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    elif ACT == "tanh":
        y = libdevice.tanh(x)
    elif ACT == "leaky_relu":
        y = tl.where(x < 0, x * 0.01, x)
    elif ACT == "elu":
        y = tl.where(x > 0, x, libdevice.expm1(tl.minimum(x, 0.0)))
    elif ACT == "softplus":
        y = tl.maximum(x, 0.0) + libdevice.log1p(tl.exp(-tl.abs(x)))
    else:
        tl.static_assert(ACT == "mish", "unknown activation")
        y = x * _tanh_softplus(x)
    return y


@triton.jit
def activate_grad(s, ACT: tl.constexpr):
    """d act / dx, elementwise; s is the output for GRAD_FROM_OUTPUT, else the pre-activation."""
    if ACT == "relu":
        g = tl.where(s > 0, 1.0, 0.0)
    elif ACT == "gelu":
        density = tl.exp(s * s * -0.5) * 0.3989422804014327
        g = 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * density
    elif ACT == "gelu_tanh":
        p = _gelu_tanh_sigmoid(s)
        g = p + s * p * (1.0 - p) * (s * s * 0.2140644488178027 + 1.5957691216057308)
    elif ACT == "silu":
        p = tl.sigmoid(s)
        g = p * (1.0 + s * (1.0 - p))
    elif ACT == "sigmoid":
        g = s * (1.0 - s)
    elif ACT == "tanh":
        g = 1.0 - s * s
    elif ACT == "leaky_relu":
        g = tl.where(s > 0, 1.0, 0.01)
    elif ACT == "elu":
        g = tl.where(s > 0, 1.0, s + 1.0)
    elif ACT == "softplus":
        g = tl.sigmoid(s)
    else:
        tl.static_assert(ACT == "mish", "unknown activation")
        t = _tanh_softplus(s)
        g = t + s * (1.0 - t * t) * tl.sigmoid(s)
    return g
