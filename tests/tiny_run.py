"""One small pretrained run for all tests that need one; it trains in a few seconds, once.

Its language has four topics with 64 words each. What belongs together can be learnt from text
alone, so a model that has read it needs the label of few words to know those of the others.
"""

import atexit
import csv
import functools
import os
import random
import shutil
import tempfile
from pathlib import Path

from pyfast.train import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from pyfast.train.loop import fit

TOPICS = ("fire", "sea", "sky", "soil")


@functools.cache
def folder() -> Path:
    """Deleted when the tests end."""
    path = Path(tempfile.mkdtemp(prefix="pyfast-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def words() -> dict[str, list[str]]:
    """Topic -> its words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {topic: ["".join(draw.choices(letters, k=4)) for _ in range(64)] for topic in TOPICS}


@functools.cache
def text() -> Path:
    """800 lines of 40 words, each line on one topic."""
    draw = random.Random(1)
    lines = [" ".join(draw.choices(words()[draw.choice(TOPICS)], k=40)) for _ in range(800)]
    path = folder() / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@functools.cache
def run() -> Path:
    """The run directory of a GPT with one block that has read `text`."""
    config = TrainConfig(
        data=DataConfig(path=str(text()), vocab_size=1300),
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, context_length=32),
        optim=OptimConfig(batch_size=16, lr=1e-2, warmup_steps=10),
        run=RunConfig(
            dir=str(folder() / "run"),
            steps=150,
            val_every=150,
            val_batches=4,
            save_every=150,
            progress="none",
        ),
    )
    before = os.environ.get("PYFAST_CACHE")
    os.environ["PYFAST_CACHE"] = str(folder() / "cache")
    try:
        return fit(config).run_dir
    finally:
        os.environ.pop("PYFAST_CACHE")
        if before is not None:
            os.environ["PYFAST_CACHE"] = before


@functools.cache
def labelled_csv() -> Path:
    """320 texts of six words and their topic; `val_fraction` 0.45 leaves 32 to learn from."""
    draw = random.Random(2)
    path = folder() / "labelled.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(320):
            topic = TOPICS[i % len(TOPICS)]
            rows.writerow([" ".join(draw.choices(words()[topic], k=6)), topic])
    return path
