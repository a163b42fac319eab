"""Models on disk in Hugging Face's layout: config.json and model.safetensors, each atomic."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfast.models.causal_lm import CausalLM
from pyfast.models.classifier import SequenceClassifier
from pyfast.models.config import ModelConfig, config_from_dict
from pyfast.models.gpt import GPT
from pyfast.models.llama import Llama

_KINDS: dict[str, type[CausalLM]] = {"gpt2": GPT, "llama": Llama}
# Buffers that older transformers saved and nobody needs.
_STALE = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def build(config: ModelConfig) -> CausalLM:
    """A freshly initialised model of `config` (torch's global generator decides the weights)."""
    return _KINDS[config.model_type](config)


def save(model: CausalLM | SequenceClassifier, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors so that transformers loads them; atomic per file.

    Raises OSError (with a one-sentence message) where the disk refuses; nothing half-written stays.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"save: {directory} must be a writable directory; got {error}") from None
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    values = _config_values(model)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(
        directory / "model.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    write_atomically(directory / "config.json", lambda path: path.write_text(text, "utf-8"))


def load(
    directory: str | os.PathLike, dtype: torch.dtype | None = None
) -> CausalLM | SequenceClassifier:
    """The model that `save` or transformers wrote; `architectures` tells a classifier.

    dtype: of the parameters (default: as stored). Raises FileNotFoundError for a missing file and
    ValueError for one that is truncated or does not fit its config.json.
    """
    directory = Path(directory)
    values = _read_config(directory)
    config = config_from_dict(values)
    tensors = _read_tensors(directory)
    kind = _KINDS[config.model_type]
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        model = _shell(kind, config, values)
    tensors = _fit_names(model, config, tensors)
    floats = [t for t in tensors.values() if t.is_floating_point()]
    stored = max(floats, key=Tensor.numel).dtype if floats else torch.float32
    model = model.to(dtype or stored).to_empty(device="cpu")
    load_tensors(model, tensors, str(directory))
    return model


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The configuration in a model directory, without its weights; raises as `load` does."""
    return config_from_dict(_read_config(Path(directory)))


def load_tensors(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into `model` (dtypes convert); ValueError unless names and shapes fit."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        what = f"no {missing[0]!r}" if missing else f"an unexpected {extra[0]!r}"
        raise ValueError(
            f"load: weights in {source} must have the names of {type(model).__name__}; got {what}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"load: {name} in {source} must be floating point, not quantised; "
                f"got {tensor.dtype}"
            )
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"load: {name} in {source} must be {list(own[name].shape)} as in config.json; "
                f"got {list(tensor.shape)}"
            )
    model.load_state_dict(tensors)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)`, to the disk, then over `path` in one step: whole or not at all."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"save: {path} must be writable; got {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _config_values(model: CausalLM | SequenceClassifier) -> dict[str, Any]:
    """The contents of config.json."""
    values = model.config.to_dict()
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if isinstance(model, SequenceClassifier):
        values["architectures"] = [model.classifier_name]
        values["id2label"] = dict(enumerate(model.label_names))
        values["label2id"] = {name: i for i, name in enumerate(model.label_names)}
        values["pad_token_id"] = model.pad_token_id
    else:
        values["architectures"] = [model.lm_name]
    return values


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"load: {directory} must be a model directory; got no config.json")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"load: {path} must be JSON; got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"load: {path} must hold one JSON object; got {type(values).__name__}")
    return values


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return _read_safetensors(single)
    try:
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"load: {index} must hold a weight_map; got something else") from None
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= _read_safetensors(directory / Path(name).name)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"load: {path.parent} must hold {path.name}; got no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file; got {error}; copy or train it again"
        ) from None


def _shell(
    kind: type[CausalLM], config: ModelConfig, values: dict[str, Any]
) -> CausalLM | SequenceClassifier:
    """The model that config.json describes, without weights."""
    architecture = (values.get("architectures") or [kind.lm_name])[0]
    model = kind(config)
    if architecture == kind.classifier_name:
        labels = values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        try:
            names = [labels[i] for i in sorted(labels, key=int)]
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"load: id2label must map numbers to names; got {labels!r}") from None
        return SequenceClassifier(model, len(names), names, config.pad_token_id)
    if architecture not in (kind.lm_name, kind.bare_name):
        names = f"{kind.lm_name} or {kind.classifier_name}"
        raise ValueError(f"load: architectures must be {names}; got {architecture!r}")
    return model


def _fit_names(
    model: CausalLM | SequenceClassifier, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Undo the harmless differences between checkpoints of one architecture.

    Stale buffers go; a bare body (the original "gpt2") gets its prefix; a second copy of a tied
    head goes, as transformers ignores it too.
    """
    prefix = model.body_name + "."
    kept = {n: t for n, t in tensors.items() if not n.endswith(_STALE)}
    if not any(name.startswith(prefix) for name in kept):
        heads = ("lm_head.weight", "score.weight")
        kept = {n if n in heads else prefix + n: t for n, t in kept.items()}
    if config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    return kept
