"""What the verbs of the command line do, as functions: results on standard output."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from pyfast import models
from pyfast.data.tokens import END_OF_TEXT, read_tokenizer
from pyfast.train import evaluate as measuring
from pyfast.train import report
from pyfast.train.checkpoint import write_atomically
from pyfast.train.classify import TASK_FILE, Classification
from pyfast.train.config import TrainConfig
from pyfast.train.loop import fit

_DEFAULT_NEW_TOKENS = 200
_SAMPLE = {"temperature": 0.8, "top_k": 50}


def train(config: TrainConfig) -> None:
    """Pretrain, then show what the model writes by itself."""
    result = fit(config)
    print(f"validation loss {result.val_loss:.4f} after {result.step} steps\n")
    prompt = "def " if config.data.path == "stdlib" else ""
    text = ""
    for piece in continuation(result.run_dir, prompt, seed=config.run.seed, **_SAMPLE):
        text += piece
    sample = {"step": result.step, "prompt": prompt, "text": text, "seed": config.run.seed}
    line = json.dumps(sample | _SAMPLE) + "\n"
    write_atomically(result.run_dir / report.SAMPLES_FILE, line.encode())
    print(prompt + text)
    print(f"\nreport: {report.write(result.run_dir)}")
    print(f"next:   pyfast generate {result.run_dir} --prompt 'class '")


def finetune(config: TrainConfig, from_scratch: bool = False) -> None:
    """Learn to classify; the test part stays untouched until `evaluate`."""
    if config.run.resume and config.run.dir:
        about = Path(config.run.dir) / TASK_FILE
        if about.is_file():
            from_scratch = bool(json.loads(about.read_text()).get("from_scratch", from_scratch))
    task = Classification(config, from_scratch=from_scratch)
    sizes = ", ".join(
        f"{len(getattr(task.split, field.name))} for {field.name}"
        for field in dataclasses.fields(task.split)
    )
    print(f"{len(task.label_names)} labels; texts: {sizes}", flush=True)
    result = fit(config, task)
    accuracy = next(
        record["eval/accuracy"]
        for record in reversed(result.history)
        if record.get("eval/loss") == result.val_loss
    )
    print(f"validation loss {result.val_loss:.4f}, accuracy {accuracy:.3f} ({result.step} steps)")
    print(f"next:   pyfast evaluate {result.run_dir}")


def evaluate(run: str, data: str | None = None, as_json: bool = False) -> None:
    """Print the measures of a run."""
    measures = measuring.evaluate(run, data)
    print(json.dumps(measures, indent=2) if as_json else measuring.as_text(measures))


def generate(run: str, prompt: str, **settings: Any) -> None:
    """Print the prompt and its continuation while it is made; "-" reads the prompt from stdin."""
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()  # what a terminal could not decode arrives as lone surrogates
    except UnicodeError:
        raise ValueError("generate: prompt must be UTF-8 text; got other bytes") from None
    pieces = continuation(run, prompt, **settings)
    sys.stdout.write(prompt)  # after everything that can be refused
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def continuation(
    run: str | Path, prompt: str, max_new_tokens: int | None = None, **settings: Any
) -> Iterator[str]:
    """The text after `prompt`, piece by piece; settings are those of `models.stream`.

    Raises ValueError or FileNotFoundError at once where the run or a setting cannot be used.
    """
    run = Path(run).expanduser()
    model = models.load(run).eval()
    if isinstance(model, models.SequenceClassifier):
        raise ValueError(f"generate: {run} must hold a language model; got a classifier")
    tokenizer = read_tokenizer(run)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = tokenizer.encode(prompt).ids
    if not ids and end is None:
        raise ValueError("generate: prompt must not be empty for this tokenizer; got ''")
    tokens = torch.tensor([ids or [end]])  # [1, T]; a document begins after the end of another
    vocab_size = model.config.vocab_size
    if int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"generate: tokenizer.json of {run} must give tokens below {vocab_size}, the model's; "
            f"got {int(tokens.max())}"
        )
    if max_new_tokens is None:
        max_new_tokens = max(min(_DEFAULT_NEW_TOKENS, model.max_positions - tokens.shape[1]), 1)
    columns = models.stream(model, tokens, max_new_tokens, stop_token=end, **settings)
    return _pieces(columns, tokenizer, DecodeStream(ids=ids, skip_special_tokens=True))


def _pieces(
    columns: Iterable[torch.Tensor], tokenizer: Any, decoder: DecodeStream
) -> Iterator[str]:
    """The text of tokens [1], as soon as they make up whole characters."""
    for column in columns:
        piece = decoder.step(tokenizer, int(column))
        if piece:
            yield piece
