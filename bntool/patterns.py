"""Which qualified names `--include` and `--exclude` mean. No torch here."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def chosen(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a glob of `include` matches the name and none of `exclude` does; case counts."""
    return _matches(name, include) and not _matches(name, exclude)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
