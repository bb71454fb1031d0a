"""Writing a single file whole or not at all, and the hash of a file. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from bntool.files.targets import Target

_BLOCK = 1 << 20


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes as hex, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(
    output: str | Path,
    write: Callable[[Path], object],
    *,
    force: bool = False,
    forbid: Iterable[str | Path] = (),
) -> None:
    """Have `write` fill a draft in a folder beside `output`, then move it into place.

    `output` is either the old file or the whole new one at every moment, after a crash too, and keeps the
    permissions of the file it replaces. A link's target is replaced, not the link. Raises `UsageError` if
    `output` exists without `force`, is one of `forbid` (the inputs), or cannot be written.
    """
    target = Target(force=force, reads=forbid)
    path = target.claim(output)
    with target.drafts() as drafts:
        write(drafts.of(path))


def write_text(path: Path, text: str) -> None:
    """Fill a draft with a text as UTF-8, with the same line ends everywhere."""
    # In JSON, half a surrogate pair is escaped in the very way that Python replaces it.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
