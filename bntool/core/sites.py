"""What is done at one place of a model, or why nothing is: sites, edits, merges, skips. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import msgspec

from bntool.core.reasons import Reason
from bntool.core.schema import Count, Name, Positive, Shape, Text

Expr = tuple[Any, ...]
"""A per-channel affine map as data: `("bn", "layer1.bn1")`, `("slice", expr, axis, start, stop)`, …"""

Dims = Annotated[int, msgspec.Meta(ge=1, le=3)]
Layout = Annotated[str, msgspec.Meta(pattern=r"\A(conv|linear|transposed|matmul|norm|summand)?\Z")]
Method = Annotated[
    str, msgspec.Meta(pattern=r"\A(reparameterize(_layer)?|switch_to_deploy|merge_kernel|fuse)?\Z")
]
"""The methods that the planner calls on a block; a plan can have no other called."""


@dataclasses.dataclass(frozen=True)
class InsertSite:
    """A convolution (or linear layer) whose output gets a new BatchNorm.

    `form` says how the module tree takes it in: `identity` (an `nn.Identity` slot), `sequential`
    (a sibling in an `nn.Sequential`), `wrap` (activation -> Sequential(bn, activation)), `subclass` (a
    convolution that holds its BatchNorm as a child), `pair` (convolution -> Sequential(convolution, bn)), or
    `node` (a node of a graph that has no module tree).
    A layer that runs several times has a BatchNorm for each of its `calls`, the children of `bn`.
    """

    conv: Name
    activation: Name
    bn: Name
    channels: Positive
    form: Literal["identity", "sequential", "wrap", "subclass", "pair", "node"]
    dims: Dims
    activation_kind: Name = ""
    slot: Name = ""
    calls: Positive = 1

    @property
    def norms(self) -> tuple[str, ...]:
        """The BatchNorm of each call."""
        return self.norms_at(self.bn)

    def norms_at(self, bn: str) -> tuple[str, ...]:
        """The same under another name of `bn`."""
        return (bn,) if self.calls == 1 else tuple(f"{bn}.{i}" for i in range(self.calls))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class DroppedBias:
    """A bias that moves into the running mean of the BatchNorms behind its layer: μ' = μ − b.

    `conv` and `bias` are names in the model as it was, `norms` in the model as it will be.
    """

    conv: Name
    bias: Name
    norms: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
    channels: Positive

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "norms": list(self.norms)}


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change in a fold: `scale_output`, `scale_input`, `remove` (the BN itself), and what goes before.

    `reparameterize` lets a block merge its own branches by its `method`, before any other edit.
    `unshare` gives the call site `layer` a `weight` and a `bias` of its own, where they are named; it costs
    `parameters` elements and `bytes`. In any other edit `layer` is the qualified name of the layer; `weight`
    and `bias` are tensor handles (qualified names); `layout` and `groups` say how the weight's axes are laid
    out; `map` is the affine map.
    """

    kind: Literal["scale_output", "scale_input", "remove", "reparameterize", "unshare"]
    layer: Name
    map: Expr | None = None
    weight: Name = ""
    bias: Name = ""
    layout: Layout = ""
    groups: Positive = 1
    method: Method = ""
    parameters: Count = 0
    bytes: Count = 0

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self).items()
        return {k: v for k, v in fields if v not in (None, "", 0) or k == "layer"}


@dataclasses.dataclass(frozen=True)
class Unshared:
    """The layers that got tensors of their own, and what that adds to the model."""

    layers: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "layers": list(self.layers)}


@dataclasses.dataclass(frozen=True)
class FoldSite:
    """A BatchNorm that goes: into which layers, by which laws, and the edits that do it.

    `untrained` tells of one that has seen no batch why it would stay with measured statistics, the code of
    the reason first; empty for any other.
    """

    bn: Name
    into: tuple[Name, ...]
    laws: tuple[Name, ...]
    edits: tuple[Edit, ...]
    level: Literal["module", "graph"] = "module"
    untrained: Text = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "bn": self.bn,
            "into": list(self.into),
            "laws": list(self.laws),
            "level": self.level,
            "untrained": self.untrained,
            "edits": [e.to_dict() for e in self.edits],
        }


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution looks at its input, axis by axis; `before` and `after` count the zeros it pads."""

    kernel: Shape
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape
    groups: Positive


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch of a sum: a convolution, or without a `layer` the value itself, and the map behind it."""

    layer: Name
    weight: Name
    bias: Name
    map: Expr
    window: Window


@dataclasses.dataclass(frozen=True)
class Merge:
    """Parallel branches over one value that become one convolution, `layer`, of the given window.

    `norms` are the BatchNorms that go with it. `values` are the graph's own names of the values that go;
    readers of the last one read the convolution instead. In a module tree they are the layers that give a
    zero from then on, for the forward still adds what they give.
    """

    layer: Name
    weight: Name
    bias: Name
    window: Window
    branches: tuple[Branch, ...]
    norms: tuple[Name, ...]
    values: tuple[Name, ...]


@dataclasses.dataclass(frozen=True)
class Skip:
    """A place that is not cut, and the reason."""

    name: Name
    reason: Reason
    detail: Text = ""

    def to_dict(self, key: str = "name") -> dict[str, Any]:
        return {key: self.name, "reason": self.reason.value, "detail": self.detail}
