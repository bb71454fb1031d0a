"""Every program of the zoo gets exactly its verdicts, computes what it did, and is left untouched."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import bntool
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.runtime.programs import example_inputs_of
from tests.fold_zoo import FOLDED, bn, conv, enliven
from tests.program_zoo import BATCH, PROGRAM_ZOO, ProgramNet, decomposed, exported

EPS = torch.finfo(torch.float32).eps


def verdicts_of(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {site.bn: FOLDED for site in plan.fold_sites}
    found.update({skip.name: skip.reason for skip in plan.skips})
    return found


def norm_nodes(program: ExportedProgram) -> list[str]:
    return [node.name for node in program.graph.nodes if "batch_norm" in str(node.target)]


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def outputs(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = program.module()(*(x.clone() for x in inputs))
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("taken_apart", [False, True], ids=["whole", "decomposed"])
@pytest.mark.parametrize("net", PROGRAM_ZOO, ids=lambda net: net.name)
def test_zoo(net: ProgramNet, taken_apart: bool) -> None:
    program = decomposed(net.program()) if taken_apart else net.program()
    state = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    code = program.graph_module.code
    result = bntool.fold(program)
    nodes = [str(n) for n in norm_nodes(program)]
    expected = {(nodes[0] if name == "batch_norm" else name): v for name, v in net.verdicts.items()}
    found = verdicts_of(result.plan)
    if "~" in expected:
        (own,) = found.keys() - expected.keys()
        expected[own] = expected.pop("~")
    assert found == expected
    assert program.graph_module.code == code
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in state.items())
    if result.modified:
        assert [check.precision for check in result.checks] == ["", "float64"]
        assert all(check.passed for check in result.checks)
    if set(expected.values()) == {FOLDED}:
        assert norm_nodes(result.program) == []
        assert not any("running" in name or "num_batches" in name for name in result.program.state_dict)
    again = saved_and_loaded(result.program)
    for mine, loaded in zip(outputs(result.program, net.inputs()), outputs(again, net.inputs()), strict=True):
        assert torch.equal(mine, loaded)


def test_another_batch_than_the_exported_one() -> None:
    net = next(n for n in PROGRAM_ZOO if n.name == "channel_shuffle_by_views")
    program = net.program()
    folded = bntool.fold(program).program
    x = (torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2)),)
    before, after = outputs(program, x)[0], outputs(folded, x)[0]
    # two roundings of a weight and of 36 products in each sum
    assert float((before - after).abs().max()) <= 2 * 36 * EPS * float(before.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = enliven(getattr(torchvision.models, name)(weights=None).eval())
    total = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    program = exported(model, (torch.randn(2, 3, 64, 64),), BATCH)
    result = bntool.fold(program, check="full")
    assert len(result.plan.sites) == total
    assert not result.plan.skips
    # what rounding alone decides in float32 is decided in float64
    assert all(check.agrees for check in result.checks)
    assert [check.passed for check in result.checks if check.precision == "float64"] == [True]
    assert max(check.batches for check in result.checks) >= 3
    assert len(norm_nodes(program)) == total
    again = saved_and_loaded(result.program)
    x = (torch.randn(3, 3, 64, 64),)
    assert torch.equal(outputs(again, x)[0], outputs(result.program, x)[0])
    assert verdicts_of(bntool.fold(again).plan) == {}


def test_include_and_exclude_match_names() -> None:
    net = next(n for n in PROGRAM_ZOO if n.name == "two_halves")
    plan = bntool.fold(net.program(), include=("a",), check="none").plan
    assert verdicts_of(plan) == {"a": FOLDED, "b": Reason.EXCLUDED}


def test_the_public_fold_takes_a_program() -> None:
    result = bntool.fold(PROGRAM_ZOO[0].program())
    assert result.kind == "program"
    assert isinstance(result.model, ExportedProgram)
    assert norm_nodes(result.program) == []


def test_inputs_are_made_where_the_program_keeps_none() -> None:
    program = exported(enliven(nn.Sequential(conv(), bn()).eval()), (torch.randn(2, 4, 8, 8),), BATCH)
    program.example_inputs = None
    assert example_inputs_of(program).shapes() == "2x4x8x8"
    assert all(check.passed for check in bntool.fold(program).checks)


def test_a_norm_inside_a_body_is_named_and_left() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = torch.cond(x.sum() > 0, self.bn, torch.clone, (y,))
            return out

    program = exported(enliven(Branching().eval()), (torch.randn(2, 4, 8, 8),))
    result = bntool.fold(program)
    assert not result.modified
    assert [skip.reason for skip in result.plan.skips] == [Reason.FUNCTIONAL]


def test_a_batchnorm_that_does_not_use_the_weight_it_has_gets_no_other() -> None:
    """Its name is taken: by a γ that nobody reads, or that something else does."""

    class Unused(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), Unused(4)
            for norm in (self.first, self.second):
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.weight, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.sigmoid())).tanh() * self.second.weight.sum()

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    result = bntool.fold(torch.export.export(model, (x,)), check="none")
    with torch.no_grad():
        expected, found = model(x), result.program.module()(x)
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())
