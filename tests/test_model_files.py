"""Models on disk: layouts of other writers, broken files, refused configurations and inputs."""

import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyfast import models

GPT = {"vocab_size": 31, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
TOKENS = torch.arange(10)[None]


@pytest.fixture
def saved(tmp_path):
    """A small GPT and the directory it was saved in."""
    model = models.GPT(models.GPTConfig(**GPT))
    models.save(model, tmp_path)
    return model, tmp_path


def rewrite_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(directory, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_load_takes_the_original_gpt2_names(saved):
    model, directory = saved

    def strip(tensors):  # the first GPT-2 files have no prefix, but causal masks
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(16, 16)

    rewrite_tensors(directory, strip)
    assert torch.equal(models.load(directory)(TOKENS), model(TOKENS))


def test_load_ignores_a_second_copy_of_a_tied_head(saved):
    model, directory = saved
    rewrite_tensors(directory, lambda t: t.update({"lm_head.weight": torch.zeros(31, 12)}))
    assert torch.equal(models.load(directory)(TOKENS), model(TOKENS))


def test_load_joins_shards(saved):
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    assert torch.equal(models.load(directory)(TOKENS), model(TOKENS))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model-00002-of-00002.safetensors"):
        models.load(directory)


def test_load_does_not_touch_the_random_numbers(saved):
    before = torch.random.get_rng_state()
    models.load(saved[1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_load_names_what_is_missing(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"load: .*absent must be a model directory"):
        models.load(tmp_path / "absent")
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"load: .* must hold model.safetensors"):
        models.load(saved[1])


@pytest.mark.parametrize(
    "keep", [0, 5, 300, -1]
)  # empty, no header, part of a header, one byte off
def test_load_refuses_a_truncated_file(saved, keep):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"load: .* must be a whole safetensors file; got"):
        models.load(saved[1])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop("transformer.ln_f.bias"), r"got no 'transformer.ln_f.bias'"),
        (lambda t: t.update(odd=torch.ones(1)), r"got an unexpected 'odd'"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 12)}),
            r"transformer.wpe.weight in .* must be \[16, 12\] as in config.json; got \[9, 12\]",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(12, dtype=torch.int8)}),
            r"must be floating point, not quantised; got torch.int8",
        ),
    ],
)
def test_load_refuses_weights_that_do_not_fit(saved, change, sentence):
    rewrite_tensors(saved[1], change)
    with pytest.raises(ValueError, match=sentence):
        models.load(saved[1])


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": 3}', "\x00\xff"])
def test_load_refuses_a_broken_config(saved, text):
    (saved[1] / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"(load: .*config.json must|model_type must)"):
        models.load(saved[1])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "bert"}, r"config: model_type must be one of gpt2, llama; got 'bert'"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"architectures must be GPT2LMHeadModel or"),
        ({"n_head": 5}, r"GPTConfig: n_head must divide n_embd=12; got 5"),
        ({"n_layer": 0}, r"n_layer must be a positive integer; got 0"),
        ({"vocab_size": "many"}, r"vocab_size must be a positive integer; got 'many'"),
        ({"layer_norm_epsilon": float("nan")}, r"layer_norm_epsilon must be a positive number"),
        ({"activation_function": "gated"}, r"activation_function must be one of .*; got 'gated'"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            r"scale_attn_by_inverse_layer_idx must be False",
        ),
        ({"add_cross_attention": True}, r"add_cross_attention must be False; got True"),
    ],
)
def test_load_refuses_configurations_it_cannot_honour(saved, changes, sentence):
    rewrite_config(saved[1], **changes)
    with pytest.raises(ValueError, match=sentence):
        models.load(saved[1])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"num_key_value_heads": 3},
            r"num_key_value_heads must divide num_attention_heads=4; got 3",
        ),
        ({"head_dim": 7}, r"head_dim must be even; got 7"),
        ({"hidden_act": "gelu"}, r"hidden_act must be silu; got 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            r"rope_type must be .*; got 'yarn'",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, r"one of default, linear, llama3; got 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope factor must be a number > 0; got None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor must be 1.0"),
        ({"rope_theta": -1.0}, r"rope_theta must be a positive number; got -1.0"),
    ],
)
def test_llama_config_refuses_what_it_cannot_honour(changes, sentence):
    with pytest.raises(ValueError, match=f"LlamaConfig: .*{sentence}"):
        models.config_from_dict({"model_type": "llama", **LLAMA, **changes})


def test_save_replaces_whole_files_only(saved, monkeypatch):
    model, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for param in model.parameters():
        param.data.zero_()
    with pytest.raises(
        OSError, match=r"save: .*model.safetensors must be writable; got .*No space"
    ):
        models.save(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_save_on_a_full_disk_is_one_sentence(saved):
    model, directory = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writes fail after 2 kB
    try:
        with pytest.raises(OSError, match=r"save: .*model.safetensors must be writable; got"):
            models.save(model, directory / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((directory / "full").iterdir()) == []


def test_save_into_a_file_is_one_sentence(saved):
    model, directory = saved
    with pytest.raises(OSError, match=r"save: .*config.json must be a writable directory; got"):
        models.save(model, directory / "config.json")


@pytest.mark.parametrize(
    "tokens, error, sentence",
    [
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"model: tokens must be \[B, T\]; got \[3\]",
        ),
        (torch.zeros(1, 3), TypeError, r"model: tokens must be int64; got torch.float32"),
        (torch.zeros(1, 17, dtype=torch.int64), ValueError, r"at most 16 positions; got 17"),
        (torch.tensor([[3, 31]]), ValueError, r"model: tokens must be in 0..30; got 3..31"),
        (torch.tensor([[-1, 2]]), ValueError, r"model: tokens must be in 0..30; got -1..2"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_refuse_bad_tokens(kind, tokens, error, sentence):
    settings = {"model_type": kind, **(GPT if kind == "gpt2" else LLAMA)}
    model = models.build(models.config_from_dict(settings))
    with pytest.raises(error, match=sentence):
        model(tokens)


def test_models_take_an_empty_batch():
    for model in (models.GPT(models.GPTConfig(**GPT)), models.Llama(models.LlamaConfig(**LLAMA))):
        assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 31)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"num_labels": 0}, r"label_names must be 0 distinct names"),
        (
            {"num_labels": 2, "label_names": ["a"]},
            r"label_names must be 2 distinct names; got \['a'",
        ),
        ({"num_labels": 2, "label_names": ["a", "a"]}, r"must be 2 distinct names"),
        ({"num_labels": 2, "pad_token_id": 31}, r"pad_token_id must be in 0..30 or None; got 31"),
    ],
)
def test_classifier_refuses_bad_settings(arguments, sentence):
    with pytest.raises(ValueError, match=f"SequenceClassifier: .*{sentence}"):
        models.SequenceClassifier(models.GPT(models.GPTConfig(**GPT)), **arguments)


def test_classifier_refuses_bad_batches():
    classifier = models.SequenceClassifier(models.GPT(models.GPTConfig(**GPT)), 2)
    batch = TOKENS.expand(2, 10)
    with pytest.raises(ValueError, match=r"pad_token_id must be set .* for a batch; got 2 rows"):
        classifier(batch)
    for lengths in (torch.tensor([3, 0]), torch.tensor([3, 11]), torch.tensor([3])):
        with pytest.raises(ValueError, match=r"lengths must be \[2\] numbers in 1..10; got \[3"):
            classifier(batch, lengths)
    with pytest.raises(ValueError, match=r"tokens must be \[B, 1..16\]; got \[2, 17\]"):
        classifier(torch.zeros(2, 17, dtype=torch.int64))
