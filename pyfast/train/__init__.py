"""One loop that trains: `fit(config)` pretrains, `fit(config, task)` learns anything else."""

from pyfast.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from pyfast.train.task import Task

__all__ = ["DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "Task", "TrainConfig"]
