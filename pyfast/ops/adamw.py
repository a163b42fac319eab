"""One AdamW step on all parameters in one call (Loshchilov & Hutter, 2019; Kingma & Ba, 2015)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast import backend, reference
from pyfast.ops.checks import expect, expect_device, expect_float, expect_type
from pyfast.ops.register import below_autograd, register_fake

_OP = "adamw_step_"


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

    With g = grad * grad_scale * min(1, max_norm / (norm + 1e-6)), negated to `maximize`:
    p -= lr * weight_decay * p (not decoupled: g += weight_decay * p); m += (g - m) * (1 - beta1);
    v = beta2 * v + (1 - beta2) * g^2; p -= lr * m_hat / (sqrt(v_hat) + eps).

    Args:
        params: tensors of any shape and dense strides, float32, bfloat16, float16 or float64, on
            one device. No two tensors that are written may share memory.
        grads, exp_avgs, exp_avg_sqs: of the shape and dtype of their parameter; beside a 16-bit
            parameter they may be float32.
        step: the number of this step, from 1; it, `lr`, `betas`, `eps` and `weight_decay` are one
            value, or one per parameter.
        max_exp_avg_sqs: the running maximum of exp_avg_sqs; given, the step is AMSGrad's.
        masters: float32 copies of 16-bit parameters, or None: the master is the truth, and the
            parameter its rounding.
        decoupled: False puts the decay into the gradient, as torch.optim.Adam has it.
        grad_scale: every gradient is multiplied by this first.
        max_norm: the global norm of the gradients is brought down to this; None: not clipped.
        found_inf: float32 of one element on the device of `params`, as of torch.amp.GradScaler:
            where it is not 0, nothing is written. The kernels look at it there; nobody waits.

    Returns:
        The norm of all grads * grad_scale together, before clipping; float32 scalar.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; nothing is written.
    """
    hyper = hyper_parameters(len(params), step, lr, betas, eps, weight_decay)
    expect(math.isfinite(grad_scale), _OP, "grad_scale", "be a finite number", grad_scale)
    limit = math.inf if max_norm is None else max_norm
    expect(limit > 0, _OP, "max_norm", "be above 0, or None", max_norm)
    _parse(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters)
    if found_inf is not None and params:
        kind = type(found_inf).__name__
        expect_type(isinstance(found_inf, Tensor), _OP, "found_inf", "be a tensor", kind)
        expect_device(_OP, "found_inf", found_inf, params[0], "params[0]")
        dtype, count = found_inf.dtype, found_inf.numel()
        expect_type(dtype == torch.float32, _OP, "found_inf", "be float32", dtype)
        expect(count == 1, _OP, "found_inf", "have one element", list(found_inf.shape))
    if params and backend.uses_reference(_OP, params[0].device.type):
        settings = {"max_exp_avg_sqs": max_exp_avg_sqs, "masters": masters, "decoupled": decoupled}
        settings |= {"maximize": maximize, "grad_scale": grad_scale, "max_norm": max_norm}
        settings |= {"found_inf": found_inf}
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        state = (params, grads, exp_avgs, exp_avg_sqs)
        return reference.adamw_step_(*state, step, **rates, **settings)
    masters = [torch.empty(0) if master is None else master for master in masters or []]
    state = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [], masters)
    return step_checked(state, hyper, decoupled, maximize, grad_scale, limit, found_inf)


def step_checked(
    state: tuple[Sequence[Tensor], ...],
    hyper: Tensor,
    decoupled: bool,
    maximize: bool,
    grad_scale: float,
    max_norm: float,
    found_inf: Tensor | None = None,
) -> Tensor:
    """The step itself, for callers whose lists and numbers are known to fit.

    Args:
        state: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs (or none), masters (or none; an
            empty one stands for None).
        hyper: as `hyper_parameters` gives it. max_norm: infinite: not clipped.
    """
    skip = () if found_inf is None else (found_inf,)
    norm = _adamw_step(*state, hyper, decoupled, maximize, grad_scale, max_norm, *skip)
    if not torch.compiler.is_compiling():  # there the schema tells what was written
        torch.autograd.graph.increment_version([p for p in state[0] if not p.is_inference()])
    return norm


def hyper_parameters(
    count: int, step: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any
) -> Tensor:
    """[count, 6] float64: lr, beta1, beta2, eps, weight_decay, step of each parameter."""
    each = len(betas) > 0 and isinstance(betas[0], Sequence)
    for pair in betas if each else [betas]:
        expect(len(pair) == 2, _OP, "betas", "be two numbers, or two per parameter", betas)
    first, second = ([pair[k] for pair in betas] if each else betas[k] for k in (0, 1))
    columns = []
    for name, value, low, high in (
        ("lr", lr, 0.0, math.inf),
        ("betas", first, 0.0, 1.0),
        ("betas", second, 0.0, 1.0),
        ("eps", eps, 0.0, math.inf),
        ("weight_decay", weight_decay, 0.0, math.inf),
        ("step", step, 1.0, math.inf),
    ):
        one = not isinstance(value, Sequence)
        values = [value] if one else value
        if not one:
            _expect_count(name, values, count)
        for i, number in enumerate(values):
            if not low <= number < high:  # NaN fails this too
                rule = "in [0, 1)" if high == 1.0 else f"finite and at least {low:g}"
                expect(False, _OP, name if one else f"{name}[{i}]", f"be {rule}", number)
        columns.append([float(v) for v in values] * (count if one else 1))
    return torch.tensor(columns, dtype=torch.float64).t()


def _expect_count(name: str, values: Sequence, count: int) -> None:
    expect(len(values) == count, _OP, name, f"have one entry per parameter ({count})", len(values))


def _parse(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    masters: Sequence[Tensor | None] | None,
) -> None:
    """Every check of the lists. What shares memory is found by the kernel's own guards."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs is not None:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in lists.items():
        _expect_count(name, tensors, len(params))
    if masters is not None:
        _expect_count("masters", masters, len(params))
    for i, param in enumerate(params):
        expect_float(_OP, f"params[{i}]", param)
        if param.device != params[0].device:
            expect_device(_OP, f"params[{i}]", param, params[0], "params[0]")
        for name, tensors in lists.items():
            tensor = tensors[i]
            if not _fits(tensor, param, tensor if name == "grads" else exp_avgs[i]):
                _refuse(f"{name}[{i}]", tensor, param, i)
        master = None if masters is None else masters[i]
        if master is not None:
            narrow = param.dtype.itemsize == 2
            rule = "be None, as the parameter is not 16-bit"
            expect(narrow, _OP, f"masters[{i}]", rule, param.dtype)
            if not _fits(master, param, master) or master.dtype != torch.float32:
                _refuse(f"masters[{i}]", master, param, i, (torch.float32,))


def _fits(tensor: Any, param: Tensor, twin: Tensor) -> bool:
    """Whether `tensor` may stand beside `param`; `twin` is one whose dtype it must have."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == param.shape
        and tensor.device == param.device
        and tensor.dtype == twin.dtype
        and (
            tensor.dtype == param.dtype
            or (tensor.dtype == torch.float32 and param.dtype.itemsize == 2)
        )
        and tensor.layout == torch.strided
    )


def _refuse(
    name: str, tensor: Any, param: Tensor, i: int, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise the sentence for what _fits found wrong."""
    expect_type(isinstance(tensor, Tensor), _OP, name, "be a tensor", type(tensor).__name__)
    owner = f"params[{i}]"
    shape = list(param.shape)
    expect(tensor.shape == param.shape, _OP, name, f"be {shape} as {owner}", list(tensor.shape))
    expect_device(_OP, name, tensor, param, owner)
    expect_type(tensor.layout == torch.strided, _OP, name, "be dense", tensor.layout)
    dtypes = dtypes or (
        (param.dtype, torch.float32) if param.dtype.itemsize == 2 else (param.dtype,)
    )
    words = " or ".join(dict.fromkeys(map(str, dtypes)))
    expect_type(tensor.dtype in dtypes, _OP, name, f"be {words} beside {owner}", tensor.dtype)
    expect_type(False, _OP, name, f"have the dtype of exp_avgs[{i}]", tensor.dtype)


def _fake(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, peaks: Any, masters: Any, *rest: Any
) -> Tensor:
    return (params[0] if params else rest[0]).new_empty((), dtype=torch.float32)


register_fake("adamw_step_", _fake)
_adamw_step = below_autograd("adamw_step_")
