"""What a surgery will do: sites, skips with their reason, and the plan that holds them. No torch here.

A plan is data: it prints as a table, goes to JSON and back, and can be replayed on a fresh model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from bntool.core.errors import DamagedPlan, PlanError
from bntool.core.maps import nested_tuples
from bntool.core.plan_parts import plan_parts
from bntool.core.reasons import Reason
from bntool.core.schema import (
    Damaged,
    Name,
    Shape,
    Text,
    fitted,
    parsed,
    require_known,
    version_of,
)
from bntool.core.showing import Part, Shown
from bntool.core.sites import DroppedBias, Edit, FoldSite, InsertSite, Merge, Skip, Unshared

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Plan(Shown):
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

    def parts(self) -> Sequence[Part]:
        return plan_parts(self)

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
