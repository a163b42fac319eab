"""The report: self-contained, escaped, and made from whatever the run directory holds."""

import json
import re
from html.parser import HTMLParser

import pytest

from pyfast.train import TrainConfig, report
from tests import tiny_run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements and text of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_of(run_dir):
    return Page(report.write(run_dir).read_text(encoding="utf-8"))


HOSTILE = '<script>alert("x")</script>&'


@pytest.fixture
def full_run(tmp_path):
    values = TrainConfig().to_dict()
    values["data"]["path"] = values["model"]["init_from"] = HOSTILE
    (tmp_path / "run.json").write_text(json.dumps(values))
    rows = [{"step": 0, "eval/loss": 8.0, "eval/accuracy": 0.1, "seconds": 0.5}]
    rows += [
        {
            "step": step,
            "train/loss": 8.0 / step,
            "train/lr": 1e-3,
            "train/grad_norm": 1.0,
            "train/tokens_per_sec": 12345.0,
            "seconds": 61.0 * step,
        }
        for step in (1, 2)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(tmp_path / "samples.jsonl", [{"prompt": HOSTILE, "text": HOSTILE, "seed": 1}])
    row = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 4}
    evaluation = {
        "accuracy": 0.25,
        "macro": row,
        "per_class": {HOSTILE: row, "b": row},
        "confusion": [[1, 3], [0, 4]],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def test_report_shows_everything_a_full_run_has(full_run):
    page = page_of(full_run)
    assert page.count("svg") == 5
    for words in ("8.000", "4.000", "12,345", "2:02", "0.250", "batch_size", "linear_act", "macro"):
        assert words in page.text, words


def test_report_escapes_what_it_is_given(full_run):
    page = page_of(full_run)
    assert page.count("script") == 0
    assert page.text.count(HOSTILE) >= 6  # data, init_from, prompt, text, class names


def test_report_reaches_nothing_outside(full_run):
    page = page_of(full_run)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "img", "script", "base"}
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    style = re.search("<style>.*?</style>", report.write(full_run).read_text(), re.DOTALL)[0]
    assert "url(" not in style and "@import" not in style


def test_report_ids_are_unique_and_links_meet_them(full_run):
    elements = page_of(full_run).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in elements if "href" in a} <= set(ids)


def test_report_follows_the_colour_scheme(full_run):
    text = report.write(full_run).read_text()
    assert "prefers-color-scheme: dark" in text
    drawn = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert "var(--first)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)  # no colour that only suits one scheme


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        "",
        '{"step": 0, "eval/loss": 8.0}\n',
        '{"step": 1, "train/loss": 8.0}\n{"step": 2, "train/lo',  # killed while writing
        '{"step": 1, "train/loss": NaN}\n{"step": "x"}\n[]\n',
    ],
    ids=["absent", "empty", "one point", "cut off", "odd values"],
)
def test_report_is_written_from_partial_metrics(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    page = page_of(tmp_path)
    assert page.count("svg") == (1 if metrics and "8.0" in metrics else 0)
    assert tmp_path.name in page.text


def test_report_survives_damaged_companions(tmp_path):
    for name in ("run.json", "evaluation.json", "samples.jsonl"):
        (tmp_path / name).write_text('{"broken')
    assert page_of(tmp_path).count("h1") == 1


def test_report_comes_with_every_run():
    run = tiny_run.run()
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.count("svg") == 4  # loss, tokens per second, learning rate, gradient norm
