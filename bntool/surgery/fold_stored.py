"""Fold the weights in a file by a saved plan, layer by layer: the model is never built, nor held.

Without the model nothing can be run beside the original. So only what holds for any weights is carried out: a
BatchNorm that goes straight into the layer before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bntool.affine import Pair, batch_norm_affine, evaluate
from bntool.errors import DamagedPlan, NothingToDo, PlanError, StateError
from bntool.files.atomic import sha256_of
from bntool.files.safetensors_files import Entry, layout, write_safetensors
from bntool.files.shards import write_shards
from bntool.files.stored import Described, Stored
from bntool.files.targets import Drafts, Target
from bntool.plan import Edit, FoldSite, Plan
from bntool.schema import Damaged
from bntool.surgery.judging import EditJudge, Held, at
from bntool.surgery.tensors import edited

_STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_FOLDED_TYPES = ("float64", "float32", "float16", "bfloat16")
_STRAIGHT = frozenset({"conv", "linear"})


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer that changes: where its tensors are, and the edits with their maps, in the plan's order."""

    weight: str
    bias: str
    steps: list[tuple[Edit, Pair]]


class StoredFold:
    """What a plan makes of a file of weights: which tensors the new file has, each made when it is written.

    Raises `DamagedPlan` for a plan that names what the file has not, `PlanError` for one that was made for
    other weights, or that needs the model; `StateError` for statistics that are not finite, or negative.
    """

    def __init__(self, stored: Stored, plan: Plan) -> None:
        self.stored, self.plan = stored, plan
        _require_fitting(stored, plan)
        try:
            _judge(stored, plan)
            self.layers = self._layers()
        except Damaged as error:
            raise DamagedPlan.of(error.why, error.place) from error
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None
        self.gone = {f"{site.bn}.{slot}" for site in plan.fold_sites for slot in _STATISTICS}
        self.tensors = dict(self._described())

    def write(self, output: Path, *, force: bool = False) -> str:
        """Write the new file, or files, as safetensors, whole or not at all; return its sha256."""
        target = Target(force=force, reads=self.stored.files)
        path = target.claim(output)
        with target.drafts() as drafts:
            return self.write_draft(path, drafts)

    def write_draft(self, path: Path, drafts: Drafts) -> str:
        """The same into the drafts of a claimed `path`, to be put into place with the other files."""
        if not self.stored.sharded:
            draft = drafts.of(path)
            self._fill("", draft)
            return sha256_of(draft)
        parts = {name: described.shard for name, described in self.tensors.items()}
        sizes = {name: entry.nbytes for name, entry in self._entries("").items()}
        return write_shards(path, parts, sizes, self.stored.metadata, self._fill, drafts)

    def _entries(self, shard: str) -> dict[str, Entry]:
        chosen = ((n, d) for n, d in self.tensors.items() if shard in ("", d.shard))
        return layout((name, described.dtype, described.shape) for name, described in chosen)

    def _fill(self, shard: str, path: Path) -> None:
        entries = self._entries(shard)
        metadata = {"format": "pt"} if self.stored.sharded else dict(self.stored.metadata)
        write_safetensors(path, entries, metadata, map(self.tensor, entries))

    def tensor(self, name: str) -> Tensor:
        """One tensor of the new file."""
        layer = self.layers.get(name)
        if layer is None:
            return self.stored.read(name)
        weight, bias = self._changed(layer.weight)
        return weight if name == layer.weight else bias

    def _changed(self, handle: str) -> tuple[Tensor, Tensor]:
        """A layer's weight and bias, kept until another layer is asked for: they are written together."""
        if self._last is None or self._last[0] != handle:
            self._last = None
            self._last = handle, self._computed(self.layers[handle])
        return self._last[1]

    def _computed(self, layer: _Layer) -> tuple[Tensor, Tensor]:
        weight = self.stored.read(layer.weight)
        bias: Tensor | None = self.stored.read(layer.bias) if layer.bias in self.stored.tensors else None
        for edit, pair in layer.steps:
            weight, bias = edited(edit, weight, bias, pair)
        made = torch.zeros(1) if bias is None else bias
        for name, tensor in ((layer.weight, weight), (layer.bias, made)):
            # NaN passes through to both ends; no copy is made, as isfinite would.
            if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
                raise StateError(
                    f"the folded {name} is not finite in {tensor.dtype}",
                    where=str(self.stored.path),
                    next_step="make a plan that leaves its BatchNorm out, or store the weights in float32",
                )
        return weight, made

    def _described(self) -> Iterator[tuple[str, Described]]:
        """The tensors of the new file, a layer's bias right behind its weight."""
        for name, described in self.stored.tensors.items():
            layer = self.layers.get(name)
            if name in self.gone or (layer is not None and name == layer.bias):
                continue
            yield name, described
            if layer is None:
                continue
            if layer.bias in self.stored.tensors:
                yield layer.bias, dataclasses.replace(self.stored.tensors[layer.bias], shard=described.shard)
            elif layer.bias:
                channels = len(layer.steps[0][1][1])
                yield layer.bias, Described(described.dtype, (channels,), described.shard)

    def _layers(self) -> dict[str, _Layer]:
        """Every layer that changes, by the name of its weight and by that of its bias."""
        layers: dict[str, _Layer] = {}
        every = [edit for site in self.plan.fold_sites for edit in site.edits]
        bias_of = {edit.weight: edit.bias for edit in every if edit.bias}
        for number, site in enumerate(self.plan.fold_sites):
            for place, edit in enumerate(site.edits):
                if edit.map is None:
                    continue
                pair = evaluate(edit.map, self._leaf)
                if not all(map(torch.equal, pair, self._leaf("bn", site.bn))):
                    # what nothing can run beside the original must be plain to see
                    raise Damaged(
                        f"it is not what {site.bn!r} computes", f"sites[{number}].edits[{place}].map"
                    )
                if edit.weight not in bias_of and bool((pair[1] != 0).any()):
                    raise PlanError(
                        f"the plan makes no bias for {edit.layer}, and these weights need one: the BatchNorm "
                        "that it was made from shifted nothing",
                        next_step="make the plan from a trained checkpoint of the same architecture",
                    )
                layer = layers.setdefault(edit.weight, _Layer(edit.weight, bias_of.get(edit.weight, ""), []))
                layer.steps.append((edit, pair))
                if layer.bias:
                    layers[layer.bias] = layer
        return layers

    def _leaf(self, kind: str, name: str) -> Pair | Tensor:
        if kind == "tensor":
            return self.stored.read(name)
        gamma, beta, mean, variance = (
            self.stored.read(f"{name}.{slot}") if f"{name}.{slot}" in self.stored.tensors else None
            for slot in _STATISTICS[:4]
        )
        if mean is None or variance is None or name not in self.plan.eps:
            raise PlanError(
                f"the plan does not tell ε of {name}"
                if mean is not None
                else f"{name} has no running statistics",
                next_step="make the plan again with this version of bntool",
            )
        pair = batch_norm_affine(gamma, beta, mean, variance, self.plan.eps[name])
        if not bool(torch.isfinite(pair[0] + pair[1]).all()) or bool((variance < 0).any()):
            raise StateError(
                f"the statistics of BatchNorm {name} are not finite, or its variance is negative",
                where=str(self.stored.path),
                next_step=f"train or calibrate the model again, or leave it out with --exclude {name}",
            )
        return pair


def _require_fitting(stored: Stored, plan: Plan) -> None:
    """The plan is a fold of weights of these names and shapes, and needs nothing but them."""
    if plan.action != "fold":
        raise PlanError(f"it is the plan of an {plan.action}", next_step="name the plan of a fold")
    if not plan.sites:
        raise NothingToDo("the plan folds nothing", next_step="make another plan")
    for name, described in stored.tensors.items():
        shape = plan.signature.get(name)
        if shape is None:
            raise PlanError(
                f"the plan was made for another model ({plan.model_class}): it knows no tensor {name!r}",
                where=str(stored.path),
                next_step="fold with the model: --arch instead of --plan",
            )
        if tuple(shape) != described.shape:
            raise PlanError(
                f"the plan was made for another model ({plan.model_class}): {name!r} is "
                f"{list(described.shape)}, the plan expects {list(shape)}",
                where=str(stored.path),
                next_step="fold with the model: --arch instead of --plan",
            )
    for site in plan.fold_sites:
        straight = set(site.laws) <= _STRAIGHT and site.level == "module" and len(site.laws) == 1
        kinds = {edit.kind for edit in site.edits}
        own = {n for n in stored.tensors if n.startswith(f"{site.bn}.")} - {
            f"{site.bn}.{s}" for s in _STATISTICS
        }
        if not straight or kinds != {"scale_output", "remove"} or own or plan.merges:
            raise PlanError(
                f"{site.bn} does not go straight into the layer before it "
                f"({', '.join(site.laws) or 'merge'}), which needs the model to be checked",
                where=str(stored.path),
                next_step=f"fold with the model (--arch), or make the plan with --exclude {site.bn}",
            )
    for site in plan.fold_sites:
        for name in (edit.weight for edit in site.edits if edit.kind != "remove"):
            if name not in stored.tensors:
                raise PlanError(
                    f"the plan changes {name}, which the file does not hold",
                    where=str(stored.path),
                    next_step="fold with the model: --arch instead of --plan",
                )
        _require_foldable_types(stored, site)


def _require_foldable_types(stored: Stored, site: FoldSite) -> None:
    """What is read and changed is in a type whose arithmetic is that of real numbers."""
    changed = {name for edit in site.edits for name in (edit.weight, edit.bias)}
    for name in stored.tensors.keys() & {*changed, *(f"{site.bn}.{slot}" for slot in _STATISTICS[:4])}:
        if stored.tensors[name].dtype not in _FOLDED_TYPES:
            raise PlanError(
                f"{name} is stored as {stored.tensors[name].dtype}, in which nothing is folded",
                where=str(stored.path),
                next_step=f"store it as one of {', '.join(_FOLDED_TYPES)}",
            )


def _judge(stored: Stored, plan: Plan) -> None:
    """Raise `Damaged`, with the place, unless each BatchNorm goes once, into a layer that the file holds."""

    def held(handle: str) -> Held | None:
        found = stored.tensors.get(handle)
        return found if found is None else Held(found.shape, getattr(torch, found.dtype).is_floating_point)

    edits = EditJudge(held, sum(math.prod(d.shape) for d in stored.tensors.values()))
    for number, site in enumerate(plan.fold_sites):
        for place, edit in enumerate(site.edits):
            with at(f"sites[{number}].edits[{place}]"):
                edits.once(edit, site.bn)
                if edit.kind == "remove" and edit.layer != site.bn:
                    raise Damaged(f"this site is that of {site.bn!r}", "layer")
                if edit.kind != "remove":
                    beside = f"{edit.layer}.bias".lstrip(".")
                    if not edit.bias and held(beside) is not None:
                        raise Damaged(f"it leaves out {beside!r}", "bias")
                    edits.change(edit)
