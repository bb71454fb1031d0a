"""Every net of the zoo gets exactly its verdicts, computes what it did, and is left untouched."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.core.collecting import paused
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs, outputs_of
from bntool.observe.eager import observe
from bntool.surgery.fold_modules import apply_fold
from tests.fold_zoo import FOLDED, ZOO, Entry, enliven

EXACT = 1e-10
"""Relative to peak, in float64: some hundred roundings of 1e-16, times the condition of a tiny σ."""


def plan_for(model: nn.Module, inputs: tuple[Tensor, ...]) -> Plan:
    return plan_fold(observe(model, Inputs(inputs)).graph)


def verdicts_of(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {site.bn: FOLDED for site in plan.fold_sites}
    found.update({skip.name: skip.reason for skip in plan.skips})
    return found


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return outputs_of(model(*(x.clone() for x in inputs)))


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor], limit: float = EXACT) -> None:
    assert before.keys() == after.keys()
    for name, expected in before.items():
        assert torch.equal(expected.isnan(), after[name].isnan()), name
        expected, found = expected.nan_to_num(), after[name].nan_to_num()
        peak = max(float(expected.abs().max()), 1e-300)
        assert float((found - expected).abs().max()) <= limit * peak, name


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_zoo(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_for(model, inputs)
    assert verdicts_of(plan) == dict(entry.verdicts)
    folded = apply_fold(model, plan)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(
        torch.equal(after[name], tensor) or bool(tensor.isnan().any()) for name, tensor in state.items()
    )
    if entry.dtype == torch.float64:
        assert_same(run(model, inputs), run(folded, inputs))


REPLAYED = [pytest.param(e, id=e.name) for e in ZOO if FOLDED in e.verdicts.values()]


@pytest.mark.parametrize("entry", REPLAYED)
def test_replayed_from_json_bit_equal_and_then_nothing_left(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    plan = plan_for(model, inputs)
    folded = apply_fold(model, plan)
    replayed = apply_fold(model, Plan.from_json(plan.to_json()))
    assert str(folded) == str(replayed)
    ours, theirs = folded.state_dict(), replayed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    again = verdicts_of(plan_for(folded, inputs))
    assert again == {name: v for name, v in entry.verdicts.items() if v != FOLDED}


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_a_plan_leaves_its_graph_to_reference_counting(entry: Entry) -> None:
    """A cycle (an exception that holds the frame that holds it) would keep graphs until a collection."""
    graph = observe(entry.build(), Inputs(entry.inputs())).graph
    alive = weakref.ref(graph)
    with paused():
        plan_fold(graph)
        del graph
        assert alive() is None


def test_norm_act_keeps_its_activation() -> None:
    entry = next(e for e in ZOO if e.name == "bn_act")
    model = entry.build()
    folded = apply_fold(model, plan_for(model, entry.inputs()))
    assert isinstance(folded.bn, nn.SiLU)


def test_include_and_exclude() -> None:
    entry = next(e for e in ZOO if e.name == "double_norm")
    graph = observe(entry.build(), Inputs(entry.inputs())).graph
    # an excluded BatchNorm does not take another one in either
    assert verdicts_of(plan_fold(graph, exclude=("first",))) == {
        "first": Reason.EXCLUDED,
        "second": Reason.EXCLUDED,
    }
    assert verdicts_of(plan_fold(graph, include=("f*",))) == {"first": FOLDED, "second": Reason.EXCLUDED}


def test_training_flag_trainability_and_layout_survive() -> None:
    model = enliven(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = apply_fold(model, plan_for(model, (torch.randn(1, 4, 8, 8),)))
    assert model.training
    assert folded.training
    assert folded[1].training
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(folded[0].weight, nn.Parameter)
