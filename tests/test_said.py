"""What a result says of what it does not know: branches on numbers, BatchNorms that have seen no batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.cli import run
from bntool.graph.dataflow import READS_NUMBERS


class Reads(nn.Module):
    """A branch on a tensor, behind which its BatchNorm stays."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        k = 0.5 if x.max() > 50 else 1.0
        return torch.relu(self.b(self.c(x) * k))


class ReadsAside(Reads):
    """The same, where the number does not stand in the way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.c(x))
        return torch.relu(y) if x.max() > 50 else torch.tanh(y)


class ReadsAndActs(Reads):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.c(x))
        return y if x.max() > 50 else y * 2


def _measured(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(9)
    return model.eval()


@pytest.mark.parametrize("build", [Reads, ReadsAside])
def test_a_fold_says_that_it_saw_one_branch_in_every_form(build: type[nn.Module]) -> None:
    result = bntool.fold(_measured(build()), torch.rand(2, 3, 8, 8))
    assert READS_NUMBERS in result.plan.notes
    assert READS_NUMBERS in result.to_dict()["notes"]
    assert "only the branches that the example" in " ".join(str(result).split())


def test_an_insertion_says_it_too() -> None:
    result = bntool.insert(_measured(ReadsAndActs()), torch.rand(2, 3, 8, 8))
    assert READS_NUMBERS in result.to_dict()["notes"]


def test_the_commands_say_it_also_where_nothing_is_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_measured(Reads()), "m.pt")
    words = ["fold", "m.pt", "--input", "1x3x8x8", "--allow", f"{__name__}.Reads"]
    assert run([*words, "--json", "--report", "r.html"]) == 4
    assert READS_NUMBERS in json.loads(capsys.readouterr().out)["notes"]
    assert READS_NUMBERS in Path("r.html").read_text()
    assert run(words) == 4
    assert READS_NUMBERS in capsys.readouterr().out


def _fresh() -> nn.Module:
    """A zero shift passes the ReLU upstream; a trained one would not, nor the padding downstream."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    ).eval()


def test_a_fold_says_which_batchnorms_would_stay_once_trained() -> None:
    result = bntool.fold(_fresh(), torch.rand(1, 3, 8, 8))
    (note,) = result.plan.notes
    assert (
        note == "2 folded BatchNorms have seen no batch yet; with measured statistics 1 of them would stay: 2"
    )
    assert {site.bn: site.untrained.partition(":")[0] for site in result.sites} == {"2": "nonlinear", "4": ""}
    assert "once trained it would stay: nonlinear" in str(result)
    # and it is so
    model = _measured(_fresh())
    assert [skip.name for skip in bntool.fold(model, torch.rand(1, 3, 8, 8)).skips] == ["2"]
    assert not bntool.fold(_measured(_fresh()), torch.rand(1, 3, 8, 8)).plan.notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["module", "program", "onnx", "script"])
def test_every_kind_says_it(kind: str, tmp_path: Path) -> None:
    model, x = _fresh(), torch.rand(1, 3, 8, 8)
    if kind == "script":
        result = bntool.fold(
            torch.jit.script(nn.Sequential(model[3], model[4]).eval()), torch.rand(1, 4, 8, 8)
        )
    elif kind == "program":
        result = bntool.fold(torch.export.export(model, (x,)))
    elif kind == "onnx":
        result = bntool.fold(bntool.export_onnx(model, x, tmp_path / "m.onnx"))
    else:
        result = bntool.fold(model, x)
    assert any("seen no batch yet" in note for note in result.plan.notes)


def test_require_all_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_fresh(), "m.pt")
    assert run(["fold", "m.pt", "--input", "1x3x8x8", "--require-all"]) == 0
    assert (
        "--require-all holds for this model as it is; 1 would stay once it is trained"
        in capsys.readouterr().out
    )
