"""What a surgery will do: sites, skips with their reason, and the plan that holds them. No torch here.

A plan is data: it prints as a table, goes to JSON and back, and can be replayed on a fresh model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec

from bntool.core.errors import DamagedPlan, PlanError
from bntool.core.maps import nested_tuples
from bntool.core.reasons import Reason
from bntool.core.schema import (
    Count,
    Damaged,
    Name,
    Positive,
    Shape,
    Text,
    fitted,
    parsed,
    require_known,
    version_of,
)

SCHEMA_VERSION = 1

Expr = tuple[Any, ...]
"""A per-channel affine map as data: `("bn", "layer1.bn1")`, `("slice", expr, axis, start, stop)`, …"""

Dims = Annotated[int, msgspec.Meta(ge=1, le=3)]
Layout = Annotated[str, msgspec.Meta(pattern=r"\A(conv|linear|transposed|matmul|norm)?\Z")]
Method = Annotated[str, msgspec.Meta(pattern=r"\A(reparameterize|switch_to_deploy|fuse)?\Z")]
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
    """A BatchNorm that goes: into which layers, by which laws, and the edits that do it."""

    bn: Name
    into: tuple[Name, ...]
    laws: tuple[Name, ...]
    edits: tuple[Edit, ...]
    level: Literal["module", "graph"] = "module"

    def to_dict(self) -> dict[str, Any]:
        return {
            "bn": self.bn,
            "into": list(self.into),
            "laws": list(self.laws),
            "level": self.level,
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
    readers of the last one read the convolution instead.
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sites and skips of one surgery on one model.

    `signature` maps every tensor of the model it was made for to its shape, so that a plan for
    another model is refused with the first difference named. `key_map` maps old state_dict keys to
    new ones where they differ. `dropped` are the biases that an insertion moves into running means.
    `aliases` are the other names, after the insertion, of newcomers, of the biases that would still be there
    and of the BatchNorms that take them in, where a module is registered under several names.
    `merges` come after the edits of the sites; a BatchNorm that goes with one has a site without edits.
    `eps` is ε of every BatchNorm that a fold reads, which no tensor holds.
    """

    action: Literal["insert", "fold"]
    sites: tuple[InsertSite | FoldSite, ...]
    skips: tuple[Skip, ...]
    model_class: str = ""
    signature: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dropped: tuple[DroppedBias, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    merges: tuple[Merge, ...] = ()
    eps: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sites or self.dropped or self.merges)

    @property
    def insert_sites(self) -> Iterator[InsertSite]:
        return (s for s in self.sites if isinstance(s, InsertSite))

    @property
    def fold_sites(self) -> Iterator[FoldSite]:
        return (s for s in self.sites if isinstance(s, FoldSite))

    @property
    def unshared(self) -> Unshared:
        """What the clones of shared layers cost, all sites together."""
        clones = [edit for site in self.fold_sites for edit in site.edits if edit.kind == "unshare"]
        layers = tuple(dict.fromkeys(edit.layer for edit in clones))
        return Unshared(layers, sum(edit.parameters for edit in clones), sum(edit.bytes for edit in clones))

    def to_dict(self) -> dict[str, Any]:
        skip_key = "bn" if self.action == "fold" else "name"
        return {
            "schema_version": SCHEMA_VERSION,
            "action": self.action,
            "model_class": self.model_class,
            "signature": {k: list(v) for k, v in self.signature.items()},
            "options": dict(self.options),
            "sites": [s.to_dict() for s in self.sites],
            "skips": [s.to_dict(skip_key) for s in self.skips],
            "key_map": dict(self.key_map),
            "notes": list(self.notes),
            "dropped_biases": [d.to_dict() for d in self.dropped],
            "aliases": {k: list(v) for k, v in self.aliases.items()},
            "merges": [dataclasses.asdict(m) for m in self.merges],
            "eps": dict(self.eps),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back.

        Raises:
            DamagedPlan: the document is no plan; where in it the fault is.
            PlanError: it has a newer schema.
        """
        version = version_of(data)
        if version is None:
            raise DamagedPlan.of("it is not a bntool plan (no schema_version)", "")
        if version > SCHEMA_VERSION:
            raise PlanError(
                f"this plan has schema version {version}; this bntool reads up to {SCHEMA_VERSION}",
                next_step="pip install --upgrade bntool",
            )
        try:
            return _plan(data)
        except Damaged as error:
            raise DamagedPlan.of(error.why, error.place) from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = parsed(text.encode("utf-8", "surrogatepass"))
        except Damaged as error:
            raise DamagedPlan.of(error.why, error.place) from error
        return cls.from_dict(data)

    def require_signature(self, signature: Mapping[str, tuple[int, ...]], model_class: str) -> None:
        """Raise `PlanError`, naming the first difference, unless the model is the one planned for."""
        for name, shape in self.signature.items():
            if name not in signature:
                raise self.other_model(model_class, f"it has no tensor {name!r}")
            if tuple(signature[name]) != tuple(shape):
                raise self.other_model(
                    model_class, f"{name!r} is {list(signature[name])}, the plan expects {list(shape)}"
                )
        for name in signature:
            if name not in self.signature:
                raise self.other_model(model_class, f"it has a tensor {name!r} that the plan does not know")

    def other_model(self, model_class: str, difference: str) -> PlanError:
        """The refusal of a model that the plan was not made for."""
        return PlanError(
            f"this plan was made for another model ({self.model_class}): {difference}",
            where=model_class,
            next_step="make a new plan for this model",
        )


class ByPlan:
    """What every result of a surgery can say of the plan behind it."""

    plan: Plan

    @property
    def sites(self) -> tuple[InsertSite | FoldSite, ...]:
        return self.plan.sites

    @property
    def skips(self) -> tuple[Skip, ...]:
        return self.plan.skips

    @property
    def modified(self) -> bool:
        return bool(self.plan)


# -- the document ---------------------------------------------------------------------------------------


_Option = bool | int | float | Text | list[Text] | None
_Epsilon = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Kept(msgspec.Struct):
    """A skip of a fold, which calls its place a BatchNorm."""

    bn: Name
    reason: Reason
    detail: Text = ""


class _Document(msgspec.Struct, tag_field="action", kw_only=True):
    sites: tuple[Any, ...]
    skips: tuple[Any, ...]
    model_class: Name = ""
    signature: dict[Name, Shape] = {}
    options: dict[Name, _Option] = {}
    key_map: dict[Name, Name] = {}
    notes: tuple[Text, ...] = ()
    dropped_biases: tuple[DroppedBias, ...] = ()
    aliases: dict[Name, tuple[Name, ...]] = {}
    merges: tuple[Merge, ...] = ()
    eps: dict[Name, _Epsilon] = {}


class _Insertion(_Document, tag="insert", kw_only=True):
    sites: tuple[InsertSite, ...]
    skips: tuple[Skip, ...]


class _Fold(_Document, tag="fold", kw_only=True):
    sites: tuple[FoldSite, ...]
    skips: tuple[_Kept, ...]


def _plan(data: Mapping[str, Any]) -> Plan:
    """The plan that a document holds; `Damaged` where it holds none."""
    document: _Insertion | _Fold = fitted(data, _Insertion | _Fold)  # type: ignore[arg-type]
    require_known(data.get("dropped_biases", ()), DroppedBias, "dropped_biases")
    require_known(data.get("merges", ()), Merge, "merges")
    sites: tuple[InsertSite | FoldSite, ...]
    if isinstance(document, _Fold):
        require_known(data["sites"], FoldSite, "sites")
        for number, site in enumerate(data["sites"]):
            require_known(site["edits"], Edit, f"sites[{number}].edits")
        sites = tuple(_with_maps(site, f"sites[{i}]", "edits") for i, site in enumerate(document.sites))
        skips = tuple(Skip(kept.bn, kept.reason, kept.detail) for kept in document.skips)
    else:
        require_known(data["sites"], InsertSite, "sites")
        sites, skips = document.sites, document.skips
    return Plan(
        action="fold" if isinstance(document, _Fold) else "insert",
        sites=sites,
        skips=skips,
        model_class=document.model_class,
        signature=document.signature,
        options=document.options,
        key_map=document.key_map,
        notes=document.notes,
        dropped=document.dropped_biases,
        aliases=document.aliases,
        merges=tuple(_with_maps(m, f"merges[{i}]", "branches") for i, m in enumerate(document.merges)),
        eps=document.eps,
    )


def _with_maps(held: Any, place: str, key: str) -> Any:
    """A site or a merge whose parts have their maps as tuples."""
    parts = []
    for number, part in enumerate(getattr(held, key)):
        try:
            parts.append(dataclasses.replace(part, map=nested_tuples(part.map)))
        except Damaged as error:
            raise error.within(f"{place}.{key}[{number}].map") from None
    return dataclasses.replace(held, **{key: tuple(parts)})
