"""The `pyfast` command: words from a terminal or a YAML file become calls of `pyfast.verbs`.

What a user gets wrong is answered with one sentence on standard error and exit code 2, what fails
in a run with exit code 1, Ctrl-C with 130. PYFAST_DEBUG=1 shows the traceback instead.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

import pyfast
from pyfast.usage import UsageError, hint, in_our_words

USAGE = """usage: pyfast VERB [options]

  train      train a language model from scratch on text
  finetune   teach a trained model to classify: pyfast finetune RUN --data FILE.csv
  evaluate   measure a run on data it has not learnt from
  generate   continue a prompt
  tune       measure which kernels are the quickest on this GPU
  doctor     say what is installed, and which backend runs each operation

pyfast VERB --help lists the options of a verb; pyfast --version prints the version.
"""
_RUN = "a run, or a local Hugging Face directory with a GPT-2 or Llama"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PYFAST_DEBUG") == "1":
            raise
        return _explain(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        print(f"pyfast {pyfast.__version__}")
        return 0
    if verb not in _VERBS:
        names = ", ".join(_VERBS)
        raise UsageError(f"verb must be one of {names}; got {verb!r}{hint(verb, list(_VERBS))}")
    return _VERBS[verb](rest) or 0


def _explain(error: BaseException) -> int:
    """Say in one sentence what happened; returns the exit code."""
    code, words = 1, " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has gone: nothing to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, KeyboardInterrupt):
        code, words = 130, words or "interrupted"
    elif isinstance(error, ModuleNotFoundError):
        words = f"{error.name} must be installed; run: pip install 'pyfast-kernels[train]'"
    elif isinstance(error, (ValueError, TypeError, FileNotFoundError, IsADirectoryError)):
        code = 2
    elif not isinstance(error, (RuntimeError, OSError)):
        words = f"{type(error).__name__} {words}; PYFAST_DEBUG=1 shows where".replace("  ", " ")
    print(f"pyfast: {words}", file=sys.stderr)
    return code


def _train(arguments: list[str]) -> None:
    from pyfast import verbs
    from pyfast.options import Options, section, stored_config
    from pyfast.train.config import TrainConfig

    stored, resume = stored_config("train", arguments)
    parser = Options("train", "Train a language model from scratch on text.")
    parser.add_resume()
    parser.add_settings(stored or TrainConfig(), "data", "model", "optim", "run")
    options = parser.read(arguments)
    values = {name: section(options, name) for name in ("data", "model", "optim", "run")}
    if resume is not None:
        values["run"] |= {"resume": True, "dir": resume}
    verbs.train(TrainConfig.from_dict(values))


def _finetune(arguments: list[str]) -> None:
    from pyfast import verbs
    from pyfast.options import Options, patterns, section, stored_config
    from pyfast.train.classify import DEFAULTS
    from pyfast.train.config import TrainConfig

    stored, resume = stored_config("classify", arguments)
    config = stored or DEFAULTS
    parser = Options("finetune", "Teach a trained model to classify texts.")
    start = config.model.init_from
    parser.add_argument("source", type=str, nargs="?", metavar="RUN", default=start, help=_RUN)
    parser.add("task", Literal["classify"], "classify", "what to learn")
    data = (
        "labelled texts: a .csv file with columns text and label, a folder with one sub-folder per "
        'label, or "stdlib": which package of the standard library a snippet comes from'
    )
    parser.add("data", str, config.data.path, data)
    share = "share of the texts kept for validation, and as much again for the test"
    parser.add("val_fraction", float, config.data.val_fraction, share)
    freeze = "parameters that do not learn: name patterns, or all_but_head"
    parser.add("freeze", tuple[str, ...], config.model.freeze, freeze)
    scratch = "take only the sizes and the tokenizer of RUN, not its weights, to compare with"
    parser.add_argument("--from-scratch", action="store_true", help=scratch)
    parser.add_resume()
    parser.add_settings(config, "optim", "run")
    options = parser.read(arguments)
    if options.source is None:
        raise UsageError("finetune: RUN must be a run or a Hugging Face directory; got nothing")
    values = config.to_dict() | {name: section(options, name) for name in ("optim", "run")}
    values["data"] |= {"path": options.data, "val_fraction": options.val_fraction}
    values["model"] |= {"init_from": options.source, "freeze": patterns(options.freeze)}
    if resume is not None:
        values["run"] |= {"resume": True, "dir": resume}
    verbs.finetune(TrainConfig.from_dict(values), from_scratch=options.from_scratch)


def _evaluate(arguments: list[str]) -> None:
    from pyfast import verbs
    from pyfast.options import Options

    parser = Options("evaluate", "Measure a run on data it has not learnt from.")
    parser.add_argument("source", type=str, metavar="RUN", help=_RUN)
    parser.add("data", str | None, None, "other data than what the run itself kept aside")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.read(arguments)
    verbs.evaluate(options.source, data=options.data, as_json=options.json)


def _generate(arguments: list[str]) -> None:
    from pyfast import verbs
    from pyfast.options import Options

    parser = Options("generate", "Continue a prompt with what the model finds likely.")
    parser.add_argument("source", type=str, metavar="RUN", help=_RUN)
    parser.add("prompt", str, "", "the text to continue; - reads it from standard input")
    room = "how much to write (default: 200, or what fits into the model's context)"
    parser.add("max_new_tokens", int | None, None, room)
    parser.add("temperature", float, 0.8, "0 always takes the likeliest token")
    parser.add("top_k", int | None, None, "sample among this many likeliest tokens")
    parser.add("top_p", float | None, None, "sample among the likeliest tokens of this mass")
    parser.add("seed", int | None, None, "the same seed gives the same text")
    settings = dict(vars(parser.read(arguments)))
    settings.pop("config")
    verbs.generate(settings.pop("source"), settings.pop("prompt"), **settings)


class _Parser(argparse.ArgumentParser):
    """The options of a verb that must also work without the train extra."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(prog=f"pyfast {verb}", description=description, allow_abbrev=False)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        raise UsageError(f"{self.verb}: {in_our_words(self.verb, message, known)}")


def _tune(arguments: list[str]) -> int:
    from pyfast import tune

    parser = _Parser("tune", tune.__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=tune.DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 2048, 4096])
    parser.add_argument("--classes", type=int, default=50304)
    return tune.main(**vars(parser.parse_args(arguments)))


def _doctor(arguments: list[str]) -> int:
    from pyfast import doctor

    parser = _Parser("doctor", None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a page")
    return doctor.main(as_json=parser.parse_args(arguments).json)


_VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "generate": _generate,
    "tune": _tune,
    "doctor": _doctor,
}
