"""What a surgery will do: sites, skips with their reason, and the plan that holds them. No torch here.

A plan is data: it prints as a table, goes to JSON and back, and can be replayed on a fresh model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bntool.errors import PlanError
from bntool.reasons import Reason

SCHEMA_VERSION = 1

Expr = tuple[Any, ...]
"""A per-channel affine map as data: `("bn", "layer1.bn1")`, `("slice", expr, axis, start, stop)`, …"""


@dataclasses.dataclass(frozen=True)
class InsertSite:
    """A convolution (or linear layer) whose output gets a new BatchNorm.

    `form` says how the module tree takes it in: `identity` (an `nn.Identity` slot), `sequential`
    (a sibling in an `nn.Sequential`), `wrap` (activation -> Sequential(bn, activation)), `subclass` (a
    convolution that holds its BatchNorm as a child), `pair` (convolution -> Sequential(convolution, bn)), or
    `node` (a node of a graph that has no module tree).
    A layer that runs several times has a BatchNorm for each of its `calls`, the children of `bn`.
    """

    conv: str
    activation: str
    bn: str
    channels: int
    form: Literal["identity", "sequential", "wrap", "subclass", "pair", "node"]
    dims: int
    activation_kind: str = ""
    slot: str = ""
    calls: int = 1

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

    conv: str
    bias: str
    norms: tuple[str, ...]
    channels: int

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
    layer: str
    map: Expr | None = None
    weight: str = ""
    bias: str = ""
    layout: str = ""
    groups: int = 1
    method: str = ""
    parameters: int = 0
    bytes: int = 0

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

    bn: str
    into: tuple[str, ...]
    laws: tuple[str, ...]
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

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch of a sum: a convolution, or without a `layer` the value itself, and the map behind it."""

    layer: str
    weight: str
    bias: str
    map: Expr
    window: Window


@dataclasses.dataclass(frozen=True)
class Merge:
    """Parallel branches over one value that become one convolution, `layer`, of the given window.

    `norms` are the BatchNorms that go with it. `values` are the graph's own names of the values that go;
    readers of the last one read the convolution instead.
    """

    layer: str
    weight: str
    bias: str
    window: Window
    branches: tuple[Branch, ...]
    norms: tuple[str, ...]
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Skip:
    """A place that is not cut, and the reason."""

    name: str
    reason: Reason
    detail: str = ""

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
        """Read a plan back. `PlanError` for a newer schema or a document that is not a plan."""
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise PlanError("this document is not a bntool plan (no schema_version)")
        if version > SCHEMA_VERSION:
            raise PlanError(
                f"this plan has schema version {version}; this bntool reads up to {SCHEMA_VERSION}",
                next_step="pip install --upgrade bntool",
            )
        try:
            action = data["action"]
            if action not in ("insert", "fold"):
                raise ValueError(f"unknown action {action!r}")
            sites: tuple[InsertSite | FoldSite, ...]
            if action == "insert":
                sites = tuple(InsertSite(**s) for s in data["sites"])
            else:
                sites = tuple(_fold_site(s) for s in data["sites"])
            skips = tuple(
                Skip(s.get("bn", s.get("name")), Reason(s["reason"]), s.get("detail", ""))
                for s in data["skips"]
            )
            return cls(
                action=action,
                sites=sites,
                skips=skips,
                model_class=data.get("model_class", ""),
                signature={k: tuple(v) for k, v in data.get("signature", {}).items()},
                options=dict(data.get("options", {})),
                key_map=dict(data.get("key_map", {})),
                notes=tuple(data.get("notes", ())),
                dropped=tuple(
                    DroppedBias(**{**d, "norms": tuple(d["norms"])}) for d in data.get("dropped_biases", ())
                ),
                aliases={k: tuple(v) for k, v in data.get("aliases", {}).items()},
                merges=tuple(_merge(m) for m in data.get("merges", ())),
                eps={name: float(eps) for name, eps in data.get("eps", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {error}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this plan is not JSON: {error}") from error
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


def _fold_site(data: Mapping[str, Any]) -> FoldSite:
    edits = tuple(Edit(**{**e, "map": _tuples(e.get("map"))}) for e in data["edits"])
    return FoldSite(data["bn"], tuple(data["into"]), tuple(data["laws"]), edits, data.get("level", "module"))


def _merge(data: Mapping[str, Any]) -> Merge:
    branches = tuple(
        Branch(**{**b, "map": _tuples(b["map"]), "window": _window(b["window"])}) for b in data["branches"]
    )
    names = {key: tuple(data[key]) for key in ("norms", "values")}
    return Merge(**{**data, **names, "branches": branches, "window": _window(data["window"])})


def _window(data: Mapping[str, Any]) -> Window:
    return Window(**{key: _tuples(value) for key, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
