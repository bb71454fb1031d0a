"""The rows of a summary, and the table that is made of them: which columns, how deep, in which order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bntool.core.command_options import ViewOptions
from bntool.core.showing import Column, Table, count, counted, shape_text
from bntool.results.counting import Counts

Size = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module, or a layer of a graph.

    Shapes are those of the first tensor of the first call, with the batch; None where not seen. `counts`,
    `buffer_bytes` and `own_shapes` cover only the tensors that this one is the first to hold. `mult_adds` and
    `output_bytes` are those of all its calls, None where none was seen. A `container` only holds others; one
    in which `inside` many are counted stands for them.
    """

    number: int
    name: str
    type: str
    input_shape: Size | None = None
    output_shape: Size | None = None
    counts: Counts = Counts()  # noqa: RUF009 - it cannot change
    own_shapes: tuple[Size, ...] = ()
    more_inputs: int = 0
    more_outputs: int = 0
    kernel: Size | None = None
    mult_adds: int | None = None
    output_bytes: int | None = None
    buffer_bytes: int = 0
    container: bool = False
    inside: int = 0

    @property
    def label(self) -> str:
        """`BatchNorm2d-2`; `Sequential, 3 layers` for what stands for others."""
        if self.inside:
            return f"{self.type}{', ' * bool(self.type)}{counted(self.inside, 'layer')}"
        return self.type if self.container or not self.number else f"{self.type}-{self.number}"

    @property
    def depth(self) -> int:
        return len(_parts(self.name))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "output_shape": None if self.output_shape is None else list(self.output_shape),
            "kernel": None if self.kernel is None else list(self.kernel),
            "trainable": self.counts.trainable,
            "frozen": self.counts.frozen,
            "buffers": self.counts.buffers,
            "bytes": self.counts.bytes,
            "mult_adds": self.mult_adds,
            "output_bytes": self.output_bytes,
        }

    def standing_for(self, other: Layer) -> Layer:
        """The same with the figures of a layer inside of it."""
        more = 0 if other.container else other.inside or 1
        return dataclasses.replace(
            self,
            counts=self.counts + other.counts,
            buffer_bytes=self.buffer_bytes + other.buffer_bytes,
            mult_adds=total(self.mult_adds, other.mult_adds),
            output_bytes=total(self.output_bytes, other.output_bytes),
            container=False,
            inside=self.inside + more,
        )


def total(*figures: int | None) -> int | None:
    """The sum of those that are known; None where none is."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None


def table_of(rows: Sequence[Layer], view: ViewOptions) -> Table:
    """The rows under the columns of the view, with their totals."""
    whole = Layer(0, "", "total")
    for row in rows:
        whole = whole.standing_for(row)
    shown = [row for row in at_depth(rows, view.depth) if view.tree or not row.container]
    if view.sort is not None:
        figure = _COLUMNS[view.sort].key
        shown.sort(key=figure, reverse=view.sort not in ("type", "name"))
    columns = [_COLUMNS[name] for name in view.columns]
    first = next((i for i, name in enumerate(view.columns) if name in ("type", "name")), None)
    lines = []
    for row in shown:
        cells = [column.cell(row, whole) for column in columns]
        if view.tree:
            cells = [_last(row.name) if n == "name" else c for n, c in zip(view.columns, cells, strict=True)]
            if first is not None:
                cells[first] = "  " * row.depth + cells[first]
        lines.append(cells)
    footer = [c.cell(whole, whole) if c.column.number else "" for c in columns]
    if not columns[0].column.number:
        footer[0] = "total"
    return Table(tuple(column.column for column in columns), lines, footer=footer)


def at_depth(rows: Iterable[Layer], depth: int | None) -> list[Layer]:
    """The rows down to a depth; each of the last of them stands for what is below it."""
    if depth is None:
        return list(rows)
    kept: dict[str, Layer] = {}
    for row in rows:
        parts = _parts(row.name)
        top = ".".join(parts[:depth])
        if len(parts) <= depth:
            kept[row.name] = row
        else:
            kept[top] = kept.get(top, Layer(0, top, "", container=True)).standing_for(row)
    return list(kept.values())


def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A column of a summary: its cell for a row, given the totals, and what it is sorted by."""

    column: Column
    cell: Callable[[Layer, Layer], str]
    key: Callable[[Layer], Any]


def _figures(title: str, figure: Callable[[Layer], int | None], spare: int = 1) -> _Shown:
    def cell(row: Layer, _: Layer) -> str:
        found = figure(row)
        return "" if found is None or (row.container and not found) else count(found)

    return _Shown(Column(title, number=True, spare=spare), cell, lambda row: figure(row) or 0)


def _shapes(title: str, shape: Callable[[Layer], Size | None], more: Callable[[Layer], int]) -> _Shown:
    def cell(row: Layer, _: Layer) -> str:
        return shape_text(shape(row)) + (f" +{more(row)}" if more(row) else "")

    return _Shown(Column(title, spare=3), cell, lambda row: math.prod(shape(row) or (0,)))


def _percent(row: Layer, whole: Layer) -> str:
    parameters = whole.counts.parameters
    return f"{row.counts.parameters / parameters:.2%}" if parameters and not row.container else ""


_COLUMNS = {
    "type": _Shown(Column("Layer", flexible=True), lambda row, _: row.label, lambda row: row.type),
    "name": _Shown(Column("Name", flexible=True, spare=2), lambda row, _: row.name, lambda row: row.name),
    "input": _shapes("Input", lambda row: row.input_shape, lambda row: row.more_inputs),
    "output": _shapes("Output", lambda row: row.output_shape, lambda row: row.more_outputs),
    "kernel": _shapes("Kernel", lambda row: row.kernel, lambda _: 0),
    "params": _figures("Params", lambda row: row.counts.parameters, spare=0),
    "percent": _Shown(Column("Params %", number=True, spare=1), _percent, lambda row: row.counts.parameters),
    "trainable": _figures("Trainable", lambda row: row.counts.trainable, spare=0),
    "frozen": _figures("Frozen", lambda row: row.counts.frozen),
    "buffers": _figures("Buffers", lambda row: row.counts.buffers),
    "mult-adds": _figures("Mult-adds", lambda row: row.mult_adds),
    "bytes": _figures("Bytes", lambda row: row.counts.bytes),
}
