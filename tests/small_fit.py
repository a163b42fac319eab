"""A run small enough for tests: a hundredth of a second a step, on text written for the purpose."""

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyfast.train import TrainConfig

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "slept"]
SMALL = {  # 32 wide, 2 heads: the least that has more than one of everything
    "data": {"vocab_size": 300},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32},
    "optim": {"batch_size": 4, "lr": 1e-2},
    "run": {"steps": 12, "val_every": 5, "val_batches": 2, "save_every": 4, "threads": 1}
    | {"progress": "none"},
}


def write_text(folder: Path, documents: int = 30) -> Path:
    """Documents of words in a random order, the same in every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(20)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Path]:
    """Text in `folder`, with a cache of its own; the caller's cache and threads come back."""
    cache, threads = os.environ.get("PYFAST_CACHE"), torch.get_num_threads()
    os.environ["PYFAST_CACHE"] = str(folder / "cache")
    try:
        yield write_text(folder / "text")
    finally:
        torch.set_num_threads(threads)
        del os.environ["PYFAST_CACHE"]
        if cache is not None:
            os.environ["PYFAST_CACHE"] = cache


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def tiny_config(data: Path, run_dir: Path | None, **settings: Any) -> TrainConfig:
    """`settings` are "section.name" keys with "_" for the dot: run_steps=3, optim_lr=1.0."""
    values = {section: dict(defaults) for section, defaults in SMALL.items()}
    values["data"]["path"], values["run"]["dir"] = str(data), run_dir and str(run_dir)
    for key, value in settings.items():
        section, name = key.split("_", 1)
        values[section][name] = value
    return TrainConfig.from_dict(values)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "train/tokens_per_sec")
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in clock} for record in records]
