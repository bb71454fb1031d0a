"""A model's layers as a tree of modules, in the order they ran, with what a surgery did to each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_OPEN_UP_TO = 40
TONES = ("inserted", "folded", "kept", "failed", "holds", "skipped")


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a surgery did to a layer: a tone, a word for it, and the reason."""

    tone: str
    word: str
    text: str


@dataclasses.dataclass
class Node:
    """A layer, or a module with what ran inside it. `reads`: earlier layers, where not just the last."""

    label: str
    name: str
    kind: str
    index: int | None = None
    shape: str = ""
    parameters: int = 0
    mark: Mark | None = None
    reads: tuple[tuple[int, str], ...] = ()
    reads_input: bool = False
    children: list[Node] = dataclasses.field(default_factory=list)
    is_open: bool = False

    @property
    def leaves(self) -> Iterator[Node]:
        if self.index is not None:
            yield self
        for child in self.children:
            yield from child.leaves

    @property
    def tones(self) -> list[tuple[str, int]]:
        """How many layers below have which mark."""
        count = Counter(leaf.mark.tone for leaf in self.leaves if leaf.mark is not None)
        return [(tone, count[tone]) for tone in TONES if count[tone]]


@dataclasses.dataclass(frozen=True)
class Tree:
    """One side of the diagram: how many `layers` a summary counts, and how many of its own are `drawn`."""

    side: str
    model_class: str
    root: Node
    layers: int
    drawn: int
    left_out: int


def grown(side: str, data: Mapping[str, Any], marks: Mapping[str, Mark]) -> Tree:
    """The tree of the document's part `model.before` or `model.after`."""
    rows, modules = data["layers"], data["modules"]
    root = Node(str(data["class"]), "", "")
    path: list[Node] = [root]
    for index, row in enumerate(rows):
        name = str(row["name"])
        parts = _parts(name)
        around = parts if row["op"] else parts[:-1]
        depth = 0
        while depth < len(around) and depth + 1 < len(path) and path[depth + 1].label == around[depth]:
            depth += 1
        del path[depth + 1 :]
        for part in around[depth:]:
            inner = f"{path[-1].name}.{part}" if path[-1].name else part
            node = Node(part, inner, str(modules.get(inner, "")))
            path[-1].children.append(node)
            path.append(node)
        leaf = _leaf(index, row, rows, marks)
        if row["op"]:
            leaf.label = leaf.kind
            leaf.kind = ""
        path[-1].children.append(leaf)
    for node in _modules(root):
        node.parameters = sum(leaf.parameters for leaf in node.leaves)
        node.is_open = node is root or len(rows) <= _OPEN_UP_TO
        for side_of in node.children:
            side_of.is_open = len(rows) <= _OPEN_UP_TO
    drawn = _layers(rows) + int(data["left_out"])
    counted = data.get("count")  # an older document does not tell
    return Tree(
        side, str(data["class"]), root, drawn if counted is None else counted, drawn, data["left_out"]
    )


def _layers(rows: Sequence[Mapping[str, Any]]) -> int:
    """One that runs twice is one, and an operation is none."""
    return len({str(row["name"]) for row in rows if not row["op"] or row["parameters"]})


def _leaf(index: int, row: Mapping[str, Any], rows: list[Any], marks: Mapping[str, Mark]) -> Node:
    sources = [int(i) for i in row["from"] if 0 <= int(i) < len(rows)]
    name = str(row["name"])
    parts = _parts(name)
    return Node(
        label=parts[-1] if parts else str(row["kind"]),
        name=name,
        kind=str(row["kind"]),
        index=index,
        shape="×".join(str(int(n)) for n in row.get("shape", ())),
        parameters=int(row["parameters"]),
        mark=None if row["op"] else marks.get(name),
        reads=() if sources == [index - 1] else tuple((i, shown(rows[i])) for i in sources),
        reads_input=not sources and index > 0,
    )


def shown(row: Mapping[str, Any]) -> str:
    """A layer's name, or for an operation its kind and where it runs."""
    return f"{row['kind']} in {row['name'] or 'the model'}" if row["op"] else str(row["name"])


def _parts(name: str) -> list[str]:
    """`layer1.0.conv1` by its dots; a node of a graph by its slashes."""
    return [part for part in name.split("/" if name.startswith("/") else ".") if part]


def _modules(node: Node) -> Iterator[Node]:
    if node.index is None:
        yield node
        for child in node.children:
            yield from _modules(child)
