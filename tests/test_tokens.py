"""Tokens: tokenizer, cache, and the order of the windows."""

import json

import numpy as np
import pytest

from pyfast.data import text, tokens
from pyfast.data.tokens import END_OF_TEXT, load_tokens, read_tokenizer, window_starts, windows
from tests.small_fit import write_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder, **settings):
    return load_tokens(str(folder), **{"vocab_size": 300, "val_fraction": 0.2, **settings})


def test_tokens_decode_to_the_text_they_came_from(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    # bytes outside any vocabulary, and the special token's own name as plain text
    texts = ["naïve 日本 \t\x07 end", f"a {END_OF_TEXT} b", "def f():\n        return 1\n"]
    for number, content in enumerate(texts):
        (folder / f"{number}.txt").write_text(content, encoding="utf-8")
    data = load(folder)
    tokenizer = read_tokenizer(data.tokenizer_file)
    end = tokenizer.token_to_id(END_OF_TEXT)
    found = []
    for split in (data.train, data.val):
        assert split[-1] == end
        for document in np.split(split, np.flatnonzero(split == end) + 1)[:-1]:
            found.append(tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False))
    assert sorted(found) == sorted(texts)


def test_tokens_are_the_same_however_the_cache_was_made(tmp_path, monkeypatch):
    folder = write_text(tmp_path / "text")
    first = load(folder)
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(tokens, "BLOCKS_AT_ONCE", 3)
    second = load(folder)
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.val, second.val)
    assert first.tokenizer_file.read_bytes() == second.tokenizer_file.read_bytes()


def test_tokens_cache_is_used_and_repaired(tmp_path, cache):
    folder = write_text(tmp_path / "text")
    data = load(folder)
    expected, made = data.train.tolist(), data.tokenizer_file.stat().st_mtime_ns
    assert load(folder).tokenizer_file.stat().st_mtime_ns == made
    (data.tokenizer_file.parent / "train.bin").write_bytes(b"cut")
    assert load(folder).train.tolist() == expected
    assert [path.name for path in (cache / "tokens").iterdir()] == [data.fingerprint]


def test_tokens_follow_the_contents_and_the_settings(tmp_path):
    folder = write_text(tmp_path / "text")
    first = load(folder).fingerprint
    other = load(folder, vocab_size=290).fingerprint
    (folder / "0.txt").write_text("something else")
    assert len({first, other, load(folder).fingerprint}) == 3


def test_tokens_wide_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    folder = write_text(tmp_path / "text")
    file = tmp_path / "tokenizer.json"
    made = json.loads(load(folder).tokenizer_file.read_text())
    names = {f"[{i}]": i for i in range(300, 70000)}
    made["model"]["vocab"] |= names
    file.write_text(json.dumps(made))
    data = load(folder, tokenizer=str(file))
    assert data.vocab_size > 1 << 16
    assert data.train.dtype == np.uint32


def test_tokens_load_into_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    data = load(write_text(tmp_path / "text"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(data.tokenizer_file))
    ids = read_tokenizer(data.tokenizer_file).encode("the cat sat").ids
    assert theirs.encode("the cat sat") == ids
    assert theirs.decode(ids) == "the cat sat"


def test_tokens_refuse_a_damaged_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"must be a tokenizer\.json; got"):
        load(write_text(tmp_path / "text"), tokenizer=str(file))
    with pytest.raises(ValueError, match=r"tokenizer must be a file that exists; got .*no\.json"):
        load(write_text(tmp_path / "text"), tokenizer=str(tmp_path / "no.json"))


def test_tokens_full_disk_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    folder = write_text(tmp_path / "text")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "_encode", full)
    with pytest.raises(RuntimeError, match=r"No space left on device; free some space"):
        load(folder)
    assert list((cache / "tokens").iterdir()) == []


# 2: the least that permutes; 97: odd, no power of two; 64: a power of four, no walk at all
@pytest.mark.parametrize("count", [1, 2, 64, 97])
def test_window_starts_visit_each_window_once_an_epoch(count):
    context = 8
    length = (count + (count > 1)) * context + 1  # several windows leave one for the shift
    for epoch in range(3):
        starts = window_starts(length, context, 5, epoch * count, count)
        assert len({start // context for start in starts}) == count
        assert len({start % context for start in starts}) == 1
        assert min(starts) >= 0
        assert max(starts) + context + 1 <= length


def test_window_starts_are_a_pure_function_of_seed_and_position():
    many = window_starts(10_001, 16, 3, 0, 500)
    assert [window_starts(10_001, 16, 3, i, 1)[0] for i in range(499, -1, -1)] == many[::-1]
    assert window_starts(10_001, 16, 4, 0, 500) != many
    assert many != sorted(many)


def test_window_starts_refuse_too_little_text():
    with pytest.raises(ValueError, match=r"at least context_length \+ 1 = 9 tokens; got 8"):
        window_starts(8, 8, 0, 0, 1)


def test_windows_targets_are_one_token_ahead():
    data = np.arange(40_000, dtype=np.uint16)  # above 32767: must not turn negative
    batch = windows(data, [0, 39_990], 4)
    assert batch["tokens"].tolist() == [[0, 1, 2, 3], [39990, 39991, 39992, 39993]]
    assert (batch["targets"] - batch["tokens"]).unique().tolist() == [1]


def test_window_starts_deal_each_epoch_anew():
    context, count = 8, 97
    length = (count + 1) * context + 1
    epochs = [window_starts(length, context, 5, epoch * count, count) for epoch in range(3)]
    orders = [tuple(start // context for start in starts) for starts in epochs]
    shifts = {starts[0] % context for starts in epochs}
    assert len(set(orders)) == 3 and len(shifts) > 1


def test_tokens_end_each_document_once_however_many_blocks_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    folder = write_text(tmp_path / "text", documents=2)
    data = load(folder)
    end = read_tokenizer(data.tokenizer_file).token_to_id(END_OF_TEXT)
    for part in (data.train, data.val):
        assert (part == end).sum() == 1 and part[-1] == end


def test_tokens_of_another_split_are_not_those_in_the_cache(tmp_path):
    folder = write_text(tmp_path / "text", documents=1)
    less, more = (load(folder, val_fraction=fraction) for fraction in (0.1, 0.5))
    assert len(more.val) > 3 * len(less.val)


def test_tokens_are_neither_cut_nor_padded_by_what_a_tokenizer_file_says(tmp_path):
    folder = write_text(tmp_path / "text", documents=2)
    plain = load(folder)
    tokenizer = read_tokenizer(plain.tokenizer_file)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(read_tokenizer(tmp_path).encode("the cat sat on the mat and then slept").ids) > 6
    given = load(folder, tokenizer=str(tmp_path))
    assert np.array_equal(given.train, plain.train) and np.array_equal(given.val, plain.val)
