"""Mistakes on the command line that the parsers and the model files leave to us to put in words."""

import io
import shutil
import sys

import pytest
from tokenizers import Tokenizer

from pyfast import cli
from tests import tiny_run


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """A run `RUN`, one whose tokenizer knows more words than its model, and labelled texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYFAST_DEBUG", raising=False)
    shutil.copytree(tiny_run.run(), "RUN")
    wide = shutil.copytree(tiny_run.run(), tmp_path / "WIDE") / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(wide))
    tokenizer.add_tokens(["wholly new"])
    tokenizer.save(str(wide))
    rows = (f"{word} wholly new {i},{word}\n" for i in range(5) for word in ("a", "b"))
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(rows))
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- a\n")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("generate", "generate: RUN must be given; got nothing"),
        ("evaluate", "evaluate: RUN must be given; got nothing"),
        ("train --run.steps", "train: --run.steps must be followed by one value; got nothing"),
        ("tune --tokens", "tune: --tokens must be followed by at least one value; got nothing"),
        ("tune --dtypes int8", "tune: --dtypes must be one of bfloat16, float16, float32; "
                               "got 'int8'"),
        ("doctor --jsno", "doctor: options must be among those of pyfast doctor --help; "
                          "got '--jsno'; did you mean '--json'?"),
        ("train --config empty.yaml", "train: --config must be a YAML file of options; "
                                      "got an empty file"),
        ("train --config list.yaml", "train: --config must be a YAML file of options; got - a"),
        ("train --run.device meta --data.path texts.csv --model.context_length 4",
         "train: run.device must be usable here; got meta: Tensor.item() cannot be called on meta "
         "tensors"),
        ("finetune --resume RUN", "resume: RUN must be one of pyfast finetune; got RUN; "
                                  "resume it by pyfast train"),
        ("generate RUN --seed 99999999999999999999", "generate: seed must be in [-2**63, 2**64) or "
                                                     "None; got 99999999999999999999"),
        ("generate RUN --prompt \udcff", "generate: prompt must be UTF-8 text; got other bytes"),
        ("generate RUN --prompt - ", "generate: prompt must be UTF-8 text; got other bytes"),
    ],
)  # fmt: skip
def test_mistake_is_told_and_nothing_is_printed(command, sentence, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert cli.main(command.split()) in (1, 2)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"pyfast: {sentence}\n")


def test_train_does_not_resume_what_finetune_made(capsys, tmp_path):
    (tmp_path / "RUN" / "task.json").write_text("{}")
    assert cli.main(["train", "--resume", "RUN"]) == 2
    assert capsys.readouterr().err == (
        "pyfast: resume: RUN must be one of pyfast train; got RUN; resume it by pyfast finetune\n"
    )


@pytest.mark.parametrize(
    "command", ["generate WIDE --prompt", "finetune WIDE --data texts.csv --run.dir new --freeze"]
)
def test_tokenizer_with_more_words_than_the_model_is_refused(command, capsys, tmp_path):
    assert cli.main([*command.split(), "wholly new"]) == 2
    out, err = capsys.readouterr()
    assert "must give tokens below" in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "new").exists()
