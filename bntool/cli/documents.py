"""With `--json`, stdout holds one document and nothing else, whatever a model's own code prints."""

from __future__ import annotations

import json
from typing import Any

from bntool.cli.streams import say_result
from bntool.errors import BntoolError
from bntool.text import Lines

SCHEMA_VERSION = 1


def emit(document: dict[str, Any]) -> None:
    """Print the document of a command."""
    whole = {"schema_version": SCHEMA_VERSION, **document}
    say_result(Lines(json.dumps(whole, indent=1)))


def emit_error(status: str, error: dict[str, str]) -> None:
    """Print the document of a command that failed before it had anything to tell."""
    emit({"status": status, "error": error})


def failure(error: BntoolError) -> dict[str, Any]:
    """The part of a document that says what failed."""
    return {"status": error.status, "error": error.to_dict()}
