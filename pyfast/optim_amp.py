"""What torch.amp.GradScaler hands an optimizer with `_step_supports_amp_scaling`.

The scaler does not wait for a GPU to ask whether gradients are finite: it hands over its scale and
a flag, both tensors. The kernels look at the flag; how many steps were taken the host learns late.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SkippedSteps:
    """Steps that were counted when they were launched, and perhaps were none."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def note(self, steps: Tensor, found_inf: Tensor) -> None:
        """`steps`, on the CPU, went up by one; that counts where `found_inf` is 0."""
        if found_inf.is_cpu:
            steps.sub_(float(found_inf != 0))
            return
        flag = torch.empty((), dtype=torch.float32, pin_memory=True)
        flag.copy_(found_inf.reshape(()), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._open.append((steps, flag, arrived))

    def settle(self) -> None:
        """Take back the steps that were none; waits for the GPU to be as far as the last one."""
        for steps, flag, arrived in self._open:
            arrived.synchronize()
            steps.sub_(float(flag != 0))
        self._open.clear()


def unscale(grads: Iterable[Tensor], scale: Tensor) -> float:
    """What is left to multiply `grads` by, to divide them by `scale`.

    Gradients on a GPU are divided here, in place as torch's fused optimizers do: to read the scale
    would wait for it. float16 would lose digits, and waits.
    """
    grads = list(grads)
    if scale.is_cpu or any(grad.dtype == torch.float16 for grad in grads):
        return 1.0 / float(scale)
    divide(grads, scale)
    return 1.0


def divide(grads: list[Tensor], scale: Tensor) -> None:
    """grads /= scale, in place, on whatever devices they are."""
    inverse = scale.double().reciprocal().reshape(())
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        alike.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), members in alike.items():
        torch._foreach_mul_(members, inverse.to(device, dtype, non_blocking=True))
