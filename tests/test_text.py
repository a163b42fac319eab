"""Text as documents: order, checks, split, bounded blocks."""

import os

import pytest

from pyfast.data import text
from pyfast.data.text import blocks, read_corpus, split_documents


def joined(documents):
    return "".join(block for document in documents for block in blocks(document))


def test_text_stdlib_is_python_source_without_tests():
    corpus = read_corpus("stdlib")
    names = [document.name for document in corpus.documents]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert len(names) > 300
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert corpus == read_corpus("stdlib")


def test_text_folder_skips_what_is_not_text_and_sorts_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    files = {"b.txt": b"two", "a.md": "één".encode(), "sub/c": b"three", ".hidden/d": b"four"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    corpus = read_corpus(str(tmp_path))
    assert [document.name for document in corpus.documents] == ["a.md", "b.txt", "sub/c"]
    assert corpus.skipped == 3


def test_text_digest_follows_contents_and_names(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = read_corpus(str(tmp_path)).digest
    file.touch()
    assert read_corpus(str(tmp_path)).digest == first
    file.rename(tmp_path / "b.txt")
    renamed = read_corpus(str(tmp_path)).digest
    (tmp_path / "b.txt").write_text("two")
    assert len({first, renamed, read_corpus(str(tmp_path)).digest}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must not be empty; got 0 bytes"),
        (b"ab\0c", "must be text; got a binary file (byte 2 is 0)"),
        (b"caf\xe9 au lait", "must be UTF-8 text; got invalid continuation byte near byte 3"),
        (b"cut short \xe2\x82", "must be UTF-8 text; got unexpected end of data"),
    ],
)
def test_text_file_that_is_not_text_is_refused_in_one_sentence(tmp_path, content, message):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_corpus(str(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_text_missing_and_textless_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file or a folder that exists; got /no/such"):
        read_corpus("/no/such")
    with pytest.raises(ValueError, match=r"must hold UTF-8 text; got .* with 0 other files"):
        read_corpus(str(tmp_path))


def test_text_split_is_by_document_and_stable(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    documents = read_corpus(str(tmp_path)).documents
    train, val = split_documents(documents, 0.1)
    assert len(train) + len(val) == 200
    assert not set(train) & set(val)
    assert 8 <= len(val) <= 35  # 20 expected, hashed
    (tmp_path / "new.txt").write_text("one more")
    moved = split_documents(read_corpus(str(tmp_path)).documents, 0.1)
    assert set(val) - set(moved[1]) == set()  # nobody changed sides


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_text_split_leaves_neither_side_empty(tmp_path, fraction):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    train, val = split_documents(read_corpus(str(tmp_path)).documents, fraction)
    assert len(train) == len(val) == 1


@pytest.mark.parametrize(
    "content",
    ["line\n" * 1000, "no line end " * 500, "é" * 999, "ab"],  # é: two bytes, a cut may hit one
)
def test_text_lone_file_gives_up_its_end(tmp_path, content):
    file = tmp_path / "book.txt"
    file.write_text(content, encoding="utf-8")
    train, val = split_documents(read_corpus(str(file)).documents, 0.1)
    assert joined(train) + joined(val) == content
    assert joined(train)
    assert joined(val)


def test_text_blocks_are_bounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 7)  # smaller than a line, and cuts "€" (3 bytes)
    content = "ab\ncdefghijklm€€€€\n\n" * 9 + "€"
    file = tmp_path / "a.txt"
    file.write_text(content, encoding="utf-8")
    found = list(blocks(read_corpus(str(file)).documents[0]))
    assert "".join(found) == content
    assert max(len(block.encode()) for block in found) <= 7 + 6  # a block and the rest before it
