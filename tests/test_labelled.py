"""Labelled texts: what is read, what is refused, and that nothing tested was learnt."""

import collections
import re

import pytest

from pyfast.data import labelled
from pyfast.data.labelled import Example


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_reads_a_header_in_any_order_with_other_columns(tmp_path):
    file = write(tmp_path / "a.csv", 'id,Label, text\n1,good,fine day\n2,bad,"rain, wind"\n')
    found = [(e.text, e.label) for e in labelled.read(file)]
    assert found == [("fine day", "good"), ("rain, wind", "bad")]


def test_csv_without_header_is_text_then_label(tmp_path):
    file = write(tmp_path / "a.csv", '\ufefffine day,good\r\n\r\n"two\nlines",bad\r\n')
    found = [(e.text, e.label) for e in labelled.read(file)]
    assert found == [("fine day", "good"), ("two\nlines", "bad")]


def test_tsv_is_divided_at_tabs(tmp_path):
    file = write(tmp_path / "a.tsv", "text\tlabel\nfine, day\tgood\nrain\tbad\n")
    assert [e.text for e in labelled.read(file)] == ["fine, day", "rain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold rows of text and label; got none"),
        ("text,label\n", "must hold rows of text and label; got none"),
        ("a,b,c\n1,2,3\n", "line 1 must name the columns text and label"),
        ("text,label\na,x\nb,y,z\n", "line 3 must have 2 columns; got 3"),
        ("text,label\na,x\n\n  ,y\n", "line 4: text must not be empty"),
        ("text,label\na,x\nb,\n", "line 3: label must not be empty"),
        ("a,x\nb,x\n", "must hold at least 2 labels; got 1"),
        ('a,x\nb,"y\n', "must be UTF-8 text in CSV form; got unexpected end of data near line"),
        # Python 3.10 refuses a zero byte while reading, later versions hand it on
        ("a,x\nb\0,y\n", "line"),
    ],
)
def test_csv_names_the_line_that_is_wrong(tmp_path, content, message):
    file = write(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        labelled.read(file)
    assert str(file) in str(caught.value)


def test_csv_refuses_binary(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe\x00,x\n")
    with pytest.raises(ValueError, match="must be UTF-8 text in CSV form"):
        labelled.read(tmp_path / "a.csv")


def test_csv_reads_texts_longer_than_the_csv_modules_limit(tmp_path):
    file = write(tmp_path / "a.csv", f"{'x' * 200_000},long\ny,short\n")
    assert len(labelled.read(file)[0].text) == 200_000


def test_folder_takes_a_label_from_each_sub_folder(tmp_path):
    for name in ("cat/a.txt", "cat/deep/b.txt", "dog/c.txt", "dog/.hidden", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    found = [(e.text, e.label) for e in labelled.read(tmp_path)]
    assert found == [("cat/a.txt", "cat"), ("cat/deep/b.txt", "cat"), ("dog/c.txt", "dog")]


def test_folder_refuses_binary_and_empty_files(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"a must be UTF-8 text; got"):
        labelled.read(tmp_path)
    (tmp_path / "cat" / "a").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"a: text must not be empty"):
        labelled.read(tmp_path)


def test_read_refuses_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="got a path that does not exist"):
        labelled.read(tmp_path / "nothing")


def test_split_keeps_groups_whole_and_shares_close():
    # 20 files of 1 to 20 examples each: no exact tenth exists, and a deal can go badly wrong
    examples = [
        Example(f"{label} {file} {i}", label, f"{label}/{file}")
        for label in "ab"
        for file in range(20)
        for i in range(file + 1)
    ]
    parts = labelled.split(examples, seed=0)
    home = {e.group: name for name in ("train", "validation", "test") for e in getattr(parts, name)}
    for name in ("train", "validation", "test"):
        assert all(home[e.group] == name for e in getattr(parts, name))
    assert sorted(e.text for part in vars(parts).values() for e in part) == sorted(
        e.text for e in examples
    )
    for part in (parts.validation, parts.test):
        counts = collections.Counter(e.label for e in part)
        assert all(abs(counts[label] - 21) <= 3 for label in "ab")


def test_split_keeps_repeated_texts_together():
    examples = [Example(str(i % 10), "ab"[i % 2], str(i % 10)) for i in range(100)]
    parts = labelled.split(examples, seed=0)
    texts = [{e.text for e in part} for part in vars(parts).values()]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 10


def test_split_is_decided_by_the_seed():
    examples = [Example(str(i), "ab"[i % 2], str(i)) for i in range(100)]
    assert labelled.split(examples, 0) == labelled.split(examples, 0)
    assert labelled.split(examples, 0) != labelled.split(examples, 1)


@pytest.mark.parametrize(
    ("count", "validation", "message"),
    [
        (2, 0.1, "label 'a' must have at least 3 different texts"),
        (9, 0.95, "leave a rest for training"),
        (9, 0.0, "must be above 0"),
    ],
)
def test_split_refuses_what_cannot_be_divided(count, validation, message):
    examples = [Example(str(i), "a", str(i)) for i in range(count)]
    with pytest.raises(ValueError, match=message):
        labelled.split(examples, 0, validation=validation)


def test_stdlib_snippets_do_not_name_their_package():
    examples = labelled.read("stdlib")
    assert {e.label for e in examples} == set(labelled.STDLIB_PACKAGES)
    assert len({e.text for e in examples}) == len(examples) > 1000
    for example in examples:
        words = re.split(r"[^a-z0-9]+", example.text.lower())
        assert example.label not in words
        assert not re.search(r"^\s*(import|from \S+ import) ", example.text, re.MULTILINE)


def test_stdlib_parts_share_no_file_and_have_every_label():
    parts = labelled.split(labelled.read("stdlib"), seed=0)
    files = [{e.group for e in part} for part in vars(parts).values()]
    assert len(set.union(*files)) == sum(map(len, files))
    for part in (parts.train, parts.validation, parts.test):
        assert {e.label for e in part} == set(labelled.STDLIB_PACKAGES)
