"""What `bntool inspect` found, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bntool.core.showing import Column, Table, count, counted, size
from bntool.core.text import Lines, as_lines
from bntool.files.grouping import Group
from bntool.files.inspecting import Inspection
from bntool.results.tables import render, wrapped

_COLUMNS = (
    Column("Tensor", flexible=True),
    Column("Type"),
    Column("Shape"),
    Column("Bytes", number=True),
)
_SHOWN = 60
_LEAST = 6
_STANDING = {
    "unknown": "not known here: --allow",
    "other": "no layer and no enum: no flag but --trust-pickle lets it in",
    "refused": "refused: a file can run code through it",
}


def inspection_text(inspection: Inspection, *, quiet: bool = False, verbose: bool = False) -> Lines:
    """The report; `quiet` leaves the table of tensors out, `verbose` cuts nothing."""
    return as_lines(*_lines(inspection, quiet, verbose))


def _lines(inspection: Inspection, quiet: bool, verbose: bool) -> Iterator[str]:
    found, kind = inspection.found, inspection.kind
    detail = f" ({kind.detail})" if kind.detail else ""
    yield f"{inspection.path.name}: {kind.description}{detail}, {size(inspection.size)}"
    for label, value in found.facts.items():
        text = _fact(value, verbose)
        if text:
            yield wrapped(f"{label.replace('_', ' ')}: {text}")
    names = [n for n, how in found.classes.items() if how == "known"]
    if names:
        yield wrapped(f"classes: {_some(names, verbose)}")
    for name, how in found.classes.items():
        if how in _STANDING:
            yield f"class {name}  [{_STANDING[how]}]"
    if found.tensors:
        yield f"tensors: {count(len(found.tensors))}, {size(inspection.tensor_bytes)}"
    groups = inspection.groups
    if len(groups) > 1:
        yield ""
        yield render(_table_of(groups))
    if found.tensors and not quiet:
        most = len(found.tensors) if verbose else max(_SHOWN // len(groups), _LEAST)
        for group in groups:
            yield ""
            yield from _tensors(group, most, named=len(groups) > 1)
    if found.tensors:
        yield ""
    for why in found.suspicious:
        yield wrapped(f"suspicious: it {why}")
    if not found.suspicious and inspection.error is None:
        yield "suspicious: nothing"


def _table_of(groups: Sequence[Group]) -> Table:
    """The groups with their subtotals."""
    columns = (
        Column("Group", flexible=True),
        Column("What"),
        Column("Tensors", number=True),
        Column("Bytes", number=True),
    )
    rows = [
        [g.name, g.what + (f", as {g.of}" if g.of else ""), count(len(g.tensors)), count(g.nbytes)]
        for g in groups
    ]
    whole = (sum(len(g.tensors) for g in groups), sum(g.nbytes for g in groups))
    return Table(columns, rows, footer=["total", "", *map(count, whole)])


def _tensors(group: Group, most: int, *, named: bool) -> Iterator[str]:
    shown = group.tensors[:most]
    rows = [[t.name, t.dtype, "x".join(map(str, t.shape)) or "-", count(t.nbytes)] for t in shown]
    footer = [counted(len(group.tensors), "tensor"), "", "", count(group.nbytes)] if named else ()
    yield render(Table(_COLUMNS, rows, group.name if named else "", footer))
    if len(shown) < len(group.tensors):
        yield f"... and {count(len(group.tensors) - len(shown))} more (-v lists all)"


def _fact(value: Any, verbose: bool) -> str:
    if isinstance(value, dict):
        return _some([f"{k} {_fact(v, verbose)}" for k, v in value.items()], verbose)
    if isinstance(value, list):
        return _some([str(v) for v in value], verbose)
    return str(value)


def _some(items: list[str], verbose: bool) -> str:
    kept = items if verbose else items[:12]
    return ", ".join(kept) + (f" and {len(items) - len(kept)} more" if len(kept) < len(items) else "")
