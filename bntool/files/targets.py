"""Every file that a command writes, and every one that it reads: one place that keeps them apart.

A target is asked before any work. It refuses an output that is one of the files read, whatever it is called
and through whatever links; that exists, unless the user said `force`; or that cannot be written. The files of
one command are then written as drafts and put into their places together, or not at all. No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bntool.core.errors import UsageError
from bntool.files.drafts import alone_in, draft_folder, forget_leftovers, note_leftovers
from bntool.files.placing import Placed, flush, place, remove_unnamed
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


class Drafts:
    """The files of one command while they are written, each in a hidden folder beside its place."""

    def __init__(self, target: Target, folders: contextlib.ExitStack) -> None:
        self.target = target
        self.last = Path()
        self._open = folders
        self._folders: dict[Path, Path] = {}
        self._number = itertools.count()
        self._drafts: list[tuple[Path, Path]] = []
        self._parts: dict[Path, _Part] = {}
        self._old: list[Callable[[], Iterable[Path]]] = []

    def of(self, path: Path) -> Path:
        """An empty draft of a claimed file, to be filled."""
        draft = self.folder_for(path) / path.name
        # Made here and not by whoever fills it, so that the umask of the user holds.
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        self.put(draft, path)
        return draft

    def folder_for(self, path: Path) -> Path:
        """A new folder in the file system of `path`, to be filled, and gone afterwards."""
        self.last = path
        if path.parent not in self._folders:
            self._folders[path.parent] = self._open.enter_context(draft_folder(path))
        folder = self._folders[path.parent] / str(next(self._number))
        folder.mkdir()
        return folder

    def put(self, draft: Path, path: Path) -> None:
        """Have a file from a `folder_for` go to `path`.

        One that was not claimed is named after its content: where the same is there already, that one stays.
        """
        self._drafts.append((draft, path))

    def draft_of(self, path: Path) -> Path:
        """The draft that goes to `path`."""
        return next(draft for draft, place in self._drafts if place == path)

    def add_part(self, path: Path, draft: Path, names: Iterator[str], name_it: Callable[[str], None]) -> None:
        """Have `draft` go with the file of `path`, under the first of `names` that is free beside it.

        `name_it` writes that name into the draft of `path`. A part is never put over another file.
        """
        self._parts[path] = _Part(draft, names, name_it)

    def retire(self, find: Callable[[], Iterable[Path]]) -> None:
        """Have files of bntool's own go once the new ones stand, unless something reads or names them still.

        `find` is asked for them right before, when no other writer can come between.
        """
        self._old.append(find)

    def part_of(self, path: Path) -> Path | None:
        """Where the part of a file went, once it is placed; None where it has none."""
        part = self._parts.get(path)
        return part.path if part else None

    def place(self) -> None:
        """Put every draft into its place, parts first; on any error take back what was placed."""
        done: list[Placed] = []
        with contextlib.ExitStack() as alone:
            for parent in sorted(self._folders):
                alone.enter_context(alone_in(parent))
            old = [path for find in self._old for path in find() if not self.target.is_read(path)]
            try:
                self._flush()
                self._note(old)
                for path, part in self._parts.items():
                    done.append(self._place_part(path, part))
                for draft, path in self._drafts:
                    done += self._place(draft, path)
            except BaseException:
                for placed in reversed(done):
                    placed.take_back()
                raise
            for parent in self._folders:
                with contextlib.suppress(OSError):
                    flush(parent)
            new = {placed.path for placed in done}
            for path in old:
                if path not in new:
                    remove_unnamed(path, new)
            for folder in self._folders.values():
                forget_leftovers(folder)

    def _flush(self) -> None:
        """All bytes first, so that the names follow each other at once."""
        for draft in (*(part.draft for part in self._parts.values()), *(draft for draft, _ in self._drafts)):
            flush(draft)

    def _note(self, old: list[Path]) -> None:
        """What a kill could leave that no file names: a part before its file, an old part after it."""
        for parent, folder in self._folders.items():
            parts = [part.draft for path, part in self._parts.items() if path.parent == parent]
            note_leftovers(folder, [*parts, *(path for path in old if path.parent == parent)])

    def _place(self, draft: Path, path: Path) -> list[Placed]:
        self.last = path
        replace = self.target.may_replace(path)
        try:
            if replace:
                self.target.require_unread(path)
            return [place(draft, path, replace=replace)]
        except FileExistsError as error:
            if not self.target.has_claimed(path) and _same(draft, path):
                return []
            raise _exists(path) from error

    def _place_part(self, path: Path, part: _Part) -> Placed:
        """The free names are asked one after the other: another writer may take one at any moment."""
        for name in part.names:
            there = self.last = path.with_name(name)
            if not self.target.is_free(there):
                continue
            part.name_it(name)
            flush(self.draft_of(path))
            with contextlib.suppress(FileExistsError):
                placed = place(part.draft, there, replace=False)
                part.path = there
                return placed
        raise UsageError(f"no name beside {path} is free for its data", next_step="name another -o OUTPUT")


@dataclasses.dataclass
class _Part:
    draft: Path
    names: Iterator[str]
    name_it: Callable[[str], None]
    path: Path | None = None


def _require_possible(path: Path, real: Path, *, force: bool) -> None:
    if len(os.fsencode(real.name)) > _NAME_MAX:
        raise UsageError(f"the name {real.name} is too long", next_step="name a shorter -o OUTPUT")
    if real.is_dir():
        raise UsageError(f"the output {path} is a folder", next_step="name a file: -o FOLDER/NAME.pt")
    if os.path.lexists(real) and not real.is_file():
        raise UsageError(f"the output {path} is not a regular file", next_step="name a file: -o NAME.pt")
    if os.path.lexists(real) and not force:
        raise _exists(path)


def _is_input(path: Path, source: Path) -> UsageError:
    return UsageError(
        f"the output {path} is the input itself",
        where="" if os.fspath(source) == os.fspath(path) else f"{source}, which is read",
        next_step="name another -o OUTPUT",
    )


def _exists(path: Path) -> UsageError:
    return UsageError(
        f"{path} exists already", next_step="pass --force to replace it, or name another -o OUTPUT"
    )


def _cannot(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path}: {error.strerror or error}",
        next_step="check the folder's permissions and the space on the disk, or name another -o OUTPUT",
    )


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False)
