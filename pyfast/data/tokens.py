"""Text as tokens: a byte-level BPE tokenizer, memory-mapped arrays, windows in a keyed order."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyfast.build import cache_dir
from pyfast.data.text import Document, blocks, read_corpus, sample, split_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # an extra: imported where it is used

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 4 << 20  # enough for a small vocabulary, and a second or two of training
BLOCKS_AT_ONCE = 8  # encoded together: memory stays near 8 blocks times what tokens cost


@dataclass(frozen=True)
class TokenData:
    """Token arrays of both splits, mapped from the cache, with the tokenizer that made them."""

    train: np.ndarray  # uint16, or uint32 for a vocabulary above 65536
    val: np.ndarray
    tokenizer_file: Path
    vocab_size: int
    fingerprint: str  # of the text, the tokenizer and the split


def load_tokens(
    source: str, *, vocab_size: int, val_fraction: float, tokenizer: str | None = None
) -> TokenData:
    """Tokens of a file, a folder or "stdlib", from the cache if they are there.

    `tokenizer` is a tokenizer.json, or a directory with one; without it, one of `vocab_size` is
    trained on a bounded sample of the training text. The cache is keyed by content: the same text
    and settings give the same tokens, whenever and by whichever process they were written.
    """
    corpus = read_corpus(source)
    given = _tokenizer_file(tokenizer) if tokenizer is not None else None
    settings = [corpus.digest, val_fraction, vocab_size if given is None else _digest(given)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    folder = cache_dir() / "tokens" / key
    if not _whole(folder):
        train, val = split_documents(corpus.documents, val_fraction)
        made = (
            read_tokenizer(given)
            if given
            else train_tokenizer(sample(train, SAMPLE_BYTES), vocab_size)
        )
        _publish(folder, functools.partial(_write_tokens, tokenizer=made, train=train, val=val))
    meta = json.loads((folder / "meta.json").read_text())
    arrays = [np.memmap(folder / f"{name}.bin", meta["dtype"], "r") for name in ("train", "val")]
    return TokenData(*arrays, folder / "tokenizer.json", meta["vocab_size"], key)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016; the byte alphabet of GPT-2): no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or the one in a directory; ValueError if it is absent or damaged.

    Hugging Face keeps padding and truncation in the file; a text is cut where its reader says, not
    there.
    """
    from tokenizers import Tokenizer

    file = _tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises the bare Exception
        raise ValueError(f"tokens: {file} must be a tokenizer.json; got {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def window_starts(length: int, context_length: int, seed: int, first: int, count: int) -> list[int]:
    """Starts of windows number `first` to `first + count`, in an order that `seed` decides.

    The array is cut into windows; an epoch visits each once in a keyed permutation, and the next
    epoch shifts the cuts. A pure function in constant memory: a run resumes at any step.
    """
    windows = (length - 1) // context_length
    if windows < 1:
        raise ValueError(
            f"tokens: data must have at least context_length + 1 = {context_length + 1} tokens; "
            f"got {length}; use more text or a smaller model.context_length"
        )
    shifts = context_length if windows > 1 else 1  # a lone window has no room to move
    windows -= windows > 1
    starts = []
    for index in range(first, first + count):
        epoch, position = divmod(index, windows)
        key = _hash64(f"{seed} {epoch}")
        starts.append(_permute(position, windows, key) * context_length + key % shifts)
    return starts


def windows(tokens: np.ndarray, starts: list[int], context_length: int) -> dict[str, Tensor]:
    """{"tokens", "targets"}: int64 [len(starts), context_length]; targets are one token ahead."""
    rows = np.stack([tokens[start : start + context_length + 1] for start in starts])
    rows = torch.from_numpy(rows.astype(np.int64))
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def _permute(index: int, count: int, key: int) -> int:
    """The `key`-th permutation of range(count): a Feistel network, walked until it falls inside."""
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_hash64(f"{key} {turn} {right}") & mask)
        index = left << half | right
        if index < count:
            return index


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _tokenizer_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"tokens: tokenizer must be a file that exists; got {file}")
    return file


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _whole(folder: Path) -> bool:
    """Whether every file has the size that meta.json, written last, says."""
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _write_tokens(
    folder: Path, tokenizer: Tokenizer, train: list[Document], val: list[Document]
) -> None:
    """tokenizer.json, train.bin, val.bin and, last, meta.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    tokenizer.encode_special_tokens = True  # in the text, "<|endoftext|>" is text like any other
    for name, documents in (("train", train), ("val", val)):
        with open(folder / f"{name}.bin", "wb") as file:
            for ids in _encode(tokenizer, documents):
                file.write(np.asarray(ids, dtype).tobytes())
    names = ("tokenizer.json", "train.bin", "val.bin")
    sizes = {name: (folder / name).stat().st_size for name in names}
    meta = {"dtype": dtype, "vocab_size": vocab_size, "sizes": sizes}
    (folder / "meta.json").write_text(json.dumps(meta))


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[list[int]]:
    """Token ids block by block; after each document the end-of-text token, if there is one."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    after = [] if end is None else [end]
    pieces = _pieces(documents)
    while batch := list(islice(pieces, BLOCKS_AT_ONCE)):
        encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, last) in zip(encodings, batch, strict=True):
            yield encoding.ids + after if last else encoding.ids


def _pieces(documents: list[Document]) -> Iterator[tuple[str, bool]]:
    """(block of text, whether it ends its document)."""
    for document in documents:
        previous = ""
        for block in blocks(document):
            if previous:
                yield previous, False
            previous = block
        yield previous, True


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside `folder`, then rename it: nobody sees it half-written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        try:
            write(temporary)
            if folder.exists() and not _whole(folder):
                shutil.rmtree(folder)  # damaged
            os.rename(temporary, folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not _whole(folder):  # else another process was first, with the same content
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "set PYFAST_CACHE"
        raise RuntimeError(
            f"tokens: the cache must be writable; got {folder}: {error.strerror}; {hint}"
        ) from None


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of killed processes; a day old, so that no living one loses its own."""
    for path in folder.glob(".writing-*"):
        if time.time() - path.stat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True)
