"""Settings of a run: checked when made, stored and read back."""

import dataclasses
import json

import pytest

from pyfast.train import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def test_config_survives_json():
    config = TrainConfig(
        model=ModelConfig(freeze=("transformer.h.0.*",)), optim=OptimConfig(max_norm=None)
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_fields_all_have_help():
    for section in (DataConfig, ModelConfig, OptimConfig, RunConfig):
        for field in dataclasses.fields(section):
            assert field.metadata["help"], field.name


def test_config_accepts_whole_numbers_for_floats():
    assert OptimConfig(lr=1).lr == 1.0
    assert isinstance(OptimConfig(lr=1).lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": -1.0}}, "train: optim.lr must be above 0; got -1.0"),
        ({"optim": {"lr": float("nan")}}, "train: optim.lr must be above 0; got nan"),
        ({"optim": {"lr": float("inf")}}, "train: optim.lr must be finite; got inf"),
        ({"optim": {"beta1": 1.0}}, "train: optim.beta1 must be below 1; got 1.0"),
        ({"run": {"steps": 0}}, "train: run.steps must be at least 1; got 0"),
        ({"data": {"vocab_size": 10}}, "train: data.vocab_size must be at least 257; got 10"),
        ({"model": {"model_type": "bert"}}, "one of gpt2, llama; got 'bert'"),
        ({"modle": {}}, "must have keys among data, model, optim, run; got 'modle'"),
        ({"optim": {"warmup_step": 3}}, "got 'warmup_step'; did you mean 'warmup_steps'?"),
    ],
)
def test_config_refuses_bad_values_in_one_sentence(values, message):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": "fast"}}, "train: optim.lr must be a float; got 'fast'"),
        ({"optim": {"batch_size": 1.5}}, "train: optim.batch_size must be an int; got 1.5"),
        ({"run": {"steps": True}}, "train: run.steps must be an int; got True"),
        ({"run": {"resume": 1}}, "train: run.resume must be a bool; got 1"),
        ({"model": {"freeze": "head"}}, "train: model.freeze must be a list; got 'head'"),
        ({"optim": 3}, "train: optim must be a table of settings; got 3"),
    ],
)
def test_config_refuses_wrong_types(values, message):
    with pytest.raises(TypeError) as error:
        TrainConfig.from_dict(values)
    assert str(error.value) == message


def test_config_load_refuses_a_file_that_is_not_json(tmp_path):
    (tmp_path / "run.json").write_text('{"optim": {')
    with pytest.raises(ValueError, match=r"run\.json must be JSON"):
        TrainConfig.load(tmp_path / "run.json")
