"""What a command reads, and whether a file is one of them by whatever name. No torch here."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from bntool.files.placing import Identity, identity


class Reads:
    """The files and folders that a command reads, and the Python code in use.

    A folder stands for all that is in it, and for all that a link, or a hard link, in it leads to.
    """

    def __init__(self) -> None:
        self._named: dict[Identity, Path] = {}

    def add(self, path: Path) -> None:
        """Tell of one more; a file that does not exist stands for nothing."""
        known = identity(path)
        if known is not None:
            self._named.setdefault(known, path)

    def first_of(self, *paths: Path) -> tuple[Path, Path] | None:
        """The first of `paths` that is read, and what was named, or imported, by which it is.

        All at once, since every link in a folder of data is looked at.
        """
        known = {name: path for path in paths if (name := identity(path)) is not None}
        if not known:
            return None
        found = itertools.chain(self._named_or_inside(known), self._linked(known), _imported())
        return next(((known[name], source) for name, source in found if name in known), None)

    def _named_or_inside(self, known: dict[Identity, Path]) -> Iterator[tuple[Identity, Path]]:
        for name, path in known.items():
            for each in (name, *map(identity, path.parents)):
                if each in self._named:
                    yield name, self._named[each]

    def _linked(self, known: dict[Identity, Path]) -> Iterator[tuple[Identity, Path]]:
        numbers = {number for _, number in known}
        for folder in filter(Path.is_dir, self._named.values()):
            for inner, _, _ in os.walk(folder):
                with contextlib.suppress(OSError), os.scandir(inner) as entries:
                    for entry in entries:
                        alike = entry.is_symlink() or entry.inode() in numbers
                        if alike and (name := identity(Path(entry.path))) is not None:
                            yield name, folder


def _imported() -> Iterator[tuple[Identity, Path]]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and (name := _identity_of_code(file)) is not None:
            yield name, Path(file)


@functools.cache
def _identity_of_code(file: str) -> Identity | None:
    """Asked once: what Python has imported stays, and there are thousands of files."""
    return identity(Path(file))
