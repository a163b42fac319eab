"""Settings that check themselves: frozen dataclasses, with help and limits beside each default."""

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any, Literal


def option(default: Any, help: str, **limits: float) -> Any:
    """A field with its help text and limits: `above`, `at_least`, `below`, `at_most`."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of settings that checks its own types and limits when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{self._prefix()}{field.name}"
            value = _parse(where, getattr(self, field.name), hints[field.name])
            _check_limits(where, value, field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def _prefix(cls) -> str:
        return cls.__name__.removesuffix("Config").lower() + "."

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Section":
        """The inverse of `to_dict`; a key that does not exist is a ValueError."""
        name = cls._prefix().rstrip(".") or "config"
        if not isinstance(values, dict):
            raise TypeError(f"train: {name} must be a table of settings; got {values!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                keys = ", ".join(sorted(known))
                raise ValueError(f"train: {name} must have keys among {keys}; got {key!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; sections nest as dictionaries."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _parse(where: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type (an int is a float, a list is a tuple), or a TypeError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse(where, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"train: {where} must be one of {', '.join(arguments)}; got {value!r}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_parse(where, item, arguments[0]) for item in value)
        raise TypeError(f"train: {where} must be a list; got {value!r}")
    if issubclass(hint, Section) and not isinstance(value, hint):
        return hint.from_dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"train: {where} must be {_article(hint.__name__)}; got {value!r}")
    return value


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _check_limits(where: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    """ValueError unless `value` is finite and inside the limits written beside its default."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    rules = [
        ("above", "above", lambda limit: value > limit),
        ("at_least", "at least", lambda limit: value >= limit),
        ("below", "below", lambda limit: value < limit),
        ("at_most", "at most", lambda limit: value <= limit),
    ]
    for key, words, holds in rules:
        if key in limits and not holds(limits[key]):
            raise ValueError(f"train: {where} must be {words} {limits[key]}; got {value}")
    if not math.isfinite(value):
        raise ValueError(f"train: {where} must be finite; got {value}")
