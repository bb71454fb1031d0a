from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import bntool
from bntool.core.errors import UsageError
from tests.subjects.test_onnx_insertion import Net

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def program(decomposed: bool = False, **options: Any) -> ExportedProgram:
    made = torch.export.export(Net().eval(), (X,), **options)
    return made.run_decompositions() if decomposed else made


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_newcomers_change_nothing_and_fold_away_again(decomposed: bool) -> None:
    given = program(decomposed)
    result = bntool.insert(given)
    assert [site.channels for site in result.plan.insert_sites] == [4, 5]
    assert result.checks[0].passed
    assert torch.equal(result.program.module()(X), given.module()(X))
    state = result.program.state_dict
    assert {name for name in state if "_bn." in name} == {
        f"{conv}_bn.{role}"
        for conv in ("one", "two")
        for role in ("weight", "bias", "running_mean", "running_var")
    }
    assert not {name for name in given.state_dict if "_bn." in name}
    assert isinstance(state["one_bn.weight"], nn.Parameter)
    assert not bntool.insert(result.program).modified
    folded = bntool.fold(result.program)
    assert len(folded.plan.sites) == 2 and not folded.plan.skips
    assert set(folded.program.state_dict) == set(given.state_dict)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.GELU])
def test_an_activation_is_one_where_it_is_decomposed_too(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation()).eval()
    given = torch.export.export(model, (X,)).run_decompositions()
    result = bntool.insert(given, activations=(activation.__name__.lower(),))
    assert len(result.plan.sites) == 1
    assert torch.equal(result.program.module()(X), given.module()(X))


def test_every_call_gets_its_own_and_a_saved_program_loads(tmp_path: Any) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    given = program(dynamic_shapes=(batch,))
    result = bntool.insert(given, per_call=True)
    assert [site.calls for site in result.plan.insert_sites] == [1, 1, 2]
    torch.export.save(result.program, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2").module()
    other = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(other), given.module()(other))


def test_what_needs_modules_or_data_is_refused() -> None:
    with pytest.raises(UsageError, match="identity-initialised"):
        bntool.insert(program(), init="default")
    with pytest.raises(UsageError, match="portable is for modules"):
        bntool.insert(program(), portable=True)
