"""torch.optim's AdamW around one call of `pyfast.adamw_step_` for all groups and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyfast.optim_amp import SkippedSteps, unscale
from pyfast.optim_plan import Numbers, Plan, expect_settings, is_sharded, run

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same arguments and state dict, in one pass over all parameters.

    Parameters may be float32, float64, bfloat16 or float16, in any mixture; 16-bit ones keep a
    float32 master copy and float32 moments, and follow the master: load weights before the first
    step. They may be DTensors, as of FSDP2: each process steps on its shards. `foreach` is accepted
    and changes nothing. With `fused=True` torch.amp.GradScaler leaves it to `step()` to unscale and
    to skip, as with torch's: nobody waits for the GPU to tell whether gradients are finite; a step
    that was skipped is taken back from `state[p]["step"]` when the next one begins. `step()`
    returns the closure's loss and leaves the global gradient norm (a float32 scalar, after all
    scaling, before clipping) in `grad_norm`.

    Args beyond torch's:
        decoupled: False gives Adam with L2 regularisation (`torch.optim.Adam`).
        max_norm: clip the global gradient norm to this inside the step; None: do not clip.
        grad_scale: multiply every gradient by this first; assign `optimizer.grad_scale` to change.
        masters: False updates 16-bit parameters in their own precision, as torch does.
    Raises:
        ValueError: a NaN, infinite or negative hyper-parameter, an unknown or unsupported argument,
            or a sparse gradient.
    """

    found_inf: Tensor | None = None  # during a `step` that GradScaler calls, its flag
    _scale: Tensor | None = None  # and its scale

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled: bool = True,
        max_norm: float | None = None,
        grad_scale: float = 1.0,
        masters: bool = True,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ValueError(
                "AdamW: arguments must be those of torch.optim.AdamW or decoupled, max_norm, "
                f"grad_scale, masters; got {name!r}"
            )
        for name, value in (("capturable", capturable), ("differentiable", differentiable)):
            if value:
                raise ValueError(f"AdamW: {name} must be False; got {value}")
        self.max_norm, self._factor, self.masters = max_norm, grad_scale, masters
        self.grad_norm: Tensor = torch.zeros(())
        self._step_supports_amp_scaling = bool(fused)
        self._skipped = SkippedSteps()
        self._plans: list[Plan] = []
        self._seen: tuple[list, list] | None = None  # what the plans were built for
        self._known: tuple | None = None  # numbers that were found to be right
        expect_settings(
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            max_norm,
            grad_scale,
        )
        # Past torch's AdamW to its Adam, whose constructor knows both kinds of weight decay.
        super(torch.optim.AdamW, self).__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled,
        )

    @property
    def grad_scale(self) -> float:
        """What every gradient is multiplied by first."""
        return self._factor

    @grad_scale.setter
    def grad_scale(self, value: float | Tensor) -> None:
        # GradScaler assigns its scale times this factor, a tensor, and deletes it after the step.
        if isinstance(value, Tensor):
            self._scale = value / self._factor if self._factor else torch.ones_like(value)
        else:
            self._factor = value

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self._scale = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group; the group's own settings are checked too."""
        super().add_param_group(param_group)
        self._forget_plans()
        try:
            expect_settings(self.param_groups[-1], self.max_norm, self.grad_scale)
            for param in self.param_groups[-1]["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"AdamW: params must be real floating point; got {param.dtype}"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = self._numbers()
        self._skipped.settle()
        self._refresh_plans()
        factor = self._factor
        if self._scale is not None:
            grads = (p.grad for plan in self._plans for p in plan.params)
            factor *= unscale(grads, self._scale)
        if len(self._plans) == 1 and not self._plans[0].sharded:
            self.grad_norm = self._run(self._plans[0], numbers, self.max_norm, factor)
        elif self._plans:
            self._step_mixed(numbers, factor)
        else:
            self.grad_norm = torch.zeros(())
        return loss

    def _run(self, plan: Plan, numbers: Numbers, max_norm: float | None, factor: float) -> Tensor:
        if self.found_inf is None:
            return run(plan, numbers, max_norm, factor)
        found_inf = self.found_inf.to(plan.params[0].device, non_blocking=True)
        norm = run(plan, numbers, max_norm, factor, found_inf)
        self._skipped.note(plan.steps, found_inf)
        return norm

    def _numbers(self) -> Numbers:
        """The numbers of every group, refused with one sentence where they are none."""
        numbers = [(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        if any(isinstance(group[0], Tensor) for group in numbers):
            numbers = [(float(lr), *others) for lr, *others in numbers]
        known = (numbers, self.max_norm, self.grad_scale)
        if known != self._known:
            for group in self.param_groups:
                expect_settings(group, self.max_norm, self.grad_scale)
            self._known = known
        return numbers

    def _step_mixed(self, numbers: Numbers, factor: float) -> None:
        """Parameters that cannot share a call (flags, devices), or of which every process has its
        shards: one call each, one norm over all."""
        grads = [p.grad for plan in self._plans for p in plan.params]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = (norm.full_tensor() if is_sharded(norm) else norm).float() * abs(factor)
        clip = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (float(norm) + 1e-6))
        for plan in self._plans:
            self._run(plan, numbers, None, factor * clip)
        self.grad_norm = norm

    def _refresh_plans(self) -> None:
        """Make `_plans` fit the parameters that have a gradient now."""
        groups = self.param_groups
        flags = [
            (group["amsgrad"], group["maximize"], group["decoupled_weight_decay"])
            for group in groups
        ]
        live = [id(p) for group in groups for p in group["params"] if p.grad is not None]
        seen = (flags, live)
        if seen == self._seen:
            return
        calls: dict[tuple, list[tuple[Tensor, int]]] = {}
        for i, (group, own) in enumerate(zip(groups, flags, strict=True)):
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError(
                        "AdamW: grad must be dense; got a sparse gradient; use SparseAdam"
                    )
                calls.setdefault((own, param.device), []).append((param, i))
        self._plans = [self._plan(own, members) for (own, _), members in calls.items()]
        self._seen = seen

    def _plan(self, flags: tuple[bool, ...], members: list[tuple[Tensor, int]]) -> Plan:
        amsgrad, maximize, decoupled = flags
        params = [param for param, _ in members]
        states = [self._state_of(param, amsgrad) for param in params]
        steps = torch.tensor([float(s["step"]) for s in states], dtype=torch.float32)
        for state, step in zip(states, steps.unbind(), strict=True):
            state["step"] = step
        names = _MOMENTS if amsgrad else _MOMENTS[:2]
        masters = [state.get("master") for state in states]
        has_masters, empty = any(m is not None for m in masters), torch.empty(0)
        return Plan(
            flags={"maximize": maximize, "decoupled": decoupled},
            groups=self.param_groups,
            params=params,
            group_of=[i for _, i in members],
            moments={name: [state[name] for state in states] for name in names},
            masters=masters if has_masters else None,
            steps=steps,
            known_masters=[empty if m is None else m for m in masters] if has_masters else [],
            sharded=any(map(is_sharded, params)),
        )

    def _state_of(self, param: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """The state of `param`, created or completed where it is new (or came without masters)."""
        state = self.state[param]
        wide = self._state_dtype(param)
        state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
        for name in _MOMENTS if amsgrad else _MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=wide)
        if wide != param.dtype and "master" not in state:
            state["master"] = param.detach().to(wide, copy=True)
        return state

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float32 if self.masters and param.dtype.itemsize == 2 else param.dtype

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's; 16-bit parameters also have `master`."""
        self._skipped.settle()
        saved = super().state_dict()
        saved["state"] = {  # steps are views into one tensor here: let nobody else share it
            i: state | {"step": state["step"].clone()} for i, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW (or Adam); tensors are copied.

        torch rounds loaded state to the parameter's dtype; masters and moments stay float32 here.
        """
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        adopted = {  # before anything is loaded: a refused state changes nothing
            param: self._adopt(param, state_dict["state"][saved_id])
            for param, saved_id in zip(params, saved_ids, strict=False)
            if state_dict["state"].get(saved_id)
        }
        super().load_state_dict(state_dict)
        self.state.update(adopted)
        self._forget_plans()

    def _adopt(self, param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        wide = self._state_dtype(param)
        if not {"step", *_MOMENTS[:2]} <= saved.keys():
            raise ValueError(
                f"AdamW: state must have step, exp_avg and exp_avg_sq; got {', '.join(saved)}"
            )
        state = {"step": torch.tensor(float(saved["step"]), dtype=torch.float32)}
        for name in (*_MOMENTS, *(() if wide == param.dtype else ("master",))):
            if name not in saved:
                continue
            if saved[name].shape != param.shape:
                raise ValueError(
                    f"AdamW: {name} must be {list(param.shape)} as its parameter; "
                    f"got {list(saved[name].shape)}"
                )
            state[name] = saved[name].detach().to(param.device, wide, copy=True)
        return state

    def _forget_plans(self) -> None:
        self._plans, self._seen, self._known = [], None, None

    def __getstate__(self) -> dict[str, Any]:
        self._skipped.settle()
        own = ("max_norm", "_factor", "masters", "grad_norm", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kinds = [group.get("decoupled_weight_decay", True) for group in state["param_groups"]]
        super().__setstate__(state)
        self._skipped = SkippedSteps()
        for group, decoupled in zip(self.param_groups, kinds, strict=True):
            group["decoupled_weight_decay"] = decoupled  # torch's AdamW forces True
        self._forget_plans()
