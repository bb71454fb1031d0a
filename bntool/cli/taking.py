"""Options of the command line, made from the option classes; and what a command is given of them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click

from bntool.cli.completing import files, folders
from bntool.cli.session import Voice
from bntool.core.option import Option, Options
from bntool.errors import UsageError

Command = Callable[..., int]
_COMPLETE = {"file": files, "folder": folders}


def takes_all(asked: type, **meanings: str) -> Callable[[Command], Command]:
    """The same for many: the command is given its voice and one object of `asked`, whose fields are options."""
    classes = tuple(typing.get_type_hints(asked).values())
    names = [field.name for field in dataclasses.fields(asked)]

    def decorate(function: Command) -> Command:
        def command(voice: Voice, **made: Options) -> int:
            return function(voice, asked(**dict(zip(names, made.values(), strict=True))))

        command.__doc__ = function.__doc__
        return takes(*classes, **meanings)(command)

    return decorate


def takes(*classes: type[Options], **meanings: str) -> Callable[[Command], Command]:
    """Options of these classes: the command is given its voice, and an object of each, named like its class.

    `meanings` are texts for the help of this command alone, by the option's name.
    """

    def decorate(function: Command) -> Command:
        def command(**given: Any) -> int:
            made: dict[str, Options] = {}
            for cls in classes:
                values = {one.name: given.pop(one.name) for one in cls.options()}
                # No value of an option that may be given several times is its default.
                chosen = {one.name: values[one.name] or one.default for one in cls.options() if one.many}
                made[_word(cls)] = cls(**{**values, **chosen})
            for asked in made.values():
                asked.validate()
            return function(Voice.of(*made.values()), **made)

        command.__doc__ = function.__doc__
        command.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        for cls in reversed(classes):
            for one in reversed(cls.options()):
                command = _click_option(one, meanings.get(one.name))(command)
        return command

    return decorate


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


def _click_option(one: Option, meaning: str | None) -> Callable[[Command], Command]:
    spec = one.spec
    if spec.argument:
        name = one.name.upper() if spec.required else f"[{one.name.upper()}]"
        return click.argument(
            one.name, required=spec.required, metavar=name, callback=not_empty, shell_complete=files
        )
    about: dict[str, Any] = {"help": meaning or spec.help, "required": spec.required}
    if one.kind is bool:
        # `--no-merge` turns off what is on.
        value = not one.default
        return click.option(
            *one.flags, one.name, is_flag=True, flag_value=value, default=one.default, **about
        )
    about["metavar"] = spec.metavar or None
    about["callback"] = _callback(one)
    about["type"] = click.Choice(one.choices) if one.choices else str if spec.parse else one.kind
    if spec.names:
        about["shell_complete"] = _COMPLETE[spec.names]
    if one.many and spec.parse is None:
        return click.option(*one.flags, one.name, multiple=True, **about)
    if one.default is not None:
        told = ",".join(map(str, one.default)) if one.many else one.default
        if told != "":
            about |= {"default": told, "show_default": spec.show_default}
    return click.option(*one.flags, one.name, **about)


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
