"""Options of the command line, made from the configuration's dataclasses, and their errors."""

import argparse
import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from pyfast.train.config import TrainConfig
from pyfast.train.directory import RUN_FILE, newest_run

_TYPES = {"float": "a number", "int": "an integer", "str": "a word", "bool": "true or false"}


class UsageError(ValueError):
    """The command line or the configuration file does not say something that can be done."""


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
        raise UsageError(f"{self.verb}: {_in_our_words(self.verb, message, known)}")


def stored_config(name: str, arguments: Sequence[str]) -> tuple[TrainConfig | None, str | None]:
    """With `--resume [RUN]`: the configuration that run began with, and its directory."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const="")
    found = parser.parse_known_args(list(arguments))[0].resume
    if found is None:
        return None, None
    run_dir = found or str(newest_run(name))
    try:
        return TrainConfig.load(os.path.join(run_dir, RUN_FILE)), run_dir
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"resume: RUN must hold {RUN_FILE}; got {run_dir}") from None


def section(options: Namespace, name: str) -> dict[str, Any]:
    """The values of one section."""
    values = dict(vars(getattr(options, name)))
    return values | ({"freeze": patterns(values["freeze"])} if "freeze" in values else {})


def patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """("a", "b") from "a,b" or a list."""
    words = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() for word in words if word.strip())


def hint(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" if something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _in_our_words(verb: str, message: str, known: Sequence[str]) -> str:
    """The parser's message as `<option> must <rule>; got <value>`."""
    words = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: (\S+)|Option '([^']*)' is not accepted", words)
    if unknown:
        word = unknown[1] or "--" + unknown[2]
        close = hint(word.split("=")[0], known)
        return f"options must be among those of pyfast {verb} --help; got {word!r}{close}"
    value = re.search(r'Parser key "([^"]+)": (.*?)\.? (?:Got|Given) value: (.*)', words)
    if value:
        return f"{value[1]} must be {_rule(value[2])}; got {value[3]}"
    file = re.search(r'Parser key "config": (.*)|Problems parsing (config.*)|(Unexpected.*)', words)
    if file:
        return f"--config must be a YAML file of options; got {file[1] or file[2] or file[3]}"
    return words


def _rule(words: str) -> str:
    """`Expected a <class 'float'>` and its like as `a number`."""
    choices = re.search(r"Literal\[(.*?)\]", words)
    if choices:
        return "one of " + choices[1].replace("'", "")
    subtypes = re.search(r"Subtypes: \[(.*?)\]", words)
    names = dict.fromkeys(re.findall(r"<class '(\w+)'>", subtypes[1] if subtypes else words))
    return " or ".join(_TYPES.get(name, "null") for name in names) or words
