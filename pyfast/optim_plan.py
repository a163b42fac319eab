"""The argument lists of one AdamW step, kept from step to step, and the step they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pyfast
from pyfast import backend
from pyfast.ops.adamw import hyper_parameters, step_checked

Numbers = list[tuple[float, ...]]  # lr, beta1, beta2, eps, weight_decay of every group


@dataclass
class Plan:
    """The argument lists of one `adamw_step_` call, kept while the same parameters have grads."""

    flags: dict[str, bool]  # maximize, decoupled: one value per call
    groups: list[dict[str, Any]]
    params: list[Tensor]
    group_of: list[int]  # index into groups, per parameter
    moments: dict[str, list[Tensor]]
    masters: list[Tensor | None] | None
    steps: Tensor  # float32 [n]; state[p]["step"] is a view into it, so one add advances them all
    known_masters: list[Tensor]  # the same with an empty tensor for None; or none at all
    numbers: Numbers | None = None  # what `hyper` was made of
    sharded: bool = False  # params are DTensors, of FSDP2 say: each process steps on its shards
    hyper: Tensor | None = None  # [n, 6], the numbers as `step_checked` takes them
    next_steps: Tensor | None = None  # its last column

    def prepare(self, numbers: Numbers) -> Tensor:
        """`hyper` for the step after `steps`; made anew only when the numbers have changed."""
        if self.hyper is None or numbers != self.numbers:
            rates = (self.setting("lr"), self.setting("betas", tuple), self.setting("eps"))
            decay = self.setting("weight_decay")
            self.hyper = hyper_parameters(len(self.params), 1.0, *rates, decay)
            self.next_steps, self.numbers = self.hyper[:, 5], numbers
        self.next_steps.copy_(self.steps)
        self.next_steps.add_(1)
        return self.hyper

    def setting(self, key: str, kind: type = float) -> list[Any] | Any:
        """The setting `key`: one value where all groups agree, else one per parameter."""
        values = [kind(group[key]) for group in self.groups]
        if all(value == values[0] for value in values):
            return values[0]
        return [values[i] for i in self.group_of]


def run(
    plan: Plan,
    numbers: Numbers,
    max_norm: float | None,
    grad_scale: float,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One step of a plan; the global gradient norm. `plan.steps` goes up, whatever was found."""
    cpu = plan.params[0].is_cpu and not plan.sharded
    if cpu and not backend.uses_reference("adamw_step_", "cpu"):
        # The door's checks cost more than the step of a small model. Of what they check only the
        # gradients can have changed, and the kernel's own guards see those too.
        grads = [param.grad for param in plan.params]
        moments = plan.moments
        state = (plan.params, grads, moments["exp_avg"], moments["exp_avg_sq"])
        state += (moments.get("max_exp_avg_sq", []), plan.known_masters)
        try:
            norm = step_checked(
                state,
                plan.prepare(numbers),
                plan.flags["decoupled"],
                plan.flags["maximize"],
                grad_scale,
                math.inf if max_norm is None else max_norm,
                found_inf,
            )
        except RuntimeError:  # the door says in words what does not fit
            return _run_by_door(plan, max_norm, grad_scale, found_inf)
        plan.steps.add_(1)
        return norm
    return _run_by_door(plan, max_norm, grad_scale, found_inf)


def _run_by_door(
    plan: Plan, max_norm: float | None, grad_scale: float, found_inf: Tensor | None
) -> Tensor:
    step, *others = steps = (plan.steps + 1).tolist()
    moments = {name: local(tensors) for name, tensors in plan.moments.items()}
    norm = pyfast.adamw_step_(
        local(plan.params),
        local([param.grad for param in plan.params]),
        moments["exp_avg"],
        moments["exp_avg_sq"],
        step if others.count(step) == len(others) else steps,
        lr=plan.setting("lr"),
        betas=plan.setting("betas", tuple),
        eps=plan.setting("eps"),
        weight_decay=plan.setting("weight_decay"),
        max_exp_avg_sqs=moments.get("max_exp_avg_sq"),
        masters=None if plan.masters is None else local(plan.masters),
        max_norm=max_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        **plan.flags,
    )
    plan.steps.add_(1)
    return norm


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; told without the import of torch.distributed.tensor."""
    return type(tensor) is not Tensor and hasattr(tensor, "to_local")


def local(tensors: list[Any]) -> list[Any]:
    """What this process holds of each: views into the shards of DTensors, the others themselves.

    Made anew in every step, since FSDP may put other memory under a parameter in between.
    """
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def expect_settings(settings: dict[str, Any], max_norm: float | None, grad_scale: float) -> None:
    """Refuse NaN, infinite or negative settings with one sentence."""
    for name in ("lr", "eps", "weight_decay"):
        value = settings[name]
        if not 0.0 <= value < math.inf:
            raise ValueError(f"AdamW: {name} must be a finite number >= 0; got {value}")
    betas = settings["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1); got {betas}")
    if max_norm is not None and not 0.0 < max_norm < math.inf:
        raise ValueError(f"AdamW: max_norm must be a finite number > 0 or None; got {max_norm}")
    if not math.isfinite(grad_scale):
        raise ValueError(f"AdamW: grad_scale must be a finite number; got {grad_scale}")
