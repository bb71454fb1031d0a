"""The dry runs of all pickles in a file of `torch.save`, of either of its formats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from bntool.core.limits import Limit
from bntool.files.detect import Kind
from bntool.files.security.containers import PICKLED, Container, within
from bntool.files.security.opcodes import DryRun
from bntool.files.security.pickle_bytes import DamagedPickle
from bntool.files.security.pickled_calls import shown
from bntool.files.security.pinned import Pinned

Saved = Container | Pinned
"""An archive, or the format before PyTorch 1.6."""


def open_saved(opened: BinaryIO, path: Path, kind: Kind, limit: Limit) -> Saved:
    """An opened file of `torch.save`. Raises `Unsafe`, `Damaged`, or `LoadError` beyond the limit."""
    return Container(opened, PICKLED, within(limit, path)) if kind is Kind.TORCH_ZIP else Pinned(opened)


def file_of(saved: Saved) -> Pinned:
    """What torch loads: the bytes that the dry runs read, and the tensors behind them."""
    file = saved.file if isinstance(saved, Container) else saved
    file.seek(0)
    return file


def dry_runs(saved: Saved, path: Path, limit: Limit) -> list[DryRun]:
    """Every pickle in the file, run without effect. `DamagedPickle`, or `LoadError` beyond the limit."""
    if isinstance(saved, Container):
        runs, structure = [dry_run_of_archive(saved)], saved.sizes["data.pkl"]
    else:
        runs, structure = _dry_run_legacy(saved, path, limit)
    storages = {key: s.nbytes for run in runs for key, s in run.storages.items()}
    cost = {"data": sum(storages.values()), "tensors": len(storages), "structure": structure}
    limit.require(path.name, **cost, where=str(path))
    return runs


def dry_run_of_archive(container: Container) -> DryRun:
    """The one pickle of an archive; `DamagedPickle` where it lacks the data of a tensor."""
    run = DryRun().run(io.BytesIO(container.read("data.pkl")))
    for key, storage in run.storages.items():
        if container.sizes.get(f"data/{key}", -1) < storage.nbytes:
            raise DamagedPickle(f"the data of tensor {shown(key)} is missing or cut short")
    return run


def _dry_run_legacy(saved: Pinned, path: Path, limit: Limit) -> tuple[list[DryRun], int]:
    """Five pickles in a row (magic, protocol, machine, object, storage keys), then the raw storages.

    Also gives the bytes that the pickles take.
    """
    file = io.BytesIO(saved.pin(0, min(limit.structure, saved.size)))
    runs: list[DryRun] = []
    try:
        while len(runs) < 5:
            runs.append(DryRun().run(file))
            if not runs[-1].whole:
                return runs, file.tell()
    except DamagedPickle:
        limit.require(path.name, structure=saved.size if file.read(1) == b"" else 0, where=str(path))
        raise
    left = saved.size - file.tell()
    storages = runs[3].storages
    if not storages.keys() <= runs[4].strings or sum(s.nbytes for s in storages.values()) > left:
        raise DamagedPickle("the data of some tensors is missing")
    return runs, file.tell()
