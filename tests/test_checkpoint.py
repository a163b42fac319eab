"""Checkpoints: whole or absent, found again, refused when damaged."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from torch import nn

from pyfast import models
from pyfast.train import TrainConfig, checkpoint
from pyfast.train.parameters import build_optimizer

CONFIG = {"model_type": "gpt2", "vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1}


@pytest.fixture
def trained():
    """(model, optimizer) in bfloat16 after two steps: masters and moments are no zeros."""
    model = models.build(models.config_from_dict(CONFIG | {"n_head": 2})).to(torch.bfloat16)
    optimizer = build_optimizer(model, TrainConfig())
    advance(model, optimizer)
    advance(model, optimizer)
    return model, optimizer


def advance(model, optimizer):
    tokens = torch.randint(20, (2, 8))
    model.loss(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(run_dir, trained, *steps):
    return [checkpoint.save(run_dir, step, *trained, {"note": step}) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_gives_back_every_bit(tmp_path, trained):
    model, optimizer = trained
    (path,) = save_steps(tmp_path, trained, 2)
    advance(model, optimizer)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    drawn = torch.rand(3)

    other = models.build(model.config).to(torch.bfloat16)
    other_optimizer = build_optimizer(other, TrainConfig())
    state = checkpoint.load(path, other, other_optimizer)
    assert (state["step"], state["note"]) == (2, 2)
    advance(other, other_optimizer)  # the batch is drawn from the restored generator
    assert torch.equal(torch.rand(3), drawn)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_checkpoint_is_a_model_directory(tmp_path, trained):
    (path,) = save_steps(tmp_path, trained, 2)
    loaded = models.load(path)
    assert torch.equal(loaded.head_weight, trained[0].head_weight)


def test_checkpoint_newest_is_by_number(tmp_path, trained):
    save_steps(tmp_path, trained, 9, 10)
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-10", [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_checkpoint_damage_is_noticed_and_the_older_one_taken(tmp_path, trained, name, damage):
    older, newer = save_steps(tmp_path, trained, 1, 2)
    file = newer / name
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        content[0 if name == "state.json" else -1] ^= 1
        file.write_bytes(content)
    path, notes = checkpoint.newest(tmp_path)
    assert path == older
    assert len(notes) == 1
    assert "checkpoint-2 must be whole; got" in notes[0]


def test_checkpoint_all_damaged_is_an_error_and_none_is_not(tmp_path, trained):
    assert checkpoint.newest(tmp_path) == (None, [])
    (path,) = save_steps(tmp_path, trained, 1)
    os.truncate(path / "model.safetensors", 10)
    with pytest.raises(ValueError, match=r"got checkpoint-1: model\.safetensors with 10 bytes"):
        checkpoint.newest(tmp_path)


def test_checkpoint_prune_keeps_the_last_and_the_best(tmp_path, trained):
    save_steps(tmp_path, trained, 1, 2, 3, 4, 10)
    checkpoint.prune(tmp_path, 2, keep_step=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]


def test_checkpoint_leftovers_are_removed(tmp_path, trained):
    save_steps(tmp_path, trained, 1)
    (tmp_path / ".writing-checkpoint-2").mkdir()
    (tmp_path / ".writing-checkpoint-2" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-run.json").write_bytes(b"{")
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("limit", [100, 2000, 12000])  # in config.json, the model, the optimizer
def test_checkpoint_full_disk_is_one_sentence_and_keeps_the_previous(tmp_path, trained, limit):
    """The kernel refuses to let any file grow past `limit` bytes."""
    (older,) = save_steps(tmp_path, trained, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            save_steps(tmp_path, trained, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert str(error.value) == (
        f"train: {tmp_path / 'checkpoint-2'} must be writable; got File too large; "
        "free some space, then resume the run"
    )
    assert names(tmp_path) == ["checkpoint-1"]
    assert checkpoint.find_damage(older) is None


def test_checkpoint_no_space_names_the_remedy(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left on device; free some space"):
        checkpoint.write_atomically(tmp_path / "run.json", b"new")
    assert names(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"


def test_checkpoint_reason_other_than_a_full_disk_has_no_such_remedy(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RuntimeError, match=r"must be writable; got Is a directory$"):
        checkpoint.write_atomically(tmp_path / "run.json", b"new")


def test_checkpoint_optimizer_state_is_plain_tensors(trained):
    tensors, settings = checkpoint.flatten_optimizer(trained[1])
    assert {name.split(".")[1] for name in tensors} == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert json.loads(json.dumps(settings)) == json.loads(json.dumps(settings, allow_nan=False))
    restored = checkpoint.unflatten_optimizer(tensors, settings)
    original = trained[1].state_dict()
    assert restored["state"].keys() == original["state"].keys()
    assert restored["param_groups"] == original["param_groups"]


def test_checkpoint_of_another_model_is_refused(tmp_path, trained):
    (path,) = save_steps(tmp_path, trained, 1)
    wider = models.build(models.config_from_dict(CONFIG | {"n_head": 2, "n_embd": 16}))
    with pytest.raises(ValueError, match="must be"):
        checkpoint.load(path, wider)
    assert isinstance(wider, nn.Module)
