"""Labelled texts for classification: a CSV file, a folder of folders, or the standard library.

`read(source)` gives the examples; `split(examples, seed)` sets validation and test parts aside.

An example belongs to a *group*, and a group never lies in two parts. In a CSV file or a folder the
group is the text itself, so a duplicated row cannot be both learnt and tested. In the standard
library it is the file, so a test snippet always comes from a file that training never saw.
"""

import csv
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Packages that every Python from 3.10 on has, Debian's minimal one included, each with at least
# three files and about 2,500 lines outside its tests.
STDLIB_PACKAGES = (
    "asyncio",
    "ctypes",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
SNIPPET_LINES = 16
_DEALS = 64
_MIN_CODE_LINES = 4  # a snippet with fewer lines of content says too little to be judged
_IMPORT = re.compile(r"\s*(import\s|from\s+\S+\s+import\b)")
# "_" counts as a border: _asyncio and email_policy are masked; HTTPServer is content and stays.
_PACKAGE_NAME = re.compile(
    rf"(?<![A-Za-z0-9])({'|'.join(STDLIB_PACKAGES)})(?![A-Za-z0-9])", re.IGNORECASE
)


@dataclass(frozen=True)
class Example:
    """One text, its label, and the group that must not be divided between the parts."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one set of examples."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def read(source: str | Path) -> list[Example]:
    """The examples of "stdlib", of a .csv/.tsv file, or of a folder with a sub-folder per label.

    Raises FileNotFoundError if it is not there, ValueError (with file and line) if it is unusable.
    """
    path = Path(source)
    if str(source) == "stdlib":
        examples = _read_stdlib(Path(sysconfig.get_path("stdlib")))
    elif path.is_dir():
        examples = _read_folder(path)
    elif path.is_file():
        examples = _read_csv(path)
    else:
        raise FileNotFoundError(
            f"labelled data: {path} must be a .csv or .tsv file, a folder with one sub-folder per "
            'label, or the word "stdlib"; got a path that does not exist'
        )
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise ValueError(
            f"labelled data: {path} must hold at least 2 labels; got {len(labels)} {labels}"
        )
    return examples


def split(
    examples: Sequence[Example], seed: int, validation: float = 0.1, test: float = 0.1
) -> Split:
    """Divide by group and label by label, so that every label is in every part.

    A pure function of its arguments. Raises ValueError if a label has fewer than 3 groups.
    """
    shares = {"train": 1.0 - validation - test, "test": test, "validation": validation}
    if not min(shares.values()) > 0.0:
        raise ValueError(
            "labelled data: validation and test must be above 0 and leave a rest for training; "
            f"got validation={validation}, test={test}"
        )
    by_label: dict[str, dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        by_label[example.label][example.group].append(example)
    home: dict[str, str] = {}  # a text under two labels must not lie in two parts either
    for label, groups in sorted(by_label.items()):
        if len(groups) < len(shares):
            raise ValueError(
                f"labelled data: label {label!r} must have at least {len(shares)} different texts, "
                f"for training, validation and test; got {len(groups)}"
            )
        sizes = {group: len(members) for group, members in sorted(groups.items())}
        home = _deal_best(sizes, shares, random.Random(f"{seed}/{label}")) | home
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    for example in examples:
        parts[home[example.group]].append(example)
    return Split(parts["train"], parts["validation"], parts["test"])


def _deal_best(
    sizes: dict[str, int], shares: dict[str, float], order: random.Random
) -> dict[str, str]:
    """Group -> part. Files differ in size a hundredfold, so one deal can leave a part almost empty:
    several are tried, and the one closest to the shares is taken. Equal groups need only one.
    """
    best: dict[str, str] = {}
    best_error = float("inf")
    for _ in range(_DEALS):
        parts, error = _deal(sizes, shares, order)
        if error < best_error:
            best, best_error = parts, error
        if error <= len(shares):
            break
    return best


def _deal(
    sizes: dict[str, int], shares: dict[str, float], order: random.Random
) -> tuple[dict[str, str], float]:
    """Groups in random order, each to the part furthest below its share; the last ones are kept
    for the parts that have none yet. Also returns by how many examples the shares are missed."""
    total = sum(sizes.values())
    missing = {name: share * total for name, share in shares.items()}
    parts: dict[str, str] = {}
    empty = set(shares)
    for group in order.sample(list(sizes), len(sizes)):
        wanted = empty if len(sizes) - len(parts) <= len(empty) else shares
        part = max(sorted(wanted), key=missing.__getitem__)
        parts[group] = part
        missing[part] -= sizes[group]
        empty.discard(part)
    return parts, sum(map(abs, missing.values()))


def _read_csv(path: Path) -> list[Example]:
    """Rows of text and label; a first row naming both columns is a header and may name more."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    examples: list[Example] = []
    columns: tuple[int, int] | None = None
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if not row:
                    continue
                if columns is None:
                    columns, is_header = _columns(row, where)
                    if is_header:
                        width = len(row)
                        continue
                    width = 2
                if len(row) != width:
                    raise ValueError(
                        f"labelled data: {where} must have {width} columns; got {len(row)}"
                    )
                examples.append(_example(row[columns[0]], row[columns[1]], where))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"labelled data: {path} must be UTF-8 text in CSV form; got {error} near line "
                f"{rows.line_num + 1}"
            ) from error
    if not examples:
        raise ValueError(f"labelled data: {path} must hold rows of text and label; got none")
    return examples


def _columns(row: list[str], where: str) -> tuple[tuple[int, int], bool]:
    """Positions of text and label, and whether this first row is a header."""
    names = [cell.strip().lower() for cell in row]
    if "text" in names and "label" in names:
        return (names.index("text"), names.index("label")), True
    if len(row) == 2:
        return (0, 1), False
    raise ValueError(
        f"labelled data: {where} must name the columns text and label, or have just those two; "
        f"got {len(row)} columns: {', '.join(row)[:80]}"
    )


def _example(text: str, label: str, where: str) -> Example:
    label = label.strip()
    for name, value in (("text", text.strip()), ("label", label)):
        if not value:
            raise ValueError(f"labelled data: {where}: {name} must not be empty; got {value!r}")
        if "\0" in value:
            raise ValueError(f"labelled data: {where}: {name} must be text; got a zero byte")
    return Example(text, label, group=text)


def _read_folder(path: Path) -> list[Example]:
    """One sub-folder per label; every file under it is one text. Hidden names are passed over."""
    examples = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != "."):
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"labelled data: {file} must be UTF-8 text; got {error}") from None
            examples.append(_example(text, folder.name, str(file)))
    return examples


def _read_stdlib(library: Path) -> list[Example]:
    """Snippets of `SNIPPET_LINES` lines of source, labelled with the package they come from.

    What would give the answer away is taken out: import lines, the package names themselves
    (masked as `package` wherever they stand alone), the comment block that opens a file (the same
    author and licence lines all over a package), the packages' tests, and repeated snippets.
    """
    examples: dict[str, Example] = {}
    for package in STDLIB_PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            name = file.relative_to(library).as_posix()
            if {"test", "tests"} & set(file.parts):
                continue
            lines = _content(file.read_text(encoding="utf-8", errors="replace"))
            for start in range(0, len(lines), SNIPPET_LINES):
                snippet = lines[start : start + SNIPPET_LINES]
                if sum(bool(line.strip()) for line in snippet) >= _MIN_CODE_LINES:
                    text = "\n".join(snippet)
                    examples.setdefault(text, Example(text, package, group=name))
    return list(examples.values())


def _content(source: str) -> list[str]:
    lines = source.splitlines()
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    return [_PACKAGE_NAME.sub("package", line) for line in lines[start:] if not _IMPORT.match(line)]
