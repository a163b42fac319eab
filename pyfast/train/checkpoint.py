"""Checkpoints that are whole or absent: a folder is filled under another name, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyfast import models
from pyfast.models import checkpoint as model_files

STATE = "state.json"  # written last, with the size and SHA-256 of every other file
TEMPORARY = ".writing-"  # prefix of what a killed process may leave behind
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `checkpoint-<step>/`: model, optimizer, random-number states, and `state` as JSON.

    On any failure the folder does not appear and what it held so far is removed. Raises
    RuntimeError with one sentence when the disk is full or cannot be written.
    """
    final = run_dir / f"checkpoint-{step}"
    temporary = run_dir / f"{TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(final):
            temporary.mkdir(parents=True)
            models.save(model, temporary)
            tensors, settings = flatten_optimizer(optimizer)
            save_file(tensors, temporary / "optimizer.safetensors")
            save_file(random_states(), temporary / "random.safetensors")
            files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
            text = json.dumps({**state, "step": step, "optimizer": settings, "files": files})
            (temporary / STATE).write_text(text)
            for path in temporary.iterdir():
                _flush(path)
            _flush(temporary)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            os.replace(temporary, final)
            _flush(run_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Put a whole checkpoint back, bit by bit; returns the `state` given to `save`, with "step".

    Without `optimizer` only the model is loaded, and the random-number states stay as they are.
    """
    state = json.loads((path / STATE).read_text())
    models.load_tensors(model, load_file(path / "model.safetensors"), str(path))
    if optimizer is not None:
        tensors = load_file(path / "optimizer.safetensors")
        optimizer.load_state_dict(unflatten_optimizer(tensors, state["optimizer"]))
        restore_random_states(load_file(path / "random.safetensors"))
    return state


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one sentence for each damaged one that is newer.

    ValueError if there are checkpoints and none is whole; (None, []) if there is none at all.
    """
    damage = []
    for path in reversed(steps_saved(run_dir)):
        problem = find_damage(path)
        if problem is None:
            return path, damage
        damage.append(f"train: {path.name} must be whole; got {problem}; left aside")
    if damage:
        raise ValueError(
            f"train: {run_dir} must hold a whole checkpoint; got "
            + ", ".join(f"{p.name}: {find_damage(p)}" for p in steps_saved(run_dir))
            + "; delete them to start from the beginning"
        )
    return None, []


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes and hashes in its state; None if whole."""
    try:
        files = json.loads((path / STATE).read_text())["files"]
        for name, expected in files.items():
            found = (path / name).stat().st_size
            if found != expected["size"]:
                return f"{name} with {found} bytes instead of {expected['size']}"
            if _describe(path / name) != expected:
                return f"{name} with changed contents"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"an unreadable {STATE}"
    return None


def prune(run_dir: Path, keep_last: int, keep_step: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints and that of `keep_step`."""
    for path in steps_saved(run_dir)[:-keep_last]:
        if path.name != f"checkpoint-{keep_step}":
            # Renamed first: a kill in the middle leaves a leftover, not a checkpoint with a hole.
            doomed = path.with_name(f"{TEMPORARY}{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what killed processes were writing."""
    for path in [*run_dir.glob(f"{TEMPORARY}*"), *run_dir.glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def steps_saved(run_dir: Path) -> list[Path]:
    """The checkpoints of a run in the order of their step, damaged ones included."""
    found = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file by `data`, as models.checkpoint does: whole or not at all, also after a crash.

    Raises RuntimeError with one sentence when the disk is full or cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        model_files.write_atomically(path, lambda temporary: temporary.write_bytes(data))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into one sentence that names the file and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        while isinstance(error.__context__, OSError | SafetensorError):
            error = error.__context__  # the first one knows the reason, not another sentence
        told = re.search(r"os error (\d+)", str(error))  # how safetensors passes errno on
        number = int(told[1]) if told else getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error)
        hint = "; free some space, then resume the run" if number in FULL else ""
        raise RuntimeError(f"train: {path} must be writable; got {reason}{hint}") from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """(tensors named "<parameter index>.<key>", the parameter groups as JSON values)."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def unflatten_optimizer(tensors: dict[str, Tensor], settings: dict) -> dict[str, Any]:
    """The state dict that `flatten_optimizer` took apart."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, **settings}


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
