"""A file that was just exported is planned on once more only where its graph could still fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntool.core.options import ExportOptions
from bntool.export.exporting import export_onnx
from bntool.pipeline import onnx_folding
from bntool.pipeline.onnx_folding import fold_exported
from bntool.subjects.module import ModuleSubject
from bntool.subjects.program import ProgramSubject


class Branches(nn.Module):
    """Two convolutions of one value, added, with or without something between that no sum goes through."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.one, self.two, self._apart = (*(nn.Parameter(torch.randn(3, 3, 3, 3)) for _ in "ab"), apart)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (F.conv2d(x, weight, padding=1) for weight in (self.one, self.two))
        return one.sigmoid() + two if self._apart else one * 2 + two


@pytest.mark.parametrize("kind", [ModuleSubject, ProgramSubject])
def test_a_second_try_goes_over_the_draft_of_the_first(kind: Any, tmp_path: Path) -> None:
    """Where merged branches do not stand up in the file, it is written once more without them."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 8, 8)
    subject = kind(torch.export.export(model, (x,)) if kind is ProgramSubject else model, (x,))
    for _ in range(2):
        assert subject.export(tmp_path / "m.onnx", ExportOptions(), {}).path == tmp_path / "m.onnx"


@pytest.mark.parametrize("apart", [False, True])
def test_parallel_convolutions_are_looked_at_where_they_meet_in_a_sum(
    *, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    plan = onnx_folding.plan_fold_onnx
    monkeypatch.setattr(onnx_folding, "plan_fold_onnx", lambda *a, **k: looked.append(1) or plan(*a, **k))
    how = ExportOptions(exporter="legacy")
    made = export_onnx(Branches(apart=apart).eval(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", how)
    fold_exported(made)
    assert bool(looked) is not apart


def test_of_many_branches_the_planner_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    plan = onnx_folding.plan_fold_onnx
    monkeypatch.setattr(onnx_folding, "plan_fold_onnx", lambda *a, **k: looked.append(1) or plan(*a, **k))
    layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(40))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    made = export_onnx(
        Chain().eval(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", ExportOptions(exporter="legacy")
    )
    fold_exported(made)
    assert looked
