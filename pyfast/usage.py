"""What is wrong with a command line, in the house form: for every parser, whatever it stands on."""

import difflib
import re
from collections.abc import Sequence

_TYPES = {"float": "a number", "int": "an integer", "str": "a word", "bool": "true or false"}


class UsageError(ValueError):
    """The command line or the configuration file does not say something that can be done."""


def hint(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" if something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def in_our_words(verb: str, message: str, known: Sequence[str]) -> str:
    """The parser's message as `<option> must <rule>; got <value>`; `known` are the options."""
    words = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: (\S+)|Option '([^']*)' is not accepted", words)
    if unknown:
        word = unknown[1] or "--" + unknown[2]
        close = hint(word.split("=")[0], known)
        return f"options must be among those of pyfast {verb} --help; got {word!r}{close}"
    missing = re.search(r"arguments are required: (\w+)", words)
    if missing:
        return f"{'RUN' if missing[1] == 'source' else missing[1]} must be given; got nothing"
    bare = re.search(r"argument (\S+): expected (one|at least one) argument", words)
    if bare:
        return f"{bare[1]} must be followed by {bare[2]} value; got nothing"
    choice = re.search(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", words)
    if choice:
        return f"{choice[1]} must be one of {choice[3].replace(chr(39), '')}; got {choice[2]}"
    value = re.search(r'Parser key "([^"]+)": (.*?)\.? (?:Got|Given) value: (.*)', words)
    if value:
        return f"{value[1]} must be {_rule(value[2])}; got {value[3]}"
    file = re.search(r'Parser key "config": (.*)|Problems parsing (config.*)|(Unexpected.*)', words)
    if file:
        got = (file[1] or file[2] or file[3]).removeprefix("Unexpected config: ")
        got = "an empty file" if got == "Unexpected config:" else got
        return f"--config must be a YAML file of options; got {got}"
    return words


def _rule(words: str) -> str:
    """`Expected a <class 'float'>` and its like as `a number`."""
    choices = re.search(r"Literal\[(.*?)\]", words)
    if choices:
        return "one of " + choices[1].replace("'", "")
    subtypes = re.search(r"Subtypes: \[(.*?)\]", words)
    names = dict.fromkeys(re.findall(r"<class '(\w+)'>", subtypes[1] if subtypes else words))
    return " or ".join(_TYPES.get(name, "null") for name in names) or words
