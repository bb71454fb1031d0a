"""Whether what an error tells to do next can be typed: its commands and options are parsed by click."""

from __future__ import annotations

import re

import click

from bntool.cli import cli

_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(?:\.\w+)?|\.\.\.|…")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def command_named(name: str) -> click.Command | None:
    return cli.get_command(_root(), name)


def _root() -> click.Context:
    # A command keeps the help option that the first context asks it for.
    return click.Context(cli, info_name="bntool", **cli.context_settings)


def options_of(name: str) -> dict[str, click.Parameter]:
    command = command_named(name)
    own = {"-h": None, "--help": None, "--version": None}
    if command is None:
        return own  # type: ignore[return-value]
    return {**own, **{flag: one for one in command.params for flag in (*one.opts, *one.secondary_opts)}}


def commands_in(text: str) -> list[list[str]]:
    """The words of every command line in a text: up to the first that is neither an option nor a name."""
    found = []
    for match in re.finditer(r"\bbntool ([a-z-]+)(?= |$|[,;.`:)])", text):
        if command_named(match[1]) is None:
            continue
        words, options, wants = [match[1]], options_of(match[1]), False
        for word in text[match.end() :].replace("`", " ` ").split():
            bare = word.rstrip(",;:)`")
            if word == "`":
                break
            one = options.get(bare)
            is_name = bool(re.search(r"[./:_\d]|^[A-Z]+$", bare)) and not bare.startswith("-")
            if not (wants or is_name or bare.startswith("-")):
                break
            words.append(bare)
            wants = isinstance(one, click.Option) and not one.is_flag
            if bare != word:
                break
        found.append(words)
    return found


def faults(text: str, command: str) -> list[str]:
    """What in a next step of `command` could not be typed."""
    wrong = []
    named = commands_in(text)
    # What inspect finds out is for whoever wants to load the file afterwards.
    about = {"inspect": "fold"}.get(command, command)
    known = {flag for words in named for flag in options_of(words[0])} | set(options_of(about))
    unknown = [flag for flag in _OPTION.findall(_without_others(text)) if flag not in known]
    wrong += [f"{flag} is no option of {command or 'bntool'}" for flag in unknown]
    for words in named:
        one = command_named(words[0])
        assert one is not None
        if any(_PLACEHOLDER.fullmatch(word) for word in words[1:]) or "--help" in words:
            continue
        try:
            with one.make_context(words[0], words[1:], parent=_root()):
                pass
        except click.ClickException as error:
            wrong.append(f"bntool {' '.join(words)}: {error.format_message()}")
    return wrong


def _without_others(text: str) -> str:
    """Without the command lines of other programs."""
    return re.sub(r"\b(?:pip|torchrun|python|mkdir|rm|sphinx|CUDA_VISIBLE_DEVICES)\b[^,;]*", "", text)
