"""Read the JSON documents of commands and side files. Anybody may have written them: nothing is trusted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bntool.errors import LoadError
from bntool.files.regular import read_text

SCHEMA_VERSION = 1
_COMMANDS = {
    # command -> keys of which one tells it, where a document does not name its command
    "compare": ("arms",),
    "fold": ("bn_folded",),
    "summary": ("totals",),
    "insert": ("sites",),
    "bench": ("latency",),
    "verify": ("checks",),
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: the file's name, the command that made it, and what it holds."""

    name: str
    command: str
    data: dict[str, Any]


def read_document(path: str | Path) -> Document:
    """The document in a file; `LoadError` for one that is damaged, foreign or of a newer schema."""
    path = Path(path)
    try:
        # a number that is none is no JSON either, and a browser would refuse the whole page for it
        data = json.loads(read_text(path), parse_constant=lambda _: None)
    except LoadError as error:
        error.next_step = "bntool fold MODEL --json > FILE.json"
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"cannot be read as JSON: {error}") from error
    return as_document(data, path.name)


def as_document(data: Any, name: str) -> Document:
    """`data` as a document; `LoadError` where it is none of bntool's."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise _unreadable(name, "is not a document of bntool (it has no schema_version)")
    if version > SCHEMA_VERSION:
        raise LoadError(
            f"{name} has schema version {version}; this bntool reads up to {SCHEMA_VERSION}",
            where=name,
            next_step="pip install --upgrade bntool",
        )
    command = data.get("command") or data.get("action") or _guessed(data)
    if not isinstance(command, str):
        raise _unreadable(name, "tells nothing that a report could show")
    return Document(name, command, data)


def _guessed(data: dict[str, Any]) -> str | None:
    for command, keys in _COMMANDS.items():
        if any(key in data for key in keys):
            return command
    return "command" if isinstance(data.get("error"), dict) else None


def damaged(name: str, error: Exception) -> LoadError:
    """The error for a document whose parts are not what their names promise."""
    return _unreadable(name, f"is damaged: {type(error).__name__}: {error}")


def _unreadable(name: str | Path, what: str) -> LoadError:
    return LoadError(
        f"{Path(name).name} {what}",
        where=str(name),
        next_step="name a document that bntool wrote: --json, a .bntool.json file, or compare.json",
    )
