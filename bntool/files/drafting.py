"""The files of one command while they are written, and put into their places together or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import functools
import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bntool.core.errors import UsageError
from bntool.files.drafts import alone_in, draft_folder, forget_leftovers, note_leftovers
from bntool.files.placing import Placed, flush, place, remove_unnamed

if TYPE_CHECKING:
    from bntool.files.targets import Target


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
            raise exists_already(path) from error

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


def exists_already(path: Path) -> UsageError:
    """The error for an output that is there."""
    return UsageError(
        f"{path} exists already", next_step="pass --force to replace it, or name another -o OUTPUT"
    )


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False)


class Scratch:
    """A folder that is made when it is first asked for, and is gone with the last who holds this object."""

    @functools.cached_property
    def path(self) -> Path:
        folder = tempfile.TemporaryDirectory(prefix="bntool.")
        weakref.finalize(self, folder.cleanup)
        return Path(folder.name)
