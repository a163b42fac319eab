"""GPT, Llama and the classifier against transformers: logits, gradients, files both ways."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast import models
from pyfast.tolerance import assert_as_good_as_torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
GPT = {"vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-relu-narrow": ("gpt2", {"activation_function": "relu", "n_inner": 40}),
    "llama-grouped": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
}
TOKENS = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(5))
TARGETS = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(6))


def hugging_face(case: str, classes: int = 0, **extra):
    """A random transformers model of one of CASES, with every parameter away from its default."""
    kind, settings = CASES[case]
    settings = {**(GPT if kind == "gpt2" else LLAMA), **NO_TOKENS, **settings, **extra}
    if kind == "gpt2":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(**settings)
    else:
        config = transformers.LlamaConfig(**settings)
    if classes:
        config.num_labels = classes
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    return model


def assert_as_good(ours, theirs, truth, what: str = "logits") -> None:
    """The tolerance rule; the floor covers sums over layers that transformers orders otherwise."""
    assert_as_good_as_torch(what, ours.detach(), theirs.detach(), truth.detach())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers(case, tmp_path):
    theirs = hugging_face(case)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    results = []
    for model in (ours, theirs, copy.deepcopy(theirs).double()):
        hf = model is not ours
        model.zero_grad()
        logits = model(TOKENS).logits if hf else model(TOKENS)
        flat = logits.flatten(0, 1)
        loss = (
            torch.nn.functional.cross_entropy(flat, TARGETS.flatten())
            if hf
            else ours.loss(TOKENS, TARGETS)
        )
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append({"logits": logits.detach().clone(), "loss": loss.detach()} | grads)
    mine, torchs, truth = results
    for name in mine:
        assert_as_good(mine[name], torchs[name], truth[name], name)
    assert mine["loss"].dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save(case, tmp_path):
    torch.manual_seed(1)
    config = hugging_face(case).config
    ours = models.build(models.config_from_dict(config.to_dict()))
    models.save(ours, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits)
    again = models.load(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(TOKENS), ours(TOKENS))


@pytest.mark.parametrize("case", ["gpt2-untied", "llama-grouped"])
def test_state_dict_is_hugging_faces(case):
    theirs = hugging_face(case)
    ours = models.build(models.config_from_dict(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_tied_head_is_stored_once():
    model = models.GPT(models.GPTConfig(**GPT))
    assert "lm_head.weight" not in model.state_dict()
    assert model.head_weight is model.transformer.wte.weight


@pytest.mark.parametrize("case", ["gpt2", "llama-grouped"])
def test_classifier_equals_transformers(case, tmp_path):
    theirs = hugging_face(case, classes=3, pad_token_id=7)
    theirs.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    theirs.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "theirs")
    assert isinstance(ours, models.SequenceClassifier)
    assert (ours.label_names, ours.pad_token_id) == (["ant", "bee", "cat"], 7)
    tokens = torch.where(TOKENS == 7, 8, TOKENS)
    tokens[0, 11:] = 7  # padded on the right
    tokens[1, :] = 7  # nothing but padding
    mine, other = ours(tokens), theirs(tokens).logits
    assert_as_good(mine, other, copy.deepcopy(theirs).double()(tokens).logits)
    models.save(ours, tmp_path / "ours")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(back(tokens).logits, other)
    assert back.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


def test_classifier_reads_the_last_token_of_each_length():
    backbone = models.Llama(models.LlamaConfig(**LLAMA))
    classifier = models.SequenceClassifier(backbone, 2, ["no", "yes"])
    lengths = torch.tensor([19, 4])
    scores = classifier(TOKENS, lengths)
    short = classifier(TOKENS[1:, :4])  # one row without padding needs neither pad nor lengths
    torch.testing.assert_close(scores[1:], short)
    labels = torch.tensor([1, 0])
    expected = torch.nn.functional.cross_entropy(scores, labels)
    torch.testing.assert_close(classifier.loss(TOKENS, labels, lengths), expected)
    assert classifier.model is backbone.model


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bfloat16_model_has_a_float32_loss(kind, tmp_path):
    theirs = hugging_face("gpt2" if kind == "gpt2" else "llama-grouped")
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path, dtype=torch.bfloat16)
    loss = ours.loss(TOKENS, TARGETS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in ours.parameters()} == {torch.bfloat16}
    truth = copy.deepcopy(theirs).double()(TOKENS).logits
    assert_as_good(ours(TOKENS), theirs.bfloat16()(TOKENS).logits, truth)
    models.save(ours, tmp_path / "narrow")
    assert next(models.load(tmp_path / "narrow").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["gpt2", "llama-grouped"])
def test_models_run_under_autocast(case, tmp_path):
    theirs = hugging_face(case)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.loss(TOKENS, TARGETS)
        mine, other = ours(TOKENS), theirs(TOKENS).logits
        models.generate(ours, TOKENS, 3, temperature=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    assert_as_good(mine, other, copy.deepcopy(theirs).double()(TOKENS).logits)


def test_loss_ignores_minus_100_and_reduces_as_asked():
    model = models.GPT(models.GPTConfig(**GPT))
    targets = TARGETS.clone()
    targets[0, 3:] = -100
    each = model.loss(TOKENS, targets, reduction="none").detach()
    assert each.shape == (2, 19) and float(each[0, 3:].abs().sum()) == 0.0
    for reduction, expected in (
        ("sum", each.sum()),
        ("mean", each.sum() / (targets != -100).sum()),
    ):
        loss = model.loss(TOKENS, targets, reduction=reduction).detach()
        torch.testing.assert_close(loss, expected)


class Results(TorchDispatchMode):
    """Torch's operators that run, and how many rows each makes."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim():
            self.rows.append((func.name().split(".")[0], len(out)))
        return out


@pytest.mark.parametrize("case", ["gpt2", "llama-tied"])
def test_tied_embedding_takes_gradients_of_its_used_rows_alone(case, tmp_path):
    hugging_face(case).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    weight = model.body.token_embedding.weight
    with Results() as made:
        ours = torch.autograd.grad(model.loss(TOKENS, TARGETS), weight)[0]
    embedding = [rows for name, rows in made.rows if name == "aten::embedding_dense_backward"]
    assert embedding == [len(TOKENS.unique())] and embedding[0] < len(weight)
    logits = model.hidden(TOKENS) @ weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(ours, torch.autograd.grad(loss, weight)[0])
    alone = torch.autograd.grad(model.hidden(TOKENS).sum(), weight)[0]
    assert ours.layout == alone.layout == torch.strided  # a sparse one would reach no optimizer


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_initialisation_is_gpt2s(build):
    if build == "gpt2":
        model = models.GPT(models.GPTConfig(**{**GPT, "n_embd": 96, "n_layer": 8}))
        plain, residual = model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj
    else:
        settings = {**LLAMA, "hidden_size": 96, "num_hidden_layers": 8, "intermediate_size": 200}
        model = models.Llama(models.LlamaConfig(**settings))
        plain, residual = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    assert float(plain.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(residual.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8)
    assert model.loss(TOKENS, TARGETS).item() == pytest.approx(4.11, abs=0.15)  # log(61)


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_models_compile_without_graph_breaks(build):
    model = (
        models.GPT(models.GPTConfig(**GPT))
        if build == "gpt2"
        else models.Llama(models.LlamaConfig(**LLAMA))
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # before any eager call
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_rotary_table_outlives_inference_mode_and_dtype_changes():
    model = models.Llama(models.LlamaConfig(**LLAMA))
    with torch.inference_mode():
        model(TOKENS[:, :3])
    model.loss(TOKENS, TARGETS).backward()
    cos, sin = model.bfloat16().model.rotary.rows(2, 5, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (3, 4)


def test_rotary_table_forgets_the_tensors_of_a_trace():
    from torch._subclasses import FakeTensorMode

    model = models.Llama(models.LlamaConfig(**LLAMA))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.model.rotary.rows(0, 5, torch.device("cpu"))
    assert model(TOKENS).isfinite().all()


def test_config_json_keeps_what_others_need(tmp_path):
    config = models.LlamaConfig(**LLAMA, rope_theta=7.0, eos_token_id=2)
    models.save(models.Llama(config), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 7.0
    assert values["dtype"] == "float32" and values["eos_token_id"] == 2
