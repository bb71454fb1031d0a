"""Carry out a plan that came from outside: judged whole against the model, then applied like any other."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bntool.core.errors import InvariantError
from bntool.core.maps import Allowance
from bntool.core.plan import Plan
from bntool.core.schema import Damaged
from bntool.core.sites import Edit, FoldSite, InsertSite
from bntool.inserting.replaying import options_of
from bntool.layers import NORMED
from bntool.observe.copying import structural_copy
from bntool.observe.modules import is_batch_norm_class, role_of
from bntool.surgery.baking import with_these_plain
from bntool.surgery.fold_modules import carry_out
from bntool.surgery.insert_modules import apply_insert
from bntool.surgery.judging import EditJudge, Held, at
from bntool.surgery.judging_merges import MergeJudge
from bntool.surgery.reparameterising import merge_blocks_of


def replay_fold(model: nn.Module, plan: Plan) -> nn.Module:
    """`apply_fold` of a plan that anybody may have written; `Damaged`, with the place, where it does not fit.

    What a block becomes is known when its method has been called; so that is judged and done first, on the
    copy that is folded.
    """
    if plan.options.get("bake"):
        model = with_these_plain(model, _names(plan.options["bake"]))
    merged = structural_copy(model)
    merge_blocks_of(merged, plan)
    _FoldJudge(model, merged).judge(plan)
    return carry_out(merged, plan)[0]


def replay_insert(model: nn.Module, plan: Plan) -> nn.Module:
    """The same for `apply_insert`."""
    # an older plan leaves out options that there are now
    plan = dataclasses.replace(plan, options=options_of(plan).to_dict())
    _InsertJudge(model).judge(plan)
    try:
        return apply_insert(model, plan)
    except InvariantError as error:
        raise Damaged(str(error)) from error


class _FoldJudge:
    """Judges a fold against a model whose blocks have merged their branches."""

    def __init__(self, original: nn.Module, merged: nn.Module) -> None:
        self.before = _by_name(original)
        self.modules = _by_name(merged)
        self.edits = EditJudge(self._held, _numbers(merged))
        self.made: dict[tuple[int, str], Held] = {}
        self.merged: set[str] = set()

    def judge(self, plan: Plan) -> None:
        self.merged = {name for merge in plan.merges for name in merge.norms}
        for number, site in enumerate(plan.fold_sites):
            with at(f"sites[{number}]"):
                self._site(site)
        merges = MergeJudge(self.modules, self.edits)
        for number, merge in enumerate(plan.merges):
            with at(f"merges[{number}]"):
                merges.judge(merge)

    def _site(self, site: FoldSite) -> None:
        removed = Edit("remove", site.bn) in site.edits
        gone = removed or site.bn in self.merged or not _is_norm(self.modules.get(site.bn))
        known = _is_norm(self.before.get(site.bn)) or (removed and self._is_told(site))
        if not known or not gone:
            raise Damaged(f"{site.bn!r} is no BatchNorm that goes", "bn")
        for number, edit in enumerate(site.edits):
            with at(f"edits[{number}]"):
                self._edit(site, edit)

    def _is_told(self, site: FoldSite) -> bool:
        """Whether it is a module of a user's own whose tensors, and no BatchNorm's, the edits name."""
        module = self.before.get(site.bn)
        if module is None or role_of(type(module)) or any(child._parameters for child in module.children()):
            return False
        maps = [edit.map for edit in site.edits if edit.map is not None]
        return bool(maps) and all(any(n.rpartition(".")[0] == site.bn for n in _tensors_in(m)) for m in maps)

    def _edit(self, site: FoldSite, edit: Edit) -> None:
        if edit.kind == "reparameterize":
            return
        module = self.modules.get(edit.layer)
        if module is None:
            raise Damaged(f"the model has no layer {edit.layer!r}", "layer")
        self.edits.once(edit, site.bn)
        if edit.kind == "remove":
            if edit.layer != site.bn:
                raise Damaged(f"this site is that of {site.bn!r}", "layer")
        elif edit.kind == "unshare":
            for place, handle in (("weight", edit.weight), ("bias", edit.bias)):
                if handle:
                    _require_owner(edit, place, handle)
                    self.edits.allowance.spend(math.prod(self.edits.tensor(handle, place).shape))
        else:
            self._change(edit, module)

    def _change(self, edit: Edit, module: nn.Module) -> None:
        _require_owner(edit, "weight", edit.weight)
        if edit.layout == "norm" and not _is_norm(module):
            raise Damaged(f"{edit.layer!r} is no BatchNorm", "layer")
        missing = {
            place: handle
            for place, handle in (("weight", edit.weight), ("bias", edit.bias))
            if handle and self._held(handle) is None
        }
        for place, handle in missing.items():
            _require_owner(edit, place, handle)
            if handle.rpartition(".")[2] != place or getattr(module, place, None) is not None:
                raise Damaged(f"the model has no tensor {handle!r}, and no room for one", place)
        own = getattr(module, "bias", None)
        linear = edit.layout != "summand" and role_of(type(module)) in ("conv", "linear")
        if linear and not edit.bias and isinstance(own, Tensor):
            raise Damaged(f"it leaves out the bias of {edit.layer!r}", "bias")
        channels = self.edits.change(edit)
        self.made.update({(id(module), place): Held((channels,), True) for place in missing})

    def _held(self, handle: str) -> Held | None:
        owner, _, slot = handle.rpartition(".")
        module = self.modules.get(owner)
        if module is None:
            return None
        for found in (module._parameters.get(slot), module._buffers.get(slot)):
            if found is not None:
                return Held(tuple(found.shape), found.is_floating_point())
        return self.made.get((id(module), slot))


class _InsertJudge:
    """Judges an insertion against a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = _by_name(model)
        self.allowance = Allowance(_numbers(model))

    def judge(self, plan: Plan) -> None:
        after = plan.options["position"] == "after"
        seen: set[str] = set()
        for number, site in enumerate(plan.insert_sites):
            with at(f"sites[{number}]"):
                if site.conv in seen:
                    raise Damaged(f"{site.conv!r} stands here twice", "conv")
                seen.add(site.conv)
                self._site(site, after=after)
        moved: set[str] = set()
        for number, dropped in enumerate(plan.dropped):
            with at(f"dropped_biases[{number}]"):
                layer = self._layer(dropped.conv)
                bias = getattr(layer, "bias", None)
                if not isinstance(bias, Tensor) or dropped.conv in moved:
                    raise Damaged(f"{dropped.conv!r} has no bias that could move", "conv")
                if dropped.bias != f"{dropped.conv}.bias".lstrip("."):
                    raise Damaged(f"it is no bias of {dropped.conv!r}", "bias")
                if bias.shape != (dropped.channels,):
                    raise Damaged(f"the bias of {dropped.conv!r} has shape {list(bias.shape)}", "channels")
                moved.add(dropped.conv)

    def _layer(self, name: str) -> nn.Module:
        layer = self.modules.get(name)
        if layer is None or role_of(type(layer)) not in ("conv", "linear"):
            raise Damaged(f"the model has no convolution or linear layer {name!r}", "conv")
        return layer

    def _site(self, site: InsertSite, *, after: bool) -> None:
        layer = self._layer(site.conv)
        is_conv = role_of(type(layer)) == "conv"
        channels = getattr(layer, "out_channels" if is_conv else "out_features")
        # behind a gated activation there are fewer
        if site.channels > channels or (not after and site.channels != channels):
            raise Damaged(f"{site.conv!r} has {channels} channels", "channels")
        dims = len(getattr(layer, "kernel_size", (1,)))
        if site.dims != dims:
            raise Damaged(f"{site.conv!r} has {dims} dimensions", "dims")
        with at("calls"):
            self.allowance.spend(site.channels, calls=site.calls)
        self._form(site, layer, site.activation if after else site.conv)

    def _form(self, site: InsertSite, layer: nn.Module, behind: str) -> None:
        """The slot is what the form needs; `behind` is the child that a sibling comes after."""
        slot = self.modules.get(site.slot)
        fits = {
            "identity": bool(site.slot) and type(slot) is nn.Identity,
            "sequential": slot is not None and role_of(type(slot)) == "sequential",
            "wrap": bool(site.slot) and slot is not None and not slot._modules and not role_of(type(slot)),
            "subclass": type(layer) in NORMED,
            "pair": type(layer) in NORMED,
        }
        if site.form not in fits:
            raise Damaged("a module tree has no such form", "form")
        if not fits[site.form]:
            raise Damaged(f"{site.slot or site.conv!r} takes in no BatchNorm in the form {site.form}", "slot")
        parent, _, child = behind.rpartition(".")
        if site.form == "sequential" and (parent != site.slot or slot is None or child not in slot._modules):
            raise Damaged(f"{behind!r} is no child of {site.slot!r}", "slot")


def _names(given: Any) -> list[str]:
    if not isinstance(given, list):
        raise Damaged("it is no list of layers", "options.bake")
    return [str(name) for name in given]


def _tensors_in(expr: Any) -> Iterator[str]:
    """The names of the tensors that a map reads."""
    if isinstance(expr, tuple):
        if expr[:1] == ("tensor",) and len(expr) > 1 and isinstance(expr[1], str):
            yield expr[1]
        for part in expr:
            yield from _tensors_in(part)


def _require_owner(edit: Edit, place: str, handle: str) -> None:
    if handle.rpartition(".")[0] != edit.layer:
        raise Damaged(f"{handle!r} is no tensor of {edit.layer!r}", place)


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _is_norm(module: nn.Module | None) -> bool:
    """A BatchNorm by its class, or one of a user's own by its statistics."""
    if module is None or is_batch_norm_class(type(module)):
        return module is not None
    return all(isinstance(getattr(module, slot, None), Tensor) for slot in ("running_mean", "running_var"))


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers()))
