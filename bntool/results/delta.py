"""What changed between two summaries, layer by layer and in total."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from bntool.core.showing import Column, Part, Shown, Table, signed
from bntool.core.text import Lines
from bntool.results.counting import Counts
from bntool.results.layers import Layer
from bntool.results.tables import text_of

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
class Delta(Shown):
    """The changes in the new model's order, and their total."""

    changes: tuple[Change, ...]
    totals: Counts

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [change.to_dict() for change in self.changes],
            "totals": {"parameters": self.totals.parameters, **self.totals.to_dict()},
        }

    def render(self, width: int | None = None) -> Lines:
        """The changes as plain text."""
        return text_of(self.parts(), width)

    def parts(self) -> Sequence[Part]:
        """The changes as a table; one line where there are none."""
        if not self.changes:
            return ["since the baseline: no layer with parameters or buffers changed"]
        rows = [
            [change.kind, change.type, change.name, *_signed_counts(change.counts)] for change in self.changes
        ]
        footer = ["total", "", "", *_signed_counts(self.totals)]
        return [Table(_COLUMNS, rows, "since the baseline", footer)]


def compare_layers(before: Sequence[Layer], after: Sequence[Layer], *, alike: bool = True) -> Delta:
    """Added, removed and changed layers; layers without tensors cost nothing and are left out.

    Layers are matched in order, by name without its numbers and by weight shape: a layer that only
    moved up in its `nn.Sequential` did not change. Models of two kinds are not `alike`: one calls a layer
    otherwise, lays its weight otherwise, or does not know what is trained; then only numbers count, and all
    parameters as trainable.
    """
    if not alike:
        before, after = ([_as_numbers(layer) for layer in layers] for layers in (before, after))
    old = [layer for layer in before if layer.own_shapes]
    new = [layer for layer in after if layer.own_shapes]
    changes: list[Change] = []
    if not alike:  # one tells its layers as they are defined, the other as they run
        by_name = {layer.name: layer for layer in old}
        pairs = [(by_name[layer.name], layer) for layer in new if layer.name in by_name]
        changes += _changed(pairs, exact=False)
        both = {layer.name for _, layer in pairs}
        old, new = ([layer for layer in side if layer.name not in both] for side in (old, new))
    matcher = SequenceMatcher(None, [_key(x) for x in old], [_key(x) for x in new], autojunk=False)
    for verdict, i, i_end, j, j_end in matcher.get_opcodes():
        if verdict == "equal":
            changes += _changed(zip(old[i:i_end], new[j:j_end], strict=True), alike)
        else:
            changes += _replaced(old[i:i_end], new[j:j_end], alike)
    totals = sum((x.counts for x in after), Counts()) - sum((x.counts for x in before), Counts())
    return Delta(tuple(changes), totals)


def _as_numbers(layer: Layer) -> Layer:
    counts = dataclasses.replace(layer.counts, trainable=layer.counts.parameters, frozen=0)
    return dataclasses.replace(layer, counts=counts, own_shapes=layer.own_shapes and (_weight(layer),))


def _weight(layer: Layer) -> tuple[int, ...]:
    """The lengths of the axes of its weight, in whatever order a kind lays them."""
    largest: tuple[int, ...] = max(layer.own_shapes, key=lambda shape: (len(shape), 0))
    return tuple(sorted(largest))


def _replaced(old: Sequence[Layer], new: Sequence[Layer], exact: bool) -> list[Change]:
    """One stretch of layers in place of another; what kept its name is changed, not exchanged."""
    old_by_name = {layer.name: layer for layer in old}
    new_names = {layer.name for layer in new}
    changes = [_whole("removed", layer) for layer in old if layer.name not in new_names]
    for layer in new:
        if layer.name in old_by_name:
            changes += _changed([(old_by_name[layer.name], layer)], exact)
        else:
            changes.append(_whole("added", layer))
    return changes


def _changed(pairs: Any, exact: bool) -> list[Change]:
    return [
        Change("changed", new.name, new.type, new.counts - old.counts)
        for old, new in pairs
        if (old.counts, old.own_shapes) != (new.counts, new.own_shapes) or (exact and old.type != new.type)
    ]


def _whole(kind: Literal["added", "removed"], layer: Layer) -> Change:
    return Change(kind, layer.name, layer.type, layer.counts if kind == "added" else Counts() - layer.counts)


def _key(layer: Layer) -> tuple[str, tuple[int, ...]]:
    name = ".".join("#" if part.isdigit() else part for part in layer.name.split("."))
    return name, _weight(layer)


def _signed_counts(counts: Counts) -> list[str]:
    return [signed(n) for n in (counts.trainable, counts.frozen, counts.buffers, counts.bytes)]
