"""What a shell is told when it asks for the words that fit: files, folders, reason codes."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

VARIABLE = "_BNTOOL_COMPLETE"
"""Set by a script of `bntool completion` when it asks."""


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The shell's own completion of file names."""
    return [CompletionItem(incomplete, type="file")]


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The shell's own completion of folder names."""
    return [CompletionItem(incomplete, type="dir")]


def reason_codes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The codes that `bntool explain` knows."""
    from bntool.core.explanations import EXPLANATIONS

    return [
        CompletionItem(found.code, help=found.title)
        for found in EXPLANATIONS.values()
        if found.code.startswith(incomplete)
    ]
