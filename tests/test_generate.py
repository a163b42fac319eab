"""Sampling: the cache changes nothing, the settings do what they say."""

import pytest
import torch

from pyfast import models

CONFIGS = {
    "gpt2": models.GPTConfig(vocab_size=53, n_positions=40, n_embd=24, n_layer=2, n_head=3),
    "llama": models.LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    ),
}
PROMPT = torch.randint(53, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS)
def model(request):
    model = models.build(CONFIGS[request.param])
    for param in model.parameters():  # freshly initialised models repeat one token
        param.data += 0.2 * torch.randn_like(param)
    return model


@pytest.mark.parametrize("pieces", [(12,), (1,) * 12, (5, 1, 4, 2), (1, 11)], ids=str)
def test_cache_gives_the_logits_of_the_whole(model, pieces):
    tokens = torch.randint(53, (2, 12))
    with torch.no_grad():
        whole = model(tokens)
        cache = models.KVCache(model, batch=2, length=20)  # longer than needed: views are strided
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
    assert cache.used == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_generate_greedy_is_the_argmax_without_a_cache(model):
    out = models.generate(model, PROMPT, 15, temperature=0)
    tokens = PROMPT
    for _ in range(15):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, tokens)


def test_generate_equals_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    models.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(models.generate(model, PROMPT, 12, temperature=0), expected)


def test_generate_in_bfloat16(model):
    out = models.generate(model.bfloat16(), PROMPT, 5, seed=0)
    assert out.shape == (3, 12) and out.dtype == torch.int64


def test_generate_repeats_itself_for_one_seed(model):
    first = models.generate(model, PROMPT, 20, seed=3)
    assert torch.equal(first, models.generate(model, PROMPT, 20, seed=3))
    assert not torch.equal(first, models.generate(model, PROMPT, 20, seed=4))
    torch.manual_seed(9)
    unseeded = models.generate(model, PROMPT, 20)
    torch.manual_seed(9)
    assert torch.equal(unseeded, models.generate(model, PROMPT, 20))


def test_generate_with_top_k_1_is_greedy(model):
    greedy = models.generate(model, PROMPT, 10, temperature=0)
    assert torch.equal(models.generate(model, PROMPT, 10, top_k=1, seed=0), greedy)
    assert torch.equal(models.generate(model, PROMPT, 10, top_p=1e-9, seed=0), greedy)
    assert torch.equal(models.generate(model, PROMPT, 10, temperature=1e-38, seed=0), greedy)


def test_generate_stops_rows_and_then_all(model):
    free = models.generate(model, PROMPT, 20, temperature=0)
    stop = int(free[0, 9])  # what row 0 says third
    out = models.generate(model, PROMPT, 20, temperature=0, stop_token=stop)
    for row, unstopped in zip(out, free, strict=True):
        new, says = row[7:].tolist(), unstopped[7 : len(row)].tolist()
        until = says.index(stop) + 1 if stop in says else len(says)
        assert new == says[:until] + [stop] * (len(new) - until)
    lone = models.generate(model, PROMPT[:1], 20, temperature=0, stop_token=stop)
    assert lone.shape[1] <= 10 and lone[0, -1] == stop


def test_generate_zero_tokens_returns_the_prompt(model):
    assert torch.equal(models.generate(model, PROMPT, 0), PROMPT)


def test_generate_fills_all_positions_and_no_more(model):
    assert models.generate(model, PROMPT, 33, seed=0).shape == (3, 40)
    with pytest.raises(ValueError, match=r"at most 40 positions; got 7 \+ 34; shorten"):
        models.generate(model, PROMPT, 34)


def test_stream_yields_the_columns_of_generate(model):
    columns = list(models.stream(model, PROMPT, 8, seed=2))
    out = models.generate(model, PROMPT, 8, seed=2)
    assert torch.equal(torch.stack(columns, dim=1), out[:, 7:])


def test_stream_leaves_gradients_on_between_tokens(model):
    for _ in models.stream(model, PROMPT, 2):
        assert torch.is_grad_enabled()


def test_sample_keeps_the_likeliest_only():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    logits = probabilities.log().expand(4000, 4)
    drawn = models.sample(logits, top_k=2)
    assert set(drawn.tolist()) == {1, 3}
    assert set(models.sample(logits, top_p=0.6).tolist()) == {1, 3}  # 0.5 does not reach 0.6
    assert set(models.sample(logits, top_p=0.5).tolist()) == {1}
    assert set(models.sample(logits, top_k=99).tolist()) == {0, 1, 2, 3}  # more than there are
    assert set(models.sample(logits, top_p=1.0).tolist()) == {0, 1, 2, 3}
    assert float((drawn == 1).float().mean()) == pytest.approx(2 / 3, abs=0.03)


def test_sample_follows_the_temperature():
    logits = torch.tensor([[0.0, 1.0]]).expand(20000, 2)
    for temperature in (0.5, 1.0, 4.0):
        share = float(models.sample(logits, temperature).float().mean())
        expected = float(torch.sigmoid(torch.tensor(1 / temperature)))
        assert share == pytest.approx(expected, abs=0.015)
    assert models.sample(logits[:3], 0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"temperature": -1.0}, r"temperature must be a finite number >= 0; got -1.0"),
        ({"temperature": float("nan")}, r"temperature must be .*; got nan"),
        ({"top_k": 0}, r"top_k must be at least 1 or None; got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be .*; got 1.5"),
        ({"max_new_tokens": -1}, r"max_new_tokens must be at least 0; got -1"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must be \[B, T\] .*; got \[3\]"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token; got \[1, 0\]"),
    ],
    ids=str,
)
def test_generate_refuses_bad_settings_at_once(model, arguments, sentence):
    settings = {"tokens": PROMPT, "max_new_tokens": 3, **arguments}
    with pytest.raises(ValueError, match=f"generate: .*{sentence}"):
        models.stream(model, **settings)  # before the first token is asked for


def test_cache_refuses_what_does_not_fit(model):
    cache = models.KVCache(model, batch=2, length=5)
    with torch.no_grad():
        model(PROMPT[:2, :3], cache)
        with pytest.raises(ValueError, match=r"tokens must be \[2, at most 2\] with 3 of 5"):
            model(PROMPT[:2, :3], cache)
        with pytest.raises(ValueError, match=r"got \[3, 1\]"):
            model(PROMPT[:, :1], cache)
    assert cache.used == 3
    with pytest.raises(ValueError, match=r"KVCache: batch must be .* got 2, 41"):
        models.KVCache(model, batch=2, length=41)
