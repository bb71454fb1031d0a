"""Are the merges of a module's plan such that its layers can take them? Judged before any is carried out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from bntool.core.maps import shape_of
from bntool.core.schema import Damaged
from bntool.core.sites import Branch, Merge, Window
from bntool.laws.merging import identity_window, joined
from bntool.observe.modules import role_of
from bntool.surgery.judging import EditJudge, at


class MergeJudge:
    """Judges merges against the modules of one model, by name."""

    def __init__(self, modules: Mapping[str, nn.Module], edits: EditJudge) -> None:
        self.modules, self.edits = modules, edits
        self.used: set[str] = set()

    def judge(self, merge: Merge) -> None:
        """`Damaged`, with the place, where a merge cannot be carried out."""
        rows, width = self._heir(merge)
        layers = [branch.layer for branch in merge.branches if branch.layer]
        if merge.layer not in layers or not {*layers, *merge.norms}.isdisjoint(self.used):
            raise Damaged(f"{merge.layer!r} is no convolution of this sum alone", "branches")
        self.used.update(layers, merge.norms)
        for number, branch in enumerate(merge.branches):
            with at(f"branches[{number}]"):
                self._branch(branch, rows, width, len(merge.window.kernel))
        if joined([branch.window for branch in merge.branches]) != merge.window:
            raise Damaged("it is not the window of its branches", "window")
        if merge.window.before != merge.window.after:
            raise Damaged("a layer pads alike before and after", "window")
        self.edits.allowance.spend(rows * (width // merge.window.groups) * math.prod(merge.window.kernel))
        for name in merge.norms:
            with at("norms"):
                self.edits.leaf("bn", name)
        for name in merge.values:
            if name == merge.layer or name not in (*layers, *merge.norms):
                raise Damaged(f"{name!r} is no layer of this sum", "values")

    def _heir(self, merge: Merge) -> tuple[int, int]:
        """The channels that the convolution gives, and those that it reads."""
        layer = self.modules.get(merge.layer)
        if (
            layer is None
            or role_of(type(layer)) != "conv"
            or merge.weight != f"{merge.layer}.weight".lstrip(".")
        ):
            raise Damaged(f"{merge.layer!r} is no convolution", "layer")
        if merge.bias not in ("", f"{merge.layer}.bias".lstrip(".")):
            raise Damaged(f"{merge.bias!r} is not its bias", "bias")
        shape = self.edits.tensor(merge.weight, "weight").shape
        return shape[0], shape[1] * int(getattr(layer, "groups", 1))

    def _branch(self, branch: Branch, rows: int, width: int, dims: int) -> None:
        window = branch.window
        with at("map"):
            if shape_of(branch.map, self.edits.leaf, self.edits.allowance) != (rows,):
                raise Damaged(f"it does not give a number for each of {rows} channels")
        if not branch.layer:
            if window != identity_window(dims, rows) or rows != width:
                raise Damaged("it is not the window of the value itself", "window")
            return
        for place, handle in (("weight", branch.weight), ("bias", branch.bias)):
            if handle and handle.rpartition(".")[0] != branch.layer:
                raise Damaged(f"{handle!r} is no tensor of {branch.layer!r}", place)
        shape = self.edits.tensor(branch.weight, "weight").shape
        if branch.bias and self.edits.tensor(branch.bias, "bias").shape != (rows,):
            raise Damaged(f"{branch.bias!r} is not one number for each of {rows} channels", "bias")
        if not _fits(window, dims) or shape != (rows, width // window.groups, *window.kernel):
            raise Damaged(f"{branch.weight!r} of shape {list(shape)} is not of this window", "window")


def _fits(window: Window, dims: int) -> bool:
    """Whether a window has a number for every axis, and a kernel, a stride and a dilation that is one."""
    parts = (window.kernel, window.stride, window.dilation)
    whole = all(len(part) == dims for part in (*parts, window.before, window.after))
    return whole and all(number > 0 for part in parts for number in part)
