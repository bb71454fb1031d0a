"""Models of libraries that import each in a way of its own, small enough for a sweep, with inputs."""

from __future__ import annotations

from collections.abc import Iterator

from tools.sweeps.libraries import signals, transformers, vision
from tools.sweeps.libraries.making import Entry, Make, Shapes, inputs_like, made

__all__ = ["Entry", "Make", "Shapes", "entries", "inputs_like", "made"]


def entries() -> Iterator[Entry]:
    """Every model of the tables."""
    for table in (*transformers.TABLES, *vision.TABLES, *signals.TABLES):
        yield from table()
