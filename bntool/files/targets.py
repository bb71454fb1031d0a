"""Every file that a command writes, and every one that it reads: one place that keeps them apart.

A target is asked before any work. It refuses an output that is one of the files read, whatever it is called
and through whatever links; that exists, unless the user said `force`; or that cannot be written. The files of
one command are then written as drafts and put into their places together, or not at all. No torch here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bntool.core.errors import UsageError
from bntool.files.drafting import Drafts, exists_already
from bntool.files.reads import Reads

_NAME_MAX = 255


class Target:
    """What one command writes and reads.

    Args:
        force: whether files that the user names may be replaced.
        reads: files and folders that are read. A folder stands for all that is in it; a file that does not
            exist stands for nothing.
    """

    def __init__(self, *, force: bool = False, reads: Iterable[str | Path] = ()) -> None:
        self.force = force
        self._reads = Reads()
        self._claimed: dict[Path, bool] = {}
        self._in_place: set[Path] = set()
        self._own: set[Path] = set()
        self.read(*reads)

    def read(self, *paths: str | Path) -> None:
        """Tell of more that is read. Raises `UsageError` where one of them was to be written."""
        for path in map(Path, paths):
            self._reads.add(path)
        self.require_unread(*self._claimed)

    def claim_folder(self, folder: str | Path) -> None:
        """Have a folder be the command's own, there or not: what is claimed in it may be replaced.

        Raises `UsageError` where anything in it is read, or is a link.
        """
        inside = sorted(Path(folder).rglob("*"))
        self.require_unread(*inside)
        for path in filter(Path.is_symlink, inside):
            raise UsageError(f"{path} is a link", next_step="remove it, or name another folder with -o")
        self._own.add(Path(os.path.realpath(folder)))

    def claim(self, path: str | Path, *, force: bool | None = None, though_read: bool = False) -> Path:
        """The real path (a link's target) of a file that the user names, or `UsageError`.

        `force` says otherwise than the target does whether it may be replaced, `though_read` that it is named
        to be changed in place.
        """
        path = Path(path)
        try:
            real = Path(os.path.realpath(path))
        except OSError as error:
            raise _cannot(path, error) from error
        if though_read:
            self._in_place.add(real)
        return self._claim(path, real, self._forces(real) if force is None else force)

    def claim_beside(self, path: Path, belongs: Callable[[Path], bool]) -> Path:
        """The path of a file that bntool names after an output, or `UsageError`.

        Such a file is replaced only with `force` and where it `belongs` to bntool; a link is never followed.
        """
        real = Path(os.path.realpath(path.parent)) / path.name
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link, and bntool writes a file of its own there",
                next_step=f"rm {path}, or name another -o OUTPUT",
            )
        if path.is_file() and self._forces(real) and not belongs(path):
            raise UsageError(
                f"{path} is no file of bntool's, and would be lost",
                next_step="move it away, or name another -o OUTPUT",
            )
        return self._claim(path, real, self._forces(real))

    def may_replace(self, path: Path) -> bool:
        """Whether `path` may be replaced: only one that was claimed, and with `force`."""
        return self._claimed.get(path, False)

    def has_claimed(self, path: Path) -> bool:
        """Whether `path` is one of those claimed."""
        return path in self._claimed

    def is_free(self, path: Path) -> bool:
        """Whether nothing is at `path` and nothing is going to be."""
        return path not in self._claimed and not os.path.lexists(path)

    def is_read(self, path: Path) -> bool:
        """Whether the file at `path`, by any name, is one of those read, or lies in a folder that is."""
        return self._reads.first_of(path) is not None

    @contextlib.contextmanager
    def drafts(self) -> Iterator[Drafts]:
        """Drafts of claimed files, put into their places together when the block ends without an error.

        Raises `UsageError` where they cannot be written; then everything is as it was.
        """
        with contextlib.ExitStack() as folders:
            drafts = Drafts(self, folders)
            try:
                yield drafts
                drafts.place()
            except OSError as error:
                if drafts.last == Path():  # nothing was being written: it is of the work that is done inside
                    raise
                raise _cannot(drafts.last, error) from error

    def require_unread(self, *paths: Path) -> None:
        """Raise `UsageError` where one of the files is read, unless it was claimed to be changed in place."""
        found = self._reads.first_of(*(path for path in paths if path not in self._in_place))
        if found is not None:
            raise _is_input(*found)

    def _forces(self, real: Path) -> bool:
        return self.force or real.parent in self._own

    def _claim(self, path: Path, real: Path, force: bool) -> Path:
        try:
            asked = real in self._in_place or real.parent in self._own
            found = None if asked else self._reads.first_of(real)
            if found is not None:
                raise _is_input(path, found[1])
            _require_possible(path, real, force=force)
        except OSError as error:
            raise _cannot(path, error) from error
        if real in self._claimed:
            raise UsageError(f"{path} is to be written twice", next_step="name two files")
        if real.parent not in self._own and not real.parent.is_dir():
            raise UsageError(f"the folder {real.parent} does not exist", next_step=f"mkdir -p {real.parent}")
        self._claimed[real] = force
        return real


def _require_possible(path: Path, real: Path, *, force: bool) -> None:
    if len(os.fsencode(real.name)) > _NAME_MAX:
        raise UsageError(f"the name {real.name} is too long", next_step="name a shorter -o OUTPUT")
    if real.is_dir():
        raise UsageError(f"the output {path} is a folder", next_step="name a file: -o FOLDER/NAME.pt")
    if os.path.lexists(real) and not real.is_file():
        raise UsageError(f"the output {path} is not a regular file", next_step="name a file: -o NAME.pt")
    if os.path.lexists(real) and not force:
        raise exists_already(path)


def _is_input(path: Path, source: Path) -> UsageError:
    return UsageError(
        f"the output {path} is the input itself",
        where="" if os.fspath(source) == os.fspath(path) else f"{source}, which is read",
        next_step="name another -o OUTPUT",
    )


def _cannot(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path}: {error.strerror or error}",
        next_step="check the folder's permissions and the space on the disk, or name another -o OUTPUT",
    )
