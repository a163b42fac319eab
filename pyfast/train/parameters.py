"""The parameters of a run: their dtype, which of them learn, their optimizer, their gradients."""

import fnmatch

import torch
from torch import Tensor, nn

from pyfast.optim import AdamW
from pyfast.train.config import TrainConfig
from pyfast.train.task import Task

ALL_BUT_HEAD = "all_but_head"


def build_model(config: TrainConfig, task: Task) -> nn.Module:
    """The task's model on the run's device and in its dtype, with the frozen parameters marked."""
    model = task.build_model().to(usable_device(config.run.device))
    freeze(model, config.model.freeze, task.head)
    dtype = getattr(torch, config.run.dtype)
    for param in model.parameters():  # parameters only: a buffer may need its float32
        param.data = param.data.to(dtype)
    return model.train()


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if torch does not know it or cannot reach it."""
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # "meta" makes tensors, but no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"train: run.device must be usable here; got {name}: {reason}") from None
    return device


def freeze(model: nn.Module, patterns: tuple[str, ...], head: tuple[str, ...]) -> None:
    """Stop the parameters whose name matches a pattern (as in fnmatch) from learning.

    "all_but_head" matches every name that no pattern of `head` matches. Raises ValueError for a
    pattern without a match, and if nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_BUT_HEAD:
            found = [n for n in names if not any(fnmatch.fnmatchcase(n, h) for h in head)]
        else:
            found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"train: model.freeze must match parameters; got {pattern!r}; "
                f"names look like {names[0]!r}"
            )
        frozen.update(found)
    if len(frozen) == len(names):
        raise ValueError(f"train: model.freeze must leave parameters to learn; got {patterns}")
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW with weight decay on matrices and embeddings, none on biases and norm weights."""
    learning = [param for param in model.parameters() if param.requires_grad]
    optim = config.optim
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        max_norm=optim.max_norm,
    )


class GradientSums:
    """Gradients of several backward passes, summed in float32 for 16-bit parameters.

    autograd would add them in 16 bits, rounding after each pass. One pass, or wider parameters,
    need nothing of this.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad and p.dtype.itemsize == 2]
        self._params = self._params if passes > 1 else []
        self._sums: dict[Tensor, Tensor] = {}

    def collect(self) -> None:
        """Take the gradients of the pass that just ended."""
        for param in self._params:
            if param.grad is not None:
                if param in self._sums:
                    self._sums[param].add_(param.grad)
                else:
                    self._sums[param] = param.grad.float()
                param.grad = None

    def release(self) -> None:
        """Give the parameters their sums, rounded once."""
        for param, total in self._sums.items():
            param.grad = total.to(param.dtype)
