"""Why the BatchNorms that stay must stay, family by family, each reason worked out by hand.

γ has both signs and every shift is there, as in trained weights. A pattern stands for the BatchNorms of one
kind; every one that stays must be under exactly one pattern, with that reason and that detail.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.files.references import build
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.module_folding import plan_module_fold
from tools.sweeps.zoo import randomise

SHARED = Reason.OUTPUT_USED_ELSEWHERE


@dataclasses.dataclass(frozen=True)
class Kept:
    """BatchNorms that stay: their names, how many, the reason, and what stands upstream and downstream."""

    names: str
    count: int
    reason: Reason
    up: str
    down: str


def pre_activated(names: str, count: int, also_read: str, reason: Reason = SHARED) -> Kept:
    """Above, others read the same value, so it may not change; below, a ReLU lets no shift by."""
    return Kept(names, count, reason, also_read, r"relu .*stands in the way of the shift")


FAMILIES: dict[str, tuple[int, list[Kept]]] = {
    # Every layer reads the concat of all layers before it: a value rescaled for one norm changes for all.
    # Behind a transition the concat is the one other reader, whose norms take the inverse map in.
    "torchvision:densenet121": (
        62,
        [
            pre_activated(r"features\.denseblock\d\.denselayer\d+\.norm1", 55, "is also read by concat"),
            pre_activated(r"features\.transition\d\.norm", 3, "is also read by concat"),
            pre_activated(r"features\.norm5", 1, "is also read by concat"),
        ],
    ),
    # The sum that a norm reads goes on as the shortcut, past it or past the norm of the block before. At a
    # stage's head and at the end it goes up, and the other reader takes the inverse map in. The very first
    # norm alone reads a value of its own, a maximum, which a negative γ would turn over.
    "timm:resnetv2_50": (
        36,
        [
            Kept(r"stages\.0\.blocks\.0\.norm1", 1, Reason.NEGATIVE_SCALE, "γ < 0 at max_pool", ""),
            pre_activated(r"stages\.0\.blocks\.[12]\.norm1", 2, "is also read by add"),
            pre_activated(r"stages\.[123]\.blocks\.[1-5]\.norm1", 10, "is also read by add"),
        ],
    ),
    # The ReLU stands before the norm, and lets no shift and no negative γ up. Before the sum with the
    # shortcut the map goes on through the sum, and the shortcut gives way: the norm before it takes 1/s in.
    # That one stays, since its shift meets the zeros of a convolution.
    "timm:convmixer_768_32": (
        33,
        [Kept(r"stem\.2|blocks\.\d+\.3", 32, Reason.NONLINEAR, "relu in", "pads with zeros")],
    ),
    # Two paths in one value, one concatenated on and one added, before each norm; where a stage begins two
    # norms read that value and ask for different maps.
    "timm:dpn68": (
        46,
        [
            pre_activated(r"features\.conv2_1\.c1x1_(a|w_s1)\.bn", 2, "is also read by batch_norm"),
            Kept(r"features\.conv[345]_1\.c1x1_(a|w_s2)\.bn", 6, SHARED, "would write in place", ""),
            pre_activated(r"features\.conv\d_(?!1\.)\d+\.c1x1_a\.bn", 18, "is also read by slice"),
        ],
    ),
    "timm:efficientformer_l1": (33, []),
    "timm:levit_128s": (52, []),
    "timm:starnet_s1": (36, []),
}
SIDES = {"timm:levit_128s": 224, "timm:efficientformer_l1": 224}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_reason_by_hand(name: str) -> None:
    folded, kept = FAMILIES[name]
    plan = planned(build(name).model, SIDES.get(name, 32))
    assert len(plan.sites) == folded
    require_reasons(plan, kept)


def planned(model: nn.Module, side: int, tweak: Callable[[Any], None] = randomise) -> Plan:
    """One look is enough here; that the folds are exact is what tests/sweeps/test_zoo.py shows."""
    tweak(model.eval())
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return plan_module_fold(model, observe(model, Inputs((image,))), merge=False, thorough=False).plan


def require_reasons(plan: Plan, kept: list[Kept]) -> None:
    found = dict.fromkeys(kept, 0)
    for skip in plan.skips:
        fitting = [kind for kind in kept if re.fullmatch(kind.names, skip.name)]
        assert len(fitting) == 1, skip
        kind = fitting[0]
        found[kind] += 1
        above, _, below = skip.detail.partition("; downstream: ")
        assert skip.reason is kind.reason
        assert re.search(kind.up, above), skip
        assert re.search(kind.down, below), skip
    assert found == {kind: kind.count for kind in kept}


def positive(model: nn.Module) -> None:
    randomise(model)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.weight.abs_()


def in_place(model: nn.Module, inplace: bool) -> None:
    positive(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace


def test_with_positive_scales_a_pre_activated_resnet_folds_but_for_writes_over_its_shortcuts() -> None:
    """The first norm's map passes the maximum then, into the stem; the others' shifts go up, their scales
    down through the ReLU, and where a shortcut goes past the norm the other branch takes the shift back."""
    model = build("timm:resnetv2_50").model
    plan = planned(model, 32, functools.partial(in_place, inplace=True))
    written_over = "would write in place what others read"
    require_reasons(
        plan,
        [
            Kept(r"stages\.0\.blocks\.[12]\.norm1", 2, SHARED, written_over, ""),
            Kept(r"stages\.[123]\.blocks\.[1-5]\.norm1", 10, SHARED, written_over, ""),
        ],
    )
    split = {site.bn for site in plan.fold_sites if "split" in site.laws}
    assert split == {"norm", *(f"stages.{i}.blocks.0.norm1" for i in (1, 2, 3))}
    assert not planned(model, 32, functools.partial(in_place, inplace=False)).skips


def test_with_positive_scales_half_of_convmixer_folds() -> None:
    """Before a sum the scale goes up through the ReLU, and the shift on through the sum into the pointwise
    convolution; before a zero-padded convolution the shift can go nowhere."""
    plan = planned(build("timm:convmixer_768_32").model, 32, positive)
    require_reasons(
        plan, [Kept(r"stem\.2|blocks\.\d+\.3", 32, Reason.NONLINEAR, "relu in", "pads with zeros")]
    )
    split = [site for site in plan.fold_sites if re.fullmatch(r"blocks\.\d+\.0\.fn\.2", site.bn)]
    assert len(split) == 32
    assert all("split" in site.laws for site in split)


class Crepe(nn.Module):
    """The pitch tracker (Kim et al. 2018): pad, convolution, ReLU, BatchNorm, max pool; a classifier."""

    def __init__(self, padded_by_hand: bool) -> None:
        super().__init__()
        sizes = [(1, 8, 16), (8, 4, 8), (4, 4, 8)]
        self.by_hand = padded_by_hand
        padding = 0 if padded_by_hand else "same"
        self.convs = nn.ModuleList(nn.Conv1d(i, o, k, padding=padding) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for _, o, _ in sizes)
        self.classifier = nn.Linear(4 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.by_hand:
                width = conv.kernel_size[0]
                x = nn.functional.pad(x, (width // 2 - 1, width // 2))
            x = nn.functional.max_pool1d(norm(conv(x).relu()), 2)
        return self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_crepe(by_hand: bool) -> None:
    """Up stands the ReLU. Down, a negative γ turns the maximum over; with γ > 0 scale and shift pass it, and
    the next padding stops the shift, whoever pads. Behind the last stands only the classifier: it folds."""
    sound = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(0))
    model = Crepe(by_hand).eval()
    positive(model)
    plan = plan_fold(observe(model, Inputs((sound,))).graph)
    assert [(site.bn, site.into) for site in plan.fold_sites] == [("norms.2", ("classifier",))]
    require_reasons(plan, [Kept(r"norms\.[01]", 2, Reason.NONLINEAR, "relu stands", "pads with zeros")])
    with torch.no_grad():
        for norm in model.norms:
            norm.weight[0] = -1.0
    plan = plan_fold(observe(model, Inputs((sound,))).graph)
    require_reasons(
        plan,
        [
            Kept(r"norms\.[01]", 2, Reason.NONLINEAR, "relu stands", "pads with zeros"),
            Kept(r"norms\.2", 1, Reason.NEGATIVE_SCALE, "γ < 0 at max_pool", ""),
        ],
    )
