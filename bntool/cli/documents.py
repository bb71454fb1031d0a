"""With `--json`, stdout holds one document and nothing else, whatever a model's own code prints."""

from __future__ import annotations

import contextlib
import contextvars
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

from bntool.errors import BntoolError

SCHEMA_VERSION = 1
_stdout: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("stdout", default=None)


@contextlib.contextmanager
def stdout_kept_for_documents() -> Iterator[None]:
    """Meanwhile, whatever is printed goes to stderr; only `emit` reaches stdout."""
    token = _stdout.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def emit(document: dict[str, Any]) -> None:
    """Print the document of a command."""
    whole = {"schema_version": SCHEMA_VERSION, **document}
    click.echo(json.dumps(whole, indent=1), file=_stdout.get())


def emit_error(status: str, error: dict[str, str]) -> None:
    """Print the document of a command that failed before it had anything to tell."""
    emit({"status": status, "error": error})


def failure(error: BntoolError) -> dict[str, Any]:
    """The part of a document that says what failed."""
    return {"status": error.status, "error": error.to_dict()}
