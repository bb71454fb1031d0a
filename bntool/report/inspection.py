"""What `bntool inspect` found, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bntool.core.text import Lines, as_lines
from bntool.files.inspecting import Inspection
from bntool.report.tables import Column, Table, count, render, size, wrapped

_COLUMNS = (
    Column("Tensor", flexible=True),
    Column("Type"),
    Column("Shape"),
    Column("Bytes", number=True),
)
_SHOWN = 60
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
    if found.tensors and not quiet:
        shown = found.tensors if verbose else found.tensors[:_SHOWN]
        rows = [[t.name, t.dtype, "x".join(map(str, t.shape)) or "-", count(t.nbytes)] for t in shown]
        yield ""
        yield render(Table(_COLUMNS, rows))
        if len(shown) < len(found.tensors):
            yield f"... and {count(len(found.tensors) - len(shown))} more (-v lists all)"
        yield ""
    for why in found.suspicious:
        yield wrapped(f"suspicious: it {why}")
    if not found.suspicious and inspection.error is None:
        yield "suspicious: nothing"


def _fact(value: Any, verbose: bool) -> str:
    if isinstance(value, dict):
        return _some([f"{k} {_fact(v, verbose)}" for k, v in value.items()], verbose)
    if isinstance(value, list):
        return _some([str(v) for v in value], verbose)
    return str(value)


def _some(items: list[str], verbose: bool) -> str:
    kept = items if verbose else items[:12]
    return ", ".join(kept) + (f" and {len(items) - len(kept)} more" if len(kept) < len(items) else "")
