"""The command line as a user meets it: what works, and one sentence for what does not."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyfast import cli, models, verbs
from pyfast.data.tokens import read_tokenizer
from pyfast.train import TrainConfig, classify
from tests import tiny_run

SMALL = [
    *("--data.vocab_size", "300", "--model.n_layer", "1", "--model.n_head", "2"),
    *("--model.n_embd", "16", "--model.context_length", "16", "--optim.batch_size", "2"),
    *("--run.val_batches", "1", "--run.progress", "lines"),
]


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Runs and caches of a test stay its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYFAST_DEBUG", raising=False)


@pytest.fixture
def refused(capsys):
    """Run a command that must fail; returns its only line, without the name before it."""

    def run(*arguments, code=2):
        assert cli.main(list(arguments)) == code
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("pyfast: ") and not lines[-1].startswith("pyfast: pyfast")
        assert not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("pyfast: ")

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(tiny_run.text().read_bytes()[:20_000])
    return str(path)


def received(monkeypatch, verb, *arguments):
    """The arguments with which a command calls its function."""
    calls = []
    monkeypatch.setattr(verbs, verb, lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(list(arguments)) == 0
    return calls[0]


def test_train_takes_its_defaults_from_the_configuration(monkeypatch):
    (config,), _ = received(monkeypatch, "train", "train")
    assert config == TrainConfig()
    (config,), _ = received(monkeypatch, "finetune", "finetune", "somewhere")
    start = dataclasses.replace(classify.DEFAULTS.model, init_from="somewhere")
    assert config == dataclasses.replace(classify.DEFAULTS, model=start)


def test_train_reads_a_file_and_then_the_command_line(monkeypatch, tmp_path):
    yaml = (
        "optim:\n  lr: 1e-4\n  beta1: 0.5\nmodel:\n  freeze: ['a.*', b]\nrun:\n  patience: null\n"
    )
    (tmp_path / "c.yaml").write_text(yaml)
    (config,), _ = received(
        monkeypatch, "train", "train", "--config", "c.yaml", "--optim.lr", "3e-4"
    )
    assert (config.optim.lr, config.optim.beta1) == (3e-4, 0.5)
    assert config.model.freeze == ("a.*", "b")
    assert config.optim.batch_size == TrainConfig().optim.batch_size


def test_finetune_takes_words_for_the_usual_settings(monkeypatch):
    (config,), options = received(
        monkeypatch, "finetune",
        *("finetune", "RUN", "--task", "classify", "--data", "a.csv", "--freeze", "wte, h.0.*"),
        *("--from-scratch", "--val-fraction", "0.2", "--run.steps", "7"),
    )  # fmt: skip
    assert (config.data.path, config.data.val_fraction) == ("a.csv", 0.2)
    assert config.model.freeze == ("wte", "h.0.*")
    assert (config.run.steps, options) == (7, {"from_scratch": True})


def test_train_leaves_a_run_and_shows_a_sample(text, capsys, tmp_path):
    code = cli.main(["train", "--data.path", text, *SMALL, "--run.steps", "3"])
    out, err = capsys.readouterr()
    assert code == 0 and "step 3/3" in err
    run = tmp_path / "runs" / "train-001"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"):
        assert (run / name).is_file()
    sample = json.loads((run / "samples.jsonl").read_text())
    assert sample["text"] and sample["text"] in out
    assert "Samples" in (run / "report.html").read_text()
    assert "pyfast generate" in out


def test_train_resumes_with_the_settings_the_run_began_with(text, capsys):
    assert cli.main(["train", "--data.path", text, *SMALL, "--run.steps", "2"]) == 0
    assert cli.main(["train", "--resume", "--run.steps", "4"]) == 0
    assert cli.main(["train", "--resume", "runs/train-001", "--run.steps", "5"]) == 0
    _, err = capsys.readouterr()
    assert "resumed runs/train-001 at step 2" in err and "resumed runs/train-001 at step 4" in err
    lines = Path("runs/train-001/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(6))


def test_finetune_then_evaluate_prints_the_measures(capsys):
    data = str(tiny_run.labelled_csv())
    small = ["--run.steps", "2", "--run.val_every", "2", "--run.progress", "none"]
    assert cli.main(["finetune", str(tiny_run.run()), "--data", data, *small]) == 0
    out, _ = capsys.readouterr()
    assert "4 labels" in out and "pyfast evaluate runs/classify-001" in out
    assert cli.main(["evaluate", "runs/classify-001"]) == 0
    out, _ = capsys.readouterr()
    for words in ("precision", "recall", "f1", "macro average", "accuracy", "confusion matrix"):
        assert words in out
    assert cli.main(["evaluate", "runs/classify-001", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macro"]["support"] == 32
    assert cli.main(["finetune", "--resume", "runs/classify-001", "--run.steps", "3"]) == 0


def test_generate_prints_what_the_model_generates(capsys, monkeypatch):
    run, prompt = tiny_run.run(), " ".join(tiny_run.words()["sky"][:4])
    model, tokenizer = models.load(run), read_tokenizer(run)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3}
    expected = tokenizer.decode(models.generate(model, ids, 12, **settings)[0].tolist())
    options = ["--temperature", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "3"]
    options += ["--max-new-tokens", "12"]
    assert cli.main(["generate", str(run), "--prompt", prompt, *options]) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert cli.main(["generate", str(run), "--prompt", "-", *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_generate_fills_the_context_by_default(capsys):
    assert cli.main(["generate", str(tiny_run.run()), "--seed", "0"]) == 0  # no prompt either
    tokens = read_tokenizer(tiny_run.run()).encode(capsys.readouterr().out.strip()).ids
    assert 16 < len(tokens) <= 32


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in ("train", "finetune", "evaluate", "generate"))
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    for verb in ("train", "finetune", "evaluate", "generate", "doctor"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([verb, "--help"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "verb must be one of train, finetune, evaluate, generate, tune, doctor; "
                  "got 'trian'; did you mean 'train'?"),
        ("train --optim.lrr 1", "train: options must be among those of pyfast train --help; "
                                "got '--optim.lrr'; did you mean '--optim.lr'?"),
        ("train --optim.lr fast", "train: optim.lr must be a number; got fast"),
        ("train --optim.lr -1", "train: optim.lr must be above 0"),
        ("train --optim.lr inf", "train: optim.lr must be"),
        ("train --model.n_layer 2.5", "train: model.n_layer must be an integer; got 2.5"),
        ("train --model.n_kv_head x", "train: model.n_kv_head must be an integer or null; got x"),
        ("train --model.model_type bert", "train: model.model_type must be one of gpt2, llama; "),
        ("train --config nothing.yaml", "train: --config must be a YAML file of options; got"),
        ("train --config bad.yaml", "got '--optim.lx'; did you mean '--optim.lr'?"),
        ("train --config broken.yaml", "train: --config must be a YAML file of options; got"),
        ("train --config binary", "train: --config must be a text file; got"),
        ("train --data.path nothing", "data.path must be a file or a folder that exists; got noth"),
        ("train --data.path empty", "empty must not be empty; got 0 bytes"),
        ("train --data.path binary", "binary must be text; got a binary file"),
        ("train --resume nothing", "resume: RUN must hold run.json; got nothing"),
        ("train --resume", "run.dir must be given to resume"),
        ("finetune", "finetune: RUN must be a run or a Hugging Face directory; got nothing"),
        ("finetune nothing", "nothing must be a model directory; got no config.json"),
        ("finetune nothing --task paint", "finetune: task must be one of classify; got paint"),
        ("evaluate nothing", "nothing must be a model directory; got no config.json"),
        ("evaluate", "evaluate: "),
        ("generate nothing", "nothing must be a model directory; got no config.json"),
        ("generate RUN --temperature -1", "temperature must be a finite number >= 0; got -1.0"),
        ("generate RUN --max-new-tokens 99", "must take at most 32 positions; got 1 + 99"),
        ("generate RUN --top-p 2", "top_p must be in (0, 1] or None; got 2.0"),
        ("doctor --jsno", "doctor: "),
    ],
)  # fmt: skip
def test_mistake_is_answered_in_one_sentence(command, message, refused, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "bad.yaml").write_text("optim:\n  lx: 1\n")
    (tmp_path / "broken.yaml").write_text("optim: [1\n")
    before = sorted(tmp_path.rglob("*"))
    words = [str(tiny_run.run()) if word == "RUN" else word for word in command.split()]
    assert message in refused(*words)
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before and "cache" not in str(p)]
    assert left == []  # nothing half-written


@pytest.fixture
def damaged(tmp_path):
    """A copy of the run whose weights end too early."""
    run = shutil.copytree(tiny_run.run(), tmp_path / "damaged")
    for path in run.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    return str(run)


@pytest.mark.parametrize("verb", ["generate", "evaluate", "finetune"])
def test_truncated_weights_are_named(verb, damaged, refused):
    more = ["--data", str(tiny_run.labelled_csv())] if verb == "finetune" else []
    assert "model.safetensors must be a whole safetensors file" in refused(verb, damaged, *more)


def test_truncated_checkpoint_is_named(damaged, refused):
    assert "must hold a whole checkpoint" in refused("train", "--resume", damaged)


def test_finetune_names_the_line_of_a_bad_csv(refused, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nfine,x\n,y\n")
    message = refused("finetune", str(tiny_run.run()), "--data", "a.csv")
    assert message == "labelled data: a.csv, line 3: text must not be empty; got ''"


def test_full_disk_ends_a_run_with_code_one(text, refused, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if b"safetensors" in os.fsencode(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = refused("train", "--data.path", text, *SMALL, "--run.steps", "2", code=1)
    assert "No space left on device" in message
    assert not list((Path("runs") / "train-001").glob("checkpoint-*"))


def test_unforeseen_error_shows_its_traceback_on_request_only(refused, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr(verbs, "train", broken)
    assert refused("train", code=1) == "KeyError 'a bug'; PYFAST_DEBUG=1 shows where"
    monkeypatch.setenv("PYFAST_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_missing_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "pyfast.options", raising=False)
    message = refused("train", code=1)
    assert message == "jsonargparse must be installed; run: pip install 'pyfast-kernels[train]'"


def start(*arguments, **options):
    """The command as a process of its own; `pyfast` may be a checkout that is not installed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    command = [sys.executable, "-m", "pyfast", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_interrupted_training_says_how_to_go_on(text):
    run = start(
        "train", "--data.path", text, *SMALL, "--run.steps", "100000", "--run.log_every", "1"
    )
    err = ""
    for line in run.stderr:
        err += line
        if re.match(r"step [1-9]", line):
            run.send_signal(signal.SIGINT)
            break
    err += run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("pyfast: ") and "--resume runs/train-001" in last


def test_closed_pipe_ends_generate_quietly():
    run = start("generate", str(tiny_run.run()), "--seed", "0", stdout=subprocess.PIPE)
    run.stdout.close()
    assert run.communicate(timeout=60)[1].count("Traceback") == 0
    assert run.returncode == 141
