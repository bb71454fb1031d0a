"""Options of the command line, made from the option classes; and what a command is given of them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click

from bntool.cli.completing import files, folders, reason_codes
from bntool.cli.session import Voice
from bntool.core.errors import UsageError
from bntool.core.option import Option, Options

Command = Callable[..., int]
_COMPLETE = {"file": files, "folder": folders, "reason": reason_codes}


def takes_all(asked: type, without: Sequence[str] = (), **meanings: str) -> Callable[[Command], Command]:
    """The same for many: the command is given its voice and one object of `asked`, whose fields are options.

    Those `without` which it does keep their defaults.
    """
    classes = [
        some(cls, *(name for name in _names_of(cls) if name not in without))
        for cls in typing.get_type_hints(asked).values()
    ]
    names = [field.name for field in dataclasses.fields(asked)]

    def decorate(function: Command) -> Command:
        def command(voice: Voice, **made: Options) -> int:
            return function(voice, asked(**dict(zip(names, made.values(), strict=True))))

        command.__doc__ = function.__doc__
        return takes(*classes, **meanings)(command)

    return decorate


@dataclasses.dataclass(frozen=True)
class Some:
    """Of an option class only these options; the others keep their defaults."""

    cls: type[Options]
    names: tuple[str, ...]


def some(cls: type[Options], *names: str) -> Some:
    """The options `names` of `cls`, for a command that does not take the others."""
    return Some(cls, names)


def takes(
    *classes: type[Options] | Some, required: Sequence[str] = (), **meanings: str
) -> Callable[[Command], Command]:
    """Options of these classes: the command is given its voice, and an object of each, named like its class.

    It is given those that its parameters name. `required` names options that this command alone cannot do
    without; `meanings` are texts for the help of this command alone, by the option's name.
    """
    asked = [one if isinstance(one, Some) else some(one, *_names_of(one)) for one in classes]

    def decorate(function: Command) -> Command:
        wanted = inspect.signature(function).parameters
        all_of_them = any(one.kind is one.VAR_KEYWORD for one in wanted.values())

        def command(**given: Any) -> int:
            made = {_word(part.cls): _made(part, given) for part in asked}
            for options in made.values():
                options.validate()
            voice = Voice.of(*made.values())
            return function(
                **{
                    word: one
                    for word, one in {"voice": voice, **made}.items()
                    if all_of_them or word in wanted
                }
            )

        command.__doc__ = function.__doc__
        command.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        for part in reversed(asked):
            for one in reversed(part.cls.options()):
                if one.name in part.names:
                    must = one.spec.required or one.name in required
                    command = _click_option(one, meanings.get(one.name), must)(command)
        return command

    return decorate


def _names_of(cls: type[Options]) -> tuple[str, ...]:
    return tuple(one.name for one in cls.options())


def _made(part: Some, given: dict[str, Any]) -> Options:
    """The part's options, taken from what click gives the command."""
    values = {one.name: given[one.name] for one in part.cls.options() if one.name in part.names}
    # No value of an option that may be given several times is its default.
    left_out = {one.name for one in part.cls.options() if one.many and not values.get(one.name)}
    return part.cls(**{name: value for name, value in values.items() if name not in left_out})


def chosen(*asked: Options) -> dict[str, Option]:
    """What was asked for besides the defaults, by the long form of its flag."""
    return {one.flag: one for options in asked for one in options.chosen().values()}


def not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An empty name is a shell variable that was never set, not a name left out."""
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty", ctx, param)
    if value is not None and "\0" in value:
        raise click.BadParameter("it holds a zero byte", ctx, param)
    return value


def _word(cls: type[Options]) -> str:
    return cls.__name__.removesuffix("Options").lower()


def _click_option(one: Option, meaning: str | None, required: bool) -> Callable[[Command], Command]:
    spec = one.spec
    about: dict[str, Any] = {"required": required, "callback": _callback(one)}
    about["type"] = click.Choice(one.choices) if one.choices else str if spec.parse else one.kind
    if spec.names:
        about["shell_complete"] = _COMPLETE[spec.names]
    if spec.argument:
        return _click_argument(one, about)
    about["help"] = spec.help if meaning is None else meaning
    if one.kind is bool and one.default is None:
        return click.option(*one.flags, one.name, default=None, help=about["help"])
    if one.kind is bool:
        # `--no-merge` turns off what is on.
        value = not one.default
        about |= {"is_flag": True, "flag_value": value, "type": None, "callback": None}
        return click.option(*one.flags, one.name, default=one.default, **about)
    about["metavar"] = spec.metavar or None
    if one.many and spec.parse is None:
        return click.option(*one.flags, one.name, multiple=True, **about)
    if one.default is not None and not required:
        told = ",".join(map(str, one.default)) if one.many else one.default
        if told != "":
            about |= {"default": told, "show_default": spec.show_default}
    return click.option(*one.flags, one.name, **about)


def _click_argument(one: Option, about: dict[str, Any]) -> Callable[[Command], Command]:
    named = one.name.upper() if about["required"] else f"[{one.name.upper()}]"
    # The choices that there are say more than a name does.
    metavar = one.spec.metavar or (None if one.choices else named)
    return click.argument(one.name, nargs=-1 if one.many else 1, metavar=metavar, **about)


def _callback(one: Option) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def checked(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and one.spec.names:
                not_empty(ctx, param, text)
        parse = one.spec.parse
        try:
            parsed = parse(value) if parse is not None and isinstance(value, str) else value
            one.require(one.default if parsed is None or parsed == () else parsed)
        except UsageError as error:
            raise click.BadParameter(error.what, ctx, param) from error
        return parsed

    return checked
