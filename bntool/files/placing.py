"""Moving finished drafts to their places, and taking them back. Nothing else in bntool renames or removes.

Without leave to replace, a draft is renamed as the system does it only where nothing stands: of two writers
one is told so. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import itertools
import json
import mmap
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

_MOST_SEARCHED = 8 << 30
"""Bytes beside an old data file that are searched for its name, some seconds long."""
_AT_FDCWD = -100
_NO_REPLACE = 1  # RENAME_NOREPLACE of linux/fs.h
_CANNOT = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES}
)
"""What a file system says that has no such rename, or no hard links."""

Identity = tuple[int, int]
"""What tells a file from every other, whatever it is called."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A file that stands in its place, and the one that stood there before, if one did."""

    path: Path
    identity: Identity
    before: Path | None

    def take_back(self) -> None:
        """Put things back as they were, unless somebody else has written there since."""
        with contextlib.suppress(OSError):
            if identity(self.path) != self.identity:
                return
            if self.before is not None:
                self.before.replace(self.path)
            else:
                self.path.unlink()


def identity(path: Path) -> Identity | None:
    """The identity of a file, or of what a link leads to; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def place(draft: Path, path: Path, *, replace: bool) -> Placed:
    """Put a draft, whose bytes are on the disk (`flush`), at `path` in the same file system, in one step.

    With `replace`, what stands there is replaced, and its permissions kept. Raises `FileExistsError` where
    something stands there and may not be replaced, `OSError` where it cannot be written.
    """
    try:
        _create(draft, path)
    except FileExistsError:
        if not replace:
            raise
        draft.chmod(stat.S_IMODE(path.stat().st_mode))
        before: Path | None = _kept(path, draft)
        mine = identity(draft)
        draft.replace(path)
    else:
        before, mine = None, identity(path)
    assert mine is not None
    return Placed(path, mine, before)


def place_folder(draft: Path, folder: Path) -> None:
    """Put a folder at `folder`, where there is none or an empty one. Raises `OSError` elsewhere."""
    if os.name == "nt" and folder.is_dir():
        folder.rmdir()  # no rename there replaces a folder; this one fails unless it is empty
    draft.rename(folder)


def remove_unnamed(path: Path, new: set[Path]) -> None:
    """Remove a data file of bntool's own, unless a file beside it, or a folder up or down, holds its name.

    A model that was renamed, or copied, still reads it. Where there is too much to search, it may be so.
    """
    names = {os.fsencode(path.name), json.dumps(path.name)[1:-1].encode()}
    with contextlib.suppress(OSError):
        folder = path.parent
        # Files from below name it as ../NAME; only models do, and data folders hold too much to be searched.
        near = itertools.chain(
            folder.iterdir(), folder.resolve().parent.iterdir(), folder.glob("[!.]*/*.onnx")
        )
        others = [other for other in near if other not in {path, *new} and other.is_file()]
        sizes = sum(other.stat().st_size for other in others)
        if sizes <= _MOST_SEARCHED and not any(_holds(other, name) for other in others for name in names):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file that is bntool's own; nothing where it cannot be."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_empty(*folders: Path) -> None:
    """Remove folders, one after the other, as far as nothing is in them."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_tree(folder: Path) -> None:
    """Remove a folder of drafts with all that is in it; nothing where it cannot be."""
    shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _holds(path: Path, name: bytes) -> bool:
    if path.stat().st_size < len(name):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # NAME.1 is another's name; in a protobuf message no field begins with a full stop.
        return re.search(re.escape(name) + rb"(?!\.\d)", content) is not None


def _create(draft: Path, path: Path) -> None:
    """Rename where nothing stands at `path`, in the first way that the file system knows."""
    for way in (_rename_new, _link_new):
        try:
            way(draft, path)
            return
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    # The name is taken first, so that of two writers one fails here; then the file takes its place.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        draft.replace(path)
    except BaseException:
        remove(path)
        raise


def _rename_new(draft: Path, path: Path) -> None:
    if os.name == "nt":
        draft.rename(path)  # which fails there where a file is
        return
    renameat2 = _renameat2()
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    if renameat2(_AT_FDCWD, os.fsencode(draft), _AT_FDCWD, os.fsencode(path), _NO_REPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


@functools.cache
def _renameat2() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _link_new(draft: Path, path: Path) -> None:
    os.link(draft, path)
    draft.unlink()


def _kept(path: Path, draft: Path) -> Path:
    """The old file under a second name among the drafts, to be put back if a later file cannot be placed."""
    before = draft.parent.with_name(f"{draft.parent.name}.before")
    try:
        os.link(path, before)
    except OSError:
        shutil.copy2(path, before)  # where there are no hard links
    return before
