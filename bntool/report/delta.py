"""What changed between two summaries, layer by layer and in total."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from bntool.core.text import Lines, as_lines
from bntool.report.counting import Counts
from bntool.report.layers import Layer
from bntool.report.tables import Column, Table, render, signed

_COLUMNS = (
    Column("Change"),
    Column("Layer", flexible=True),
    Column("Name", flexible=True),
    Column("Trainable", number=True),
    Column("Frozen", number=True),
    Column("Buffers", number=True),
    Column("Bytes", number=True),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A layer that was added, removed or changed, and by how much. A changed one has its new name."""

    kind: Literal["added", "removed", "changed"]
    name: str
    type: str
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        return {"change": self.kind, "name": self.name, "type": self.type, **self.counts.to_dict()}


@dataclasses.dataclass(frozen=True)
class Delta:
    """The changes in the new model's order, and their total."""

    changes: tuple[Change, ...]
    totals: Counts

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [change.to_dict() for change in self.changes],
            "totals": {"parameters": self.totals.parameters, **self.totals.to_dict()},
        }

    def render(self, width: int | None = None) -> Lines:
        """The changes as a plain-text table; one line where there are none."""
        if not self.changes:
            return as_lines("since the baseline: no layer with parameters or buffers changed")
        rows = [
            [change.kind, change.type, change.name, *_signed_counts(change.counts)] for change in self.changes
        ]
        footer = ["total", "", "", *_signed_counts(self.totals)]
        return render(Table(_COLUMNS, rows, "since the baseline", footer), width)


def compare_layers(before: Sequence[Layer], after: Sequence[Layer]) -> Delta:
    """Added, removed and changed layers; layers without tensors cost nothing and are left out.

    Layers are matched in order, by name without its numbers and by weight shape: a layer that only
    moved up in its `nn.Sequential` did not change.
    """
    old = [layer for layer in before if layer.own_shapes]
    new = [layer for layer in after if layer.own_shapes]
    matcher = SequenceMatcher(None, [_key(x) for x in old], [_key(x) for x in new], autojunk=False)
    changes: list[Change] = []
    for verdict, i, i_end, j, j_end in matcher.get_opcodes():
        if verdict == "equal":
            changes += _changed(zip(old[i:i_end], new[j:j_end], strict=True))
        else:
            changes += _replaced(old[i:i_end], new[j:j_end])
    totals = sum((x.counts for x in after), Counts()) - sum((x.counts for x in before), Counts())
    return Delta(tuple(changes), totals)


def _replaced(old: Sequence[Layer], new: Sequence[Layer]) -> list[Change]:
    """One stretch of layers in place of another; what kept its name is changed, not exchanged."""
    old_by_name = {layer.name: layer for layer in old}
    new_names = {layer.name for layer in new}
    changes = [_whole("removed", layer) for layer in old if layer.name not in new_names]
    for layer in new:
        if layer.name in old_by_name:
            changes += _changed([(old_by_name[layer.name], layer)])
        else:
            changes.append(_whole("added", layer))
    return changes


def _changed(pairs: Any) -> list[Change]:
    return [
        Change("changed", new.name, new.type, new.counts - old.counts)
        for old, new in pairs
        if (old.type, old.own_shapes, old.counts) != (new.type, new.own_shapes, new.counts)
    ]


def _whole(kind: Literal["added", "removed"], layer: Layer) -> Change:
    return Change(kind, layer.name, layer.type, layer.counts if kind == "added" else Counts() - layer.counts)


def _key(layer: Layer) -> tuple[str, tuple[int, ...]]:
    name = ".".join("#" if part.isdigit() else part for part in layer.name.split("."))
    return name, layer.own_shapes[0]


def _signed_counts(counts: Counts) -> list[str]:
    return [signed(n) for n in (counts.trainable, counts.frozen, counts.buffers, counts.bytes)]
