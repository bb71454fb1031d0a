"""The page of what stays: classes by what stands around a BatchNorm, and a reason for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from tests.laws.exactness import Numbers
from tools.sweeps.kept_classes import classes
from tools.sweeps.kept_page import kept_page, shares


class Net(nn.Module):
    """One norm behind a curve, one that folds, and one before a ReLU whose input a shortcut reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        fill = Numbers("mixed", True, 1e-3, 1.0, 0)
        self.norms = nn.ModuleList(fill.fill(nn.BatchNorm2d(3)).float() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](torch.sigmoid(self.convs[0](x)))
        z = self.norms[1](self.convs[1](y)).relu()
        return torch.softmax(z + self.convs[2](self.norms[2](z).relu()), 1)


def test_a_class_names_what_stands_around() -> None:
    graph = observe(Net().eval(), Inputs((torch.randn(1, 3, 8, 8),))).graph
    assert classes(graph, plan_fold(graph)) == {
        "nonlinear: curve → BN → layer": [1, "norms.0"],
        "output-used-elsewhere: ReLU → BN → ReLU; beside: sum": [1, "norms.2"],
    }


def test_the_page_counts_what_must_stay_and_what_nobody_looked_into() -> None:
    found = {"nonlinear: curve → BN → layer": [2, "a"], "hooked: layer → BN → layer": [1, "b"]}
    row = {"status": "ok", "model": "lib:net", "bn_total": 10, "folded": 7, "classes": found}
    text = kept_page({"lib:net": row, "lib:other": {"status": "failed", "model": "lib:other"}})
    assert "of all 10 BatchNorms 7 fold, 70.0 %, which is below 95 % since 2 of the others" in text
    assert "2 must stay; of the other 8 fold 87.5 %" in text
    assert "| `nonlinear: curve → BN → layer` | 2 | lib:net `a` |" in text
    assert text.index("## Not yet looked into") < text.index(
        "| `hooked: layer → BN → layer` | 1 | lib:net `b` |"
    )
    assert "below" not in shares({"lib:net": {**row, "folded": 10, "classes": {}}})
