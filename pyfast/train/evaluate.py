"""Measures of a finished run on data it has not learnt from.

A classifier is measured on the test part that finetuning kept aside (`test.jsonl`), a language
model on the validation part of its text. Both can be pointed at other data.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfast import models
from pyfast.data import labelled
from pyfast.data.labelled import Example
from pyfast.data.text import blocks, read_corpus, split_documents
from pyfast.data.tokens import END_OF_TEXT, read_tokenizer
from pyfast.train import report
from pyfast.train.checkpoint import write_atomically
from pyfast.train.classify import TEST_FILE, LabelledTokens, predict
from pyfast.train.config import TrainConfig

_BATCH = 16


def evaluate(run: str | Path, data: str | None = None) -> dict[str, Any]:
    """Measure a run directory (or any local Hugging Face directory of the same architectures).

    data: other labelled data for a classifier, other text for a language model. Without it the
    run's own data is used, and `evaluation.json` and `report.html` are written into the run.
    Raises ValueError or FileNotFoundError if the run or the data cannot be used.
    """
    run = Path(run).expanduser()
    model = models.load(run).eval()
    tokenizer = read_tokenizer(run)
    if isinstance(model, models.SequenceClassifier):
        examples = labelled.read(data) if data else _test_part(run)
        measures = classification(model, examples, tokenizer)
    else:
        measures = language_modelling(model, _documents(run, data), tokenizer)
    if data is None:
        text = json.dumps(measures, indent=2) + "\n"
        write_atomically(run / report.EVALUATION_FILE, text.encode())
        report.write(run)
    return measures


@torch.no_grad()
def classification(
    model: models.SequenceClassifier, examples: Sequence[Example], tokenizer: Any
) -> dict[str, Any]:
    """Loss and the measures of `classification_measures` over `examples`."""
    names = model.label_names
    tokens = LabelledTokens(examples, tokenizer, names, model.max_positions, model.pad_token_id)
    logits = torch.cat([predict(model, batch) for batch in tokens.in_order(_BATCH)])  # [N, labels]
    loss = torch.nn.functional.cross_entropy(logits, tokens.labels).item()
    return {"loss": loss, **classification_measures(tokens.labels, logits.argmax(-1), names)}


def classification_measures(
    labels: Tensor, answers: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 by class and as the mean over classes (macro); confusion.

    labels, answers: int64 [N], indices into names. `confusion[i][j]` counts texts of class i
    answered with j. A class without answers has precision 0, one without texts recall 0.
    `always_commonest` is the accuracy of the trivial classifier.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(names)))
    settings = {"labels": classes, "zero_division": 0.0}
    columns = precision_recall_fscore_support(labels, answers, **settings)
    macro = precision_recall_fscore_support(labels, answers, average="macro", **settings)
    keys = ("precision", "recall", "f1", "support")
    per_class = {
        name: dict(zip(keys, (*map(float, row[:3]), int(row[3])), strict=True))
        for name, row in zip(names, zip(*columns, strict=True), strict=True)
    }
    count = len(labels)
    return {
        "task": "classify",
        "accuracy": float((labels == answers).sum()) / count,
        "always_commonest": max(row["support"] for row in per_class.values()) / count,
        "macro": {**dict(zip(keys[:3], map(float, macro[:3]), strict=True)), "support": count},
        "per_class": per_class,
        "confusion": confusion_matrix(labels, answers, labels=classes).tolist(),
    }


@torch.no_grad()
def language_modelling(
    model: models.CausalLM, documents: Sequence, tokenizer: Any
) -> dict[str, Any]:
    """Mean loss per token, perplexity exp(loss), and bits per byte of the UTF-8 text.

    Every token after the first is predicted once, from what stands before it in its window of
    `model.max_positions` tokens.
    """
    tokens = torch.from_numpy(_encode(documents, tokenizer))  # [N]
    if len(tokens) < 2:
        raise ValueError(f"evaluate: text must have at least 2 tokens; got {len(tokens)}")
    total, count = 0.0, len(tokens) - 1
    size = min(model.max_positions, count)
    whole = count // size * size
    rows = [tokens[: whole + 1].unfold(0, size + 1, size)]  # [windows, size + 1]
    if whole < count:
        rows.append(tokens[None, whole:])  # the shorter last window
    for windows in (part for row in rows for part in row.split(_BATCH)):
        loss = model.loss(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), "sum")
        total += loss.item()
    size_bytes = sum(document.stop - document.start for document in documents)
    return {
        "task": "language modelling",
        "loss": total / count,
        "perplexity": math.exp(min(total / count, 700.0)),
        "bits_per_byte": total / math.log(2.0) / size_bytes,
        "tokens": count,
        "bytes": size_bytes,
    }


def as_text(measures: dict[str, Any]) -> str:
    """The measures as a table for people."""
    if "per_class" not in measures:
        return (
            f"loss              {measures['loss']:.4f} nats/token\n"
            f"perplexity        {measures['perplexity']:.2f}\n"
            f"bits per byte     {measures['bits_per_byte']:.4f}\n"
            f"measured on       {measures['tokens']:,} tokens ({measures['bytes']:,} bytes)"
        )
    rows = [*measures["per_class"].items(), ("macro average", measures["macro"])]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  precision  recall      f1  texts"]
    lines += [
        f"{name:<{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:6.3f}  "
        f"{row['support']:5}"
        for name, row in rows
    ]
    lines += [
        "",
        f"accuracy {measures['accuracy']:.3f}, loss {measures['loss']:.3f} "
        f"(always answering the commonest class: {measures['always_commonest']:.3f})",
        "",
        "confusion matrix (rows: true label, columns: answer, in the same order)",
    ]
    cell = max(len(str(n)) for row in measures["confusion"] for n in row) + 2
    for name, counts in zip(measures["per_class"], measures["confusion"], strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{n:>{cell}}" for n in counts))
    return "\n".join(lines)


def _test_part(run: Path) -> list[Example]:
    path = run / TEST_FILE
    if not path.is_file():
        raise ValueError(
            f"evaluate: {run} must hold {TEST_FILE}, the texts kept aside; got no such file; "
            "name labelled data with --data"
        )
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Example(**row) for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"evaluate: {path} must hold labelled texts; got {error}") from None


def _documents(run: Path, data: str | None) -> Sequence:
    """All of `data`, or the validation documents of the text that the run learnt from."""
    if data:
        return read_corpus(data).documents
    if not (run / "run.json").is_file():
        raise ValueError(
            f"evaluate: {run} must hold run.json, which tells its data; got no such file; "
            "name a text with --data"
        )
    config = TrainConfig.load(run / "run.json").data
    return split_documents(read_corpus(config.path).documents, config.val_fraction)[1]


def _encode(documents: Sequence, tokenizer: Any) -> np.ndarray:
    """int64 token ids; the end-of-text token, if there is one, follows each document."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text like any other
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = []
    for document in documents:
        for block in blocks(document):
            parts.append(tokenizer.encode(block, add_special_tokens=False).ids)
        parts.append([] if end is None else [end])
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
