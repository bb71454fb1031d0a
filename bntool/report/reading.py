"""Read the JSON documents of commands and side files. Anybody may have written them: nothing is trusted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bntool.core.documents import SCHEMA_VERSION
from bntool.core.errors import LoadError
from bntool.core.schema import Damaged, read, version_of
from bntool.core.text import visible
from bntool.report.shapes import require_report

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
        data = read(path)
    except FileNotFoundError as error:
        raise LoadError(f"no such file: {path}", next_step="bntool fold MODEL --json > FILE.json") from error
    except (OSError, Damaged) as error:
        raise _unreadable(path, f"cannot be read as JSON: {error}") from error
    document = as_document(data, path.name)
    try:
        require_report(document.command, document.data)
    except Damaged as error:
        raise _unreadable(path, f"is damaged: {error.why}", error.place) from error
    return document


def as_document(data: Any, name: str) -> Document:
    """`data` as a document; `LoadError` where it is none of bntool's."""
    version = version_of(data)
    if version is None:
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
    try:
        return Document(visible(name), visible(command), _visible(data))
    except RecursionError as error:
        raise _unreadable(name, "is nested too deep") from error


def _visible(data: Any) -> Any:
    """The same with every text in it made visible, so that whatever is drawn from it is harmless."""
    if isinstance(data, dict):
        return {visible(str(key)): _visible(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_visible(value) for value in data]
    return visible(data) if isinstance(data, str) else data


def _guessed(data: dict[str, Any]) -> str | None:
    for command, keys in _COMMANDS.items():
        if any(key in data for key in keys):
            return command
    return "command" if isinstance(data.get("error"), dict) else None


def damaged(name: str, error: Exception) -> LoadError:
    """The error for a document whose parts are not what their names promise."""
    return _unreadable(name, f"is damaged: {type(error).__name__}: {error}")


def _unreadable(name: str | Path, what: str, place: str = "") -> LoadError:
    return LoadError(
        f"{Path(name).name} {what}",
        where=f"{name}, {place}" if place else str(name),
        next_step="name a document that bntool wrote: --json, a .bntool.json file, or compare.json",
    )
