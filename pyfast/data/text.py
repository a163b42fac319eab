"""Text files as documents: found in a fixed order, checked to be text, read in bounded blocks."""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 1 << 20  # bounds the memory of reading, however long a file is

# Not code anyone wrote by hand (tables of encodings, the pages of help()), nor part of every
# installation (Debian packs the tests apart): left out, so that the text is alike everywhere.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class Document:
    """Bytes [start, stop) of a file of UTF-8 text; `name` is the path inside its folder."""

    name: str
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a digest of their names and contents."""

    documents: tuple[Document, ...]
    digest: str
    skipped: int  # files left out because they are not text


def read_corpus(source: str) -> Corpus:
    """The documents of a file, of a folder (hidden files excepted) or of "stdlib".

    In a folder, files that are not UTF-8 text are left out. Raises ValueError if nothing is left,
    and if `source` does not exist, is empty, or is a file that is not text.
    """
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source).expanduser()
    if root.is_file():
        return _corpus([_read(root.name, root)], skipped=0)
    if not root.is_dir():
        raise ValueError(f"text: data.path must be a file or a folder that exists; got {source}")
    read, skipped = [], 0
    for path in _walk(root, stdlib=source == "stdlib"):
        try:
            read.append(_read(path.relative_to(root).as_posix(), path))
        except (ValueError, PermissionError):
            skipped += 1
    if not read:
        raise ValueError(
            f"text: data.path must hold UTF-8 text; got {source} with {skipped} other files"
        )
    return _corpus(read, skipped)


def split_documents(
    documents: tuple[Document, ...], val_fraction: float
) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents: chosen by a hash of the name, so that adding a file moves
    no other. A lone document gives up its last part, cut at a line end."""
    if len(documents) == 1:
        return _cut(documents[0], val_fraction)
    limit = val_fraction * 2**64
    by_hash = sorted(documents, key=lambda document: _hash64(document.name))
    count = sum(_hash64(document.name) < limit for document in by_hash)
    chosen = set(by_hash[: min(max(count, 1), len(documents) - 1)])  # neither side is empty
    return (
        [document for document in documents if document not in chosen],
        [document for document in documents if document in chosen],
    )


def blocks(document: Document) -> Iterator[str]:
    """The text in blocks of about BLOCK_BYTES that end at a line end wherever there is one."""
    with open(document.path, "rb") as file:
        file.seek(document.start)
        left, rest = document.stop - document.start, b""
        while left > 0:
            raw = file.read(min(BLOCK_BYTES, left))
            if not raw:
                raise ValueError(f"text: {document.path} must not change while read; got shorter")
            left -= len(raw)
            raw = rest + raw
            stop = len(raw) if left == 0 else raw.rfind(b"\n") + 1 or _whole_characters(raw)
            yield raw[:stop].decode("utf-8")
            rest = raw[stop:]


def sample(documents: list[Document], limit: int) -> Iterator[str]:
    """About `limit` bytes of text, whole blocks of documents taken in the order of their hash."""
    taken = 0
    for document in sorted(documents, key=lambda document: _hash64(document.name)):
        for block in blocks(document):
            if taken >= limit:
                return
            taken += len(block)
            yield block


def _walk(root: Path, stdlib: bool) -> Iterator[Path]:
    """Regular files below `root` in the order of their path, whatever the file system says."""
    for folder, folders, files in os.walk(root):
        skipped = STDLIB_SKIPPED if stdlib else frozenset()
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skipped)
        for name in sorted(files):
            path = Path(folder, name)
            wanted = name.endswith(".py") if stdlib else not name.startswith(".")
            if wanted and path.is_file():
                yield path


def _read(name: str, path: Path) -> tuple[Document, bytes]:
    """The document and its digest; ValueError unless the file is UTF-8 text that is not empty."""
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0
    with open(path, "rb") as file:
        while raw := file.read(BLOCK_BYTES):
            if b"\0" in raw:
                at = size + raw.index(b"\0")
                raise ValueError(f"text: {path} must be text; got a binary file (byte {at} is 0)")
            _decode(decoder, raw, path, size)
            digest.update(raw)
            size += len(raw)
        _decode(decoder, b"", path, size)
    if size == 0:
        raise ValueError(f"text: {path} must not be empty; got 0 bytes")
    return Document(name, path, 0, size), digest.digest()


def _decode(decoder: codecs.IncrementalDecoder, raw: bytes, path: Path, offset: int) -> None:
    try:
        decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} must be UTF-8 text; got {error.reason} near byte {offset + error.start}"
        ) from None


def _corpus(read: list[tuple[Document, bytes]], skipped: int) -> Corpus:
    digest = hashlib.sha256()
    for document, content in read:
        digest.update(f"{len(document.name)}:{document.name}".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return Corpus(tuple(document for document, _ in read), digest.hexdigest(), skipped)


def _cut(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Two parts, the second about `val_fraction`; cut after a line, or inside one that is long."""
    size = document.stop - document.start
    start = document.start + min(max(int(size * (1 - val_fraction)), 1), size - 1)
    with open(document.path, "rb") as file:
        file.seek(start)
        raw = file.read(min(BLOCK_BYTES, document.stop - start))
    line = raw.find(b"\n") + 1
    cut = line if 0 < line < len(raw) else _first_character(raw)
    at = start + cut
    if at >= document.stop:
        raise ValueError(f"text: {document.path} must have more than {size} bytes to be split")
    name, path = document.name, document.path
    return [Document(name, path, document.start, at)], [Document(name, path, at, document.stop)]


def _whole_characters(raw: bytes) -> int:
    """Length of the longest prefix that does not end inside a UTF-8 character."""
    stop = len(raw)
    while stop > 0 and raw[stop - 1] & 0xC0 == 0x80:
        stop -= 1
    return stop - 1 if stop > 0 and raw[stop - 1] >= 0xC0 else len(raw)


def _first_character(raw: bytes) -> int:
    """Offset of the first byte that begins a UTF-8 character."""
    return next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw))


def _hash64(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little")
