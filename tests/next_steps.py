"""Whether what an error tells to do next can be typed: click parses it, and one of each wording is run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
import warnings
from pathlib import Path

import click

from bntool.cli import cli, run
from bntool.core.errors import BntoolError

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


_NEVER = {"--trust-pickle", "--pretrained", "--download", "--help", "-h", "--version"}
"""Not typed by a test: what runs a stranger's code, what needs the network, and what always works."""
_SECONDS = 4.0
"""As long as the end of a session may take."""


class Typed:
    """Next steps that are commands, or options for the command that failed: one of each wording."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[Path, str, list[str], str]] = {}

    def remember(self, error: BntoolError, command: str, argv: list[str]) -> None:
        """Keep a step that can be typed as it stands, with the folder in which it was told."""
        wording = re.sub(r"[\w./-]*[./:\d][\w./:-]*", "_", error.next_step)
        words = self._words(error.next_step, command, argv)
        if words and not _NEVER & set(words) and _parses(words):
            self.steps.setdefault(wording, (Path.cwd(), error.what, words, error.next_step))

    def _words(self, text: str, command: str, argv: list[str]) -> list[str]:
        named = commands_in(text)
        if named:
            words = named[0]
        else:
            options = _options_in(text, command)
            words = [*_without(argv, options, command), *options] if options and argv else []
        return [] if any(_PLACEHOLDER.fullmatch(word) for word in words) else words

    def loops(self) -> list[str]:
        """Those that led to the same error again, or that click refused."""
        wrong, end = [], time.monotonic() + _SECONDS
        for folder, what, words, text in self.steps.values():
            if time.monotonic() > end:
                break
            said = _said(folder, words) if folder.is_dir() else ""
            if f"error: {what}" in said or "no such option" in said.lower():
                wrong.append(f"next: {text}\n  bntool {' '.join(words)} in {folder}\n  {said}")
        return wrong


def _parses(words: list[str]) -> bool:
    """Whether click takes the words: what stands behind an option in a sentence need not be its value."""
    one = command_named(words[0]) if words else None
    try:
        if one is not None:
            with one.make_context(words[0], words[1:], parent=_root()):
                pass
    except click.ClickException:
        return False
    return one is not None


def _options_in(text: str, command: str) -> list[str]:
    """The first options that a text names, with their values."""
    options = {flag: one for flag, one in options_of(command).items() if flag.startswith("-")}
    found: list[str] = []
    words = text.split()
    begin = next((n for n, word in enumerate(words) if word.rstrip(",;:)") in options), len(words))
    wants = False
    for word in words[begin:]:
        bare = word.strip("`'").rstrip(",;:)`'")
        one = options.get(bare)
        if not wants and one is None:
            break
        found.append(bare)
        wants = not wants and isinstance(one, click.Option) and not one.is_flag
        if bare != word:
            break
    return [] if wants else found


def _without(argv: list[str], chosen: list[str], command: str) -> list[str]:
    """The words of a command without the options that are chosen anew."""
    options, kept, skip = options_of(command), list[str](), False
    for word in argv:
        one = options.get(word)
        anew = one is not None and any(options.get(flag) is one for flag in chosen)
        if not (skip or anew):
            kept.append(word)
        skip = anew and isinstance(one, click.Option) and not one.is_flag
    return kept


def _said(folder: Path, words: list[str]) -> str:
    out = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(words)
    finally:
        os.chdir(before)
    return out.getvalue()
