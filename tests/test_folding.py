"""Every net of the zoo gets exactly its verdicts, computes what it did, and is left untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fold_zoo import FOLDED, ZOO, Entry
from torch import Tensor, nn

from bntool.folding import plan_fold
from bntool.inputs import Inputs, outputs_of
from bntool.observe.eager import observe
from bntool.plan import Plan
from bntool.surgery.fold_modules import apply_fold

EXACT = 1e-10
"""Relative to peak, in float64: some hundred roundings of 1e-16 each, and room for the condition of tiny σ."""


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
    assert all(torch.equal(after[name], tensor) or bool(tensor.isnan().any()) for name, tensor in state.items())
    if entry.dtype == torch.float64:
        assert_same(run(model, inputs), run(folded, inputs))
