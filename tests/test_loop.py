"""The training loop learns what its settings say, and stops as they say."""

import pytest
import torch
from torch import nn

from pyfast import models
from pyfast.train import LanguageModelling, TrainConfig, directory, fit, report
from pyfast.train.progress import read_metrics
from tests.small_fit import names, numbers, prepared, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of text, tokenised once for the whole module."""
    with prepared(tmp_path_factory.mktemp("loop")) as folder:
        yield folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Charts take most of the time of a tiny run."""
    monkeypatch.setattr(report, "write", lambda run_dir: None)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fit_learns_and_leaves_a_hugging_face_directory(tmp_path, data, model_type, dtype):
    transformers = pytest.importorskip("transformers")
    run_dir = tmp_path / "run"
    settings = {"model_model_type": model_type, "run_dtype": dtype, "run_steps": 25}
    result = fit(tiny_config(data, run_dir, **settings))
    assert result.step == 25
    first = result.history[0]["eval/loss"]
    assert result.val_loss < first - 2  # 5.6 for a uniform guess; 2.4 for the words' own entropy
    assert result.val_loss == result.history[-1]["eval/loss"]
    assert result.history == read_metrics(run_dir)
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json"} <= set(names(run_dir))
    assert {"metrics.jsonl", "checkpoint-25"} <= set(names(run_dir))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir, dtype=torch.float32)
    config = TrainConfig.load(run_dir / "run.json")
    loss = LanguageModelling(config).validate(_Wrapped(theirs))["loss"]
    assert loss == pytest.approx(result.val_loss, abs=1e-4 if dtype == "float32" else 0.02)
    assert transformers.AutoTokenizer.from_pretrained(run_dir).eos_token == "<|endoftext|>"


def test_fit_writes_the_report(tmp_path, data, monkeypatch):
    monkeypatch.undo()
    fit(tiny_config(data, tmp_path / "run", run_steps=1))
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


class _Wrapped(nn.Module):
    """A transformers model with the one method that the task calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loss(self, tokens, targets, reduction):
        logits = self.model(tokens).logits
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=reduction
        )


def test_fit_accumulation_equals_the_large_batch(tmp_path, data):
    fit(tiny_config(data, tmp_path / "whole", optim_batch_size=8, run_steps=5))
    fit(tiny_config(data, tmp_path / "parts", optim_accumulate=4, optim_batch_size=2, run_steps=5))
    pairs = zip(numbers(tmp_path / "whole")[1:], numbers(tmp_path / "parts")[1:], strict=True)
    for whole, parts in pairs:
        assert parts["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-5)
        assert parts["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)


class _Uneven(LanguageModelling):
    """Every second batch counts only its first three targets."""

    def batch(self, step):
        batch = super().batch(step)
        if step % 2:
            batch["targets"].view(-1)[3:] = -100
        return batch

    def loss(self, model, batch):
        targets = batch["targets"]
        return model.loss(batch["tokens"], targets, "sum"), int((targets != -100).sum())


def test_fit_accumulation_weighs_terms_not_batches(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", optim_accumulate=2, run_steps=1)
    task = _Uneven(config)
    torch.manual_seed(config.run.seed)
    model = task.build_model()
    sums, counts = zip(*(task.loss(model, task.batch(step)) for step in (0, 1)), strict=True)
    loss = sum(sums) / sum(counts)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    record = fit(config, _Uneven(config)).history[1]
    assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_fit_freezes_by_pattern(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", model_freeze=["transformer.h.0.*"], run_steps=3)
    torch.manual_seed(config.run.seed)
    before = LanguageModelling(config).build_model().state_dict()
    fit(config)
    after = models.load(tmp_path / "run").state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith("transformer.h.0."), name


def test_fit_all_but_head_trains_the_head_only(tmp_path, data):
    fit(tiny_config(data, tmp_path / "base", run_steps=2))
    settings = {"model_init_from": str(tmp_path / "base"), "model_freeze": ["all_but_head"]}
    fit(tiny_config(data, tmp_path / "run", run_steps=2, **settings))
    before = models.load(tmp_path / "base").state_dict()
    after = models.load(tmp_path / "run").state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed == ["transformer.wte.weight"]  # the head is tied to it


@pytest.mark.parametrize("patterns", [["*"], ["nothing.*"]])
def test_fit_refuses_to_freeze_everything_or_nothing(tmp_path, data, patterns):
    with pytest.raises(ValueError, match=r"model\.freeze must"):
        fit(tiny_config(data, tmp_path / "run", model_freeze=patterns))
    assert not (tmp_path / "run").exists()


def test_fit_init_from_starts_where_the_other_run_ended(tmp_path, data):
    first = fit(tiny_config(data, tmp_path / "base", run_steps=10))
    settings = {"model_init_from": str(tmp_path / "base"), "run_steps": 1}
    second = fit(tiny_config(data, tmp_path / "more", **settings))
    assert second.history[0]["eval/loss"] == pytest.approx(first.val_loss, rel=1e-6)


def test_fit_patience_stops_and_keeps_the_best(tmp_path, data, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.1, 9.0])  # a new best starts the count anew
    monkeypatch.setattr(LanguageModelling, "validate", lambda *_: {"loss": next(losses)})
    settings = {"run_patience": 2, "run_val_every": 2, "run_keep_last": 1, "run_steps": 100}
    result = fit(tiny_config(data, tmp_path / "run", run_save_every=1, **settings))
    assert result.history[-1]["step"] == 10
    assert (result.step, result.val_loss) == (6, 3.0)
    kept = (tmp_path / "run" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept


def test_fit_patience_does_not_choose_the_start(tmp_path, data, monkeypatch):
    """Where every validation is worse than the first, the least bad trained model is kept."""
    losses = iter([1.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(LanguageModelling, "validate", lambda *_: {"loss": next(losses)})
    result = fit(tiny_config(data, tmp_path / "run", run_patience=2, run_val_every=2))
    assert (result.step, result.val_loss) == (2, 4.0)


def test_fit_stops_at_a_validation_loss_that_is_not_finite(tmp_path, data, monkeypatch):
    losses = iter([5.0, float("inf")])
    monkeypatch.setattr(LanguageModelling, "validate", lambda *_: {"loss": next(losses)})
    with pytest.raises(RuntimeError, match="validation loss must be finite; got inf at step 5"):
        fit(tiny_config(data, tmp_path / "run"))


def test_fit_stops_at_a_loss_that_is_not_finite(tmp_path, data, monkeypatch):
    loss = LanguageModelling.loss

    def broken(task, model, batch):
        total, count = loss(task, model, batch)
        return total * (float("nan") if model.training and broken.calls == 6 else 1.0), count

    def counting(task, model, batch):
        broken.calls += model.training
        return broken(task, model, batch)

    broken.calls = 0
    monkeypatch.setattr(LanguageModelling, "loss", counting)
    with pytest.raises(RuntimeError) as error:
        fit(tiny_config(data, tmp_path / "run"))
    sentence = "train: loss must be finite; got nan at step 6; lower optim.lr"
    assert str(error.value) == f"{sentence} (checkpoint-4 is from before)"
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_fit_shortens_a_run_that_does_not_fit_its_time(tmp_path, data):
    result = fit(tiny_config(data, tmp_path / "run", run_steps=10**6, run_max_seconds=1.0))
    assert 10 <= result.step < 1000
    config = tiny_config(data, tmp_path / "run")
    end = config.optim.lr * config.optim.min_lr_ratio
    assert result.history[-1]["train/lr"] == pytest.approx(end)  # the schedule reached its end
    assert "eval/loss" in result.history[-1]


def test_fit_leaves_no_directory_when_the_configuration_cannot_work(tmp_path, data):
    for settings in ({"model_n_head": 5}, {"model_context_length": 10**6}, {"run_device": "tpu"}):
        with pytest.raises(ValueError):
            fit(tiny_config(data, tmp_path / "run", **settings))
        assert not (tmp_path / "run").exists()


def test_fit_refuses_a_run_that_another_process_trains(tmp_path, data):
    run_dir = fit(tiny_config(data, tmp_path / "run", run_steps=2)).run_dir
    again = tiny_config(data, run_dir, run_steps=3, run_resume=True)
    with directory.locked(run_dir), pytest.raises(ValueError, match=r"run\.dir must not be in use"):
        fit(again)
    assert fit(again).step == 3
