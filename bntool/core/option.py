"""One option: its meaning, default, bounds and how the command line takes it, at a field of a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from bntool.core.errors import UsageError

_KEY = "option"
Chosen = TypeVar("Chosen", bound="Options")
_known: dict[type, tuple[Option, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of an option besides its type and its default."""

    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    least: float | None = None
    most: float | None = None
    parse: Callable[[str], Any] | None = None
    argument: bool = False
    required: bool = False
    names: Literal["", "file", "folder", "reason"] = ""
    written: bool = False
    show_default: bool = True


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of an option class, as the command line and a validation need it."""

    name: str
    kind: type
    choices: tuple[str, ...]
    many: bool
    default: Any
    spec: Spec

    @property
    def flags(self) -> tuple[str, ...]:
        """`--name`, or `--no-name` for what is on unless it is turned off."""
        off = "no-" if self.kind is bool and self.default is True else ""
        return self.spec.flags or (f"--{off}{self.name.replace('_', '-')}",)

    @property
    def flag(self) -> str:
        """The long form, by which errors name it."""
        return self.flags[-1].partition("/")[0]

    def require(self, value: Any) -> None:
        """Raise `UsageError` where `value` is none that the option takes."""
        if value is None and self.default is None:
            return
        if self.many and isinstance(value, str):
            raise UsageError(f"{self.name} is a tuple of names, not one string")
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{self.name} is {' or '.join(map(repr, self.choices))}, not {value!r}",
                next_step=f"use one of {', '.join(self.choices)}",
            )
        words = self.flag.removeprefix("--").replace("-", " ")
        least, most = self.spec.least, self.spec.most
        for number in value if self.many else (value,):
            low = least is not None and not number >= least
            if low or (most is not None and not number <= most):
                bounds = f"at least {_told(least)}"
                if most is not None:
                    bounds = f"from {_told(least)} to {_told(most)}"
                raise UsageError(
                    f"{words} is {number!r}, and must be {bounds}", next_step=f"give another {self.flag}"
                )


def _told(bound: float | None) -> str:
    """A bound so that it can be typed: a whole number to its last digit."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def option(
    default: Any,
    help: str,  # noqa: A002 - the field's own word
    *flags: str,
    **spec: Any,
) -> Any:
    """A field of an option class, with its default and its meaning; `flags` where they differ from the name.

    Of `spec`: `metavar`; the bounds `least` and `most`; `parse`, from text; `argument`, of no flag;
    `required`; whether it `names` a "file", a "folder" or a "reason" (a code), and whether that one is
    `written`; `show_default`.
    """
    metadata = {_KEY: Spec(help, flags, **spec)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """A dataclass whose fields are options; others are for bntool itself."""

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Its options in their order."""
        if cls not in _known:
            _known[cls] = _options_of(cls)
        return _known[cls]

    @classmethod
    def of(cls: type[Chosen], given: Mapping[str, Any]) -> Chosen:
        """An object from names and values; `UsageError` for a name or a value that the class has not."""
        known = [one.name for one in cls.options()]
        for name in given:
            if name not in known:
                raise UsageError(f"there is no option {name!r}", next_step=f"there are {', '.join(known)}")
        made = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
        made.validate()
        return made

    def require_together(self) -> None:
        """Raise `UsageError` for options that do not go together, once the kind of model knows each."""

    def validate(self) -> None:
        """Raise `UsageError` for a value out of its bounds, or two that exclude each other."""
        for one in self.options():
            one.require(getattr(self, one.name))

    def chosen(self) -> Mapping[str, Option]:
        """The options that have another value than their default, by name."""
        return {one.name: one for one in self.options() if getattr(self, one.name) != one.default}

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data; tuples become lists."""
        values = {one.name: getattr(self, one.name) for one in self.options()}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _options_of(cls: type[Options]) -> tuple[Option, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        _option(field, hints[field.name]) for field in dataclasses.fields(cls) if _KEY in field.metadata
    )


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    spec: Spec = field.metadata[_KEY]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (part for part in arguments if part is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    many = origin is tuple
    if many:
        hint = arguments[0]
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    choices = tuple(a for a in arguments if a) if origin is Literal else ()
    kind = str if choices or origin is not None else hint
    return Option(field.name, kind, choices, many, field.default, spec)
