"""Opening files that a user names: only regular ones, and never waiting for one. No torch here."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from bntool.core.errors import LoadError

# Windows has neither; a pipe that nobody writes to would keep open() waiting for ever.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
MOST_TEXT = 1 << 26
"""The most bytes of a document that is read whole."""


def exists(path: str | Path) -> bool:
    """Whether anything is there; False, too, for a name that nothing can have, such as one too long."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading.

    Raises `LoadError` for what is missing, may not be read, or is a folder, a pipe, a socket or a device.
    """
    path = Path(path)
    try:
        _require_regular(path, path.stat().st_mode)
        file = open(path, "rb", opener=lambda name, _: os.open(name, _FLAGS))  # noqa: SIM115  the caller's
    except FileNotFoundError as error:
        raise LoadError(f"no such file: {path}", next_step="check the name and the folder") from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        # It may be another file by now.
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except LoadError:
        file.close()
        raise
    return file


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """The text of a regular file in UTF-8, read whole.

    Raises `LoadError` as `open_regular` does, and for more than `most` bytes or another encoding.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > most else file.read(size)
        if size > most:
            raise ValueError(f"it is larger than {most >> 20} MiB")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> LoadError:
    """What the system, or a decoder, says about a file that cannot be read."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return LoadError(f"cannot read {path}: {why}", next_step="check the name and the file's permissions")


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise LoadError(f"{path} is a folder", next_step="name a file inside it")
    if not stat.S_ISREG(mode):
        raise LoadError(f"{path} is not a regular file", next_step="name a regular file, or copy it into one")
