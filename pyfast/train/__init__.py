"""One loop that trains: `fit(config)` pretrains, `fit(config, task)` learns anything else."""

from pyfast.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from pyfast.train.loop import FitResult, fit
from pyfast.train.task import LanguageModelling, Task

__all__ = [
    "DataConfig",
    "FitResult",
    "LanguageModelling",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Task",
    "TrainConfig",
    "fit",
]
