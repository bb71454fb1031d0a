"""Which qualified names `--include` and `--exclude` mean. No torch here."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable

from bntool.core.errors import UsageError


def chosen(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a glob of `include` matches the name and none of `exclude` does; case counts."""
    return _matches(name, include) and not _matches(name, exclude)


def require_matches(globs: Iterable[str], names: Collection[str], what: str) -> None:
    """Raise `UsageError`, with the closest names, for a glob that means nothing: a slip of the pen."""
    for glob in globs:
        if glob == "*" or any(fnmatch.fnmatchcase(name, glob) for name in names):
            continue
        close = difflib.get_close_matches(glob, list(names), n=3, cutoff=0.4)
        raise UsageError(
            f"no {what} is called {glob!r}",
            next_step=f"did you mean {', '.join(close)}?" if close else "bntool summary lists the layers",
        )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
