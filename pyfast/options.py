"""Options of the command line, made from the configuration's dataclasses."""

import argparse
import dataclasses
import os
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from pyfast.train.classify import TASK_FILE
from pyfast.train.config import TrainConfig
from pyfast.train.directory import RUN_FILE, newest_run
from pyfast.usage import UsageError, in_our_words


class Options(ArgumentParser):
    """The options of one verb, from the command line and from `--config`; raises UsageError."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"pyfast {verb}", description=description, allow_abbrev=False)
        self.verb = verb
        self.add_argument("--config", action="config", help="a YAML file with these options")

    def add(self, key: str, kind: Any, default: Any, help: str) -> None:
        """One option; a tuple of words may be written a,b in a shell and as a list in YAML."""
        if typing.get_origin(kind) is tuple:
            kind, default = str | list[str], list(default)
        name = key if "." in key else key.replace("_", "-")
        self.add_argument(f"--{name}", type=kind, default=default, help=help)

    def add_settings(self, config: TrainConfig, *sections: str) -> None:
        """The fields of the named sections, with `config` as their defaults."""
        for name in sections:
            section = getattr(config, name)
            hints = typing.get_type_hints(type(section))
            for field in dataclasses.fields(section):
                default = getattr(section, field.name)
                self.add(f"{name}.{field.name}", hints[field.name], default, field.metadata["help"])

    def add_resume(self) -> None:
        """`--resume [RUN]`, which `stored_config` has read before."""
        help = "continue RUN (default: the newest) with the settings it began with"
        self.add_argument("--resume", type=str, nargs="?", metavar="RUN", const="", help=help)

    def read(self, arguments: Sequence[str]) -> Namespace:
        """The options' values, or UsageError."""
        try:
            return self.parse_args(list(arguments))
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.verb}: --config must be a text file; got {error}") from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by the parser instead of printing its usage and leaving."""
        known = [option for action in self._actions for option in action.option_strings]
        raise UsageError(f"{self.verb}: {in_our_words(self.verb, message, known)}")


def stored_config(name: str, arguments: Sequence[str]) -> tuple[TrainConfig | None, str | None]:
    """With `--resume [RUN]`: the configuration that run began with, and its directory."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const="")
    found = parser.parse_known_args(list(arguments))[0].resume
    if found is None:
        return None, None
    run_dir = found or str(newest_run(name))
    try:
        config = TrainConfig.load(os.path.join(run_dir, RUN_FILE))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"resume: RUN must hold {RUN_FILE}; got {run_dir}") from None
    verbs = {"train": "train", "classify": "finetune"}
    made_by = "classify" if os.path.exists(os.path.join(run_dir, TASK_FILE)) else "train"
    if made_by != name:
        rule, other = f"be one of pyfast {verbs[name]}", f"pyfast {verbs[made_by]}"
        raise UsageError(f"resume: RUN must {rule}; got {run_dir}; resume it by {other}")
    return config, run_dir


def section(options: Namespace, name: str) -> dict[str, Any]:
    """The values of one section."""
    values = dict(vars(getattr(options, name)))
    return values | ({"freeze": patterns(values["freeze"])} if "freeze" in values else {})


def patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """("a", "b") from "a,b" or a list."""
    words = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() for word in words if word.strip())
