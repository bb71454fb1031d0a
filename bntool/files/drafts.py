"""A hidden folder beside an output for what is being written, gone afterwards. No torch here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bntool.core.errors import UsageError
from bntool.files.placing import remove_tree, remove_unnamed

# Windows has no such locks.
_HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
_PREFIX, _SUFFIX = ".bntool-", ".draft"
_NAME = re.compile(r"\.bntool-[0-9a-f]{12}\.draft")
_LOCK, _NO_LOCK = "lock", "no-lock"
_LEFTOVERS = "leftovers.json"
_MOST_NOTED = 1 << 20
_BEGINNING_SECONDS = 60
"""A draft has a lock microseconds after it is made; without one after this long, its maker is gone."""
_UNLOCKED_SECONDS = 24 * 3600
"""The same where locks cannot be had."""


@contextlib.contextmanager
def draft_folder(target: Path | None) -> Iterator[Path]:
    """A hidden folder beside `target`, gone afterwards: `.bntool-XXXX.draft`; elsewhere without a target.

    What a killed process left there is removed first: its folder is the one that nobody holds a lock on.
    A link's target counts, not the link. Raises `UsageError` where nothing can be written there.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="bntool.") as elsewhere:
            yield Path(elsewhere)
        return
    beside = Path(os.path.realpath(target)).parent
    folder = beside / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
    lock = -1
    try:
        try:
            remove_abandoned(beside)
            folder.mkdir(mode=0o700)
            lock = _locked(folder)
        except OSError as error:
            raise UsageError(
                f"cannot write {target}: {error.strerror or error}",
                next_step="check the folder's permissions and the space on the disk, or name another output",
            ) from error
        yield folder
    finally:
        _remove_leftovers(folder)  # there are some only after Ctrl-C in the middle of the moves
        remove_tree(folder)
        if lock >= 0:
            os.close(lock)


def remove_abandoned(folder: Path) -> None:
    """Remove the drafts in `folder` whose makers are gone: folders of our own, of the very names we give."""
    for draft in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if _NAME.fullmatch(draft.name) and _is_own_folder(draft) and _is_abandoned(draft):
            _remove_leftovers(draft)
            remove_tree(draft)


def note_leftovers(folder: Path, paths: Iterable[Path]) -> None:
    """Note in a folder of drafts which files beside it would be nobody's, were this process killed now.

    By what tells them from every other file, not by name: nobody else can point to a file with it.
    """
    told = [_traits(path) for path in paths if path.is_file()]
    if told:
        (folder / _LEFTOVERS).write_text(json.dumps(told), encoding="utf-8")


def forget_leftovers(folder: Path) -> None:
    """All stands in its place, and what was noted is gone or named by a file."""
    (folder / _LEFTOVERS).unlink(missing_ok=True)


def _remove_leftovers(draft: Path) -> None:
    try:
        noted = draft / _LEFTOVERS
        if noted.is_symlink() or not noted.is_file() or noted.stat().st_size > _MOST_NOTED:
            return
        told = json.loads(noted.read_text(encoding="utf-8"))
        for path in draft.parent.iterdir():
            if path.is_file() and not path.is_symlink() and _traits(path) in told:
                remove_unnamed(path, set())
    except (OSError, ValueError, TypeError, RecursionError):
        return


def _traits(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have no other process move its files into `folder` meanwhile, where the system has locks."""
    if not _HAS_LOCKS:
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _locked(folder: Path) -> int:
    """Hold a lock that ends with this process, however it ends; -1 where the system has none."""
    making = folder / "making"
    handle = os.open(making, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        if not _HAS_LOCKS:
            raise OSError("no locks")
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        making.rename(folder / _NO_LOCK)
        return -1
    # It gets its name once it is held: whoever finds it free may take the folder for abandoned.
    making.rename(folder / _LOCK)
    return handle


def _is_abandoned(folder: Path) -> bool:
    try:
        # Whatever else stands there under that name must neither block nor lead elsewhere.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(folder / _LOCK, flags)
    except OSError:
        with contextlib.suppress(OSError):
            patience = _UNLOCKED_SECONDS if (folder / _NO_LOCK).exists() else _BEGINNING_SECONDS
            return time.time() - folder.stat().st_mtime > patience
        return False
    import fcntl

    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)
