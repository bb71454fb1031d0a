"""Fold the weights in a file by a saved plan, layer by layer: the model is never built, nor held.

Without the model nothing can be run beside the original. So only what holds for any weights is carried out: a
BatchNorm that goes straight into the layer before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bntool.core.errors import DamagedPlan, NothingToDo, PlanError, StateError
from bntool.core.plan import Plan
from bntool.core.schema import Damaged
from bntool.core.sites import Branch, Edit, FoldSite, Merge
from bntool.files.stored import Described, Stored
from bntool.graph.affine import batch_norm_affine, is_finite
from bntool.graph.steps import evaluate
from bntool.surgery.editing import Edits, Role, Slot, StoredNorm
from bntool.surgery.judging import EditJudge, Held, at

_STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_FOLDED_TYPES = ("float64", "float32", "float16", "bfloat16")
_STRAIGHT = frozenset({"conv", "linear"})


def fold_stored(stored: Stored, plan: Plan) -> Stored:
    """What a plan makes of a file of weights: each tensor is made when it is read.

    Raises `DamagedPlan` for a plan that names what the file has not, `PlanError` for one that was made for
    other weights, or that needs the model; `StateError` for statistics that are not finite, or negative.
    """
    made = _StoredFold(stored, plan)
    return dataclasses.replace(stored, tensors=made.tensors, read=made.tensor)


class _StoredFold:
    """The tensors that the new file has, and the edits that make them."""

    def __init__(self, stored: Stored, plan: Plan) -> None:
        self.file, self.plan = stored, plan
        _require_fitting(stored, plan)
        every = [edit for site in plan.fold_sites for edit in site.edits]
        self.bias_of = {edit.weight: edit.bias for edit in every if edit.bias}
        self.edits = Edits(self)
        try:
            _judge(stored, plan)
            self._edit()
        except Damaged as error:
            raise DamagedPlan.of(error.why, error.place) from error
        self.changed = {str(slot) for slot in self.edits.changed()}
        self.gone = {f"{site.bn}.{slot}" for site in plan.fold_sites for slot in _STATISTICS}
        self.tensors = dict(self._described())

    def tensor(self, name: str) -> Tensor:
        """One tensor of the new file."""
        if name not in self.changed:
            return self.file.read(name)
        tensor = self.edits.rounded(name)
        # NaN passes through to both ends; no copy is made, as isfinite would.
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise StateError(
                f"the folded {name} is not finite in {tensor.dtype}",
                where=str(self.file.path),
                next_step="make a plan that leaves its BatchNorm out, or store the weights in float32",
            )
        return tensor

    def _described(self) -> Iterator[tuple[str, Described]]:
        """The tensors of the new file, a layer's bias right behind its weight."""
        biases = set(self.bias_of.values())
        for name, described in self.file.tensors.items():
            if name in self.gone or name in biases:
                continue
            yield name, described
            bias = self.bias_of.get(name, "")
            if bias in self.file.tensors:
                yield bias, dataclasses.replace(self.file.tensors[bias], shard=described.shard)
            elif bias:
                yield bias, Described(described.dtype, (self.edits.length(bias),), described.shard)

    def _edit(self) -> None:
        for number, site in enumerate(self.plan.fold_sites):
            for place, edit in enumerate(site.edits):
                if edit.map is None:
                    continue
                if not all(
                    map(torch.equal, evaluate(edit.map, self.edits.leaf), self.edits.leaf("bn", site.bn))
                ):
                    # what nothing can run beside the original must be plain to see
                    raise Damaged(
                        f"it is not what {site.bn!r} computes", f"sites[{number}].edits[{place}].map"
                    )
                self.edits.change(dataclasses.replace(edit, bias=self.bias_of.get(edit.weight, "")))

    # -- the tensors of the file ------------------------------------------------------------------------

    def slot(self, part: Edit | Branch | Merge, role: Role) -> str:
        return part.weight if role == "weight" else part.bias

    def constant(self, handle: str) -> Tensor:
        return self.file.read(handle)

    def stored(self, slot: Slot) -> Tensor | None:
        return self.file.read(str(slot)) if slot in self.file.tensors else None

    def like(self, slot: Slot) -> Tensor:
        return torch.empty(0, dtype=getattr(torch, self.tensors[str(slot)].dtype))

    def norm(self, name: str) -> StoredNorm:
        gamma, beta, mean, variance = (self.stored(f"{name}.{slot}") for slot in _STATISTICS[:4])
        if mean is None or variance is None or name not in self.plan.eps:
            raise PlanError(
                f"the plan does not tell ε of {name}"
                if mean is not None
                else f"{name} has no running statistics",
                next_step="make the plan again with this version of bntool",
            )
        eps = self.plan.eps[name]
        if not is_finite(batch_norm_affine(gamma, beta, mean, variance, eps)) or bool((variance < 0).any()):
            raise StateError(
                f"the statistics of BatchNorm {name} are not finite, or its variance is negative",
                where=str(self.file.path),
                next_step=f"train or calibrate the model again, or leave it out with --exclude {name}",
            )
        return StoredNorm(f"{name}.weight", f"{name}.bias", mean, variance, eps)


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
