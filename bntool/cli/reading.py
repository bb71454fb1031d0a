"""Which files and folders a command reads, told by its options. None of them may be written over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bntool.core.option import Options
from bntool.files.regular import exists
from bntool.files.sidecar import sidecar_path


def read_by(*asked: Options) -> list[Path]:
    """Every file and folder that an option names, but for those to be written; a side file with its model.

    Whatever names something that exists is taken for a path: a wrong guess only forbids one output.
    """
    values = (
        getattr(options, one.name) for options in asked for one in options.options() if not one.spec.written
    )
    return [path for value in values for text in _texts(value) for path in _paths(text)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _texts(part)


def _paths(text: str) -> Iterator[Path]:
    """`net.pt` with `net.pt.bntool.json`; `net.py` of `net.py:Net`; `x.npy` of `NAME=x.npy`, too."""
    for part in {text, text.rpartition(":")[0], text.partition(":")[2], text.partition("=")[2]}:
        path = Path(part)
        if part and exists(path):
            yield path
            yield sidecar_path(path) if path.name else path
