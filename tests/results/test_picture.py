"""The picture of a model: layers in their order, what reads what, and what a BatchNorm computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.results import picture
from bntool.results.picture import layers_of, norms_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """A residual block that runs twice, and a BatchNorm that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.block = Block()
        self.idle = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x))).flatten(1)


def graph_of(model: nn.Module) -> picture.Graph:
    return observe(model.eval(), Inputs.of((torch.zeros(2, 3, 5, 5),))).graph


def test_layers_stand_in_the_order_they_ran_and_tell_what_they_read() -> None:
    found = layers_of(graph_of(Net()), 4)
    rows = [(row["name"], row["kind"], row["op"], row["from"]) for row in found["layers"]]
    assert rows == [
        ("stem", "Conv2d", False, []),
        ("block.conv", "Conv2d", False, [0]),
        ("block.bn", "BatchNorm2d", False, [1]),
        ("block", "add, relu", True, [2, 0]),
        ("block.conv", "Conv2d", False, [3]),
        ("block.bn", "BatchNorm2d", False, [4]),
        ("block", "add, relu", True, [5, 3]),
        ("", "flatten", True, [6]),
    ]
    assert found["modules"] == {"": "Net", "block": "Block"}
    assert [row["parameters"] for row in found["layers"][:3]] == [3 * 4 + 4, 4 * 4 * 9 + 4, 8]
    assert found["layers"][1]["shape"] == [2, 4, 5, 5]
    assert (found["class"], found["left_out"]) == ("Net", 0)


def test_a_model_of_very_many_layers_is_cut_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(picture, "MOST_LAYERS", 3)
    found = layers_of(graph_of(Net()), 4)
    assert (len(found["layers"]), found["left_out"]) == (3, 5)


def test_the_figures_of_a_batchnorm_are_those_of_its_formula() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=0.5))
    norm = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0, 1e-9]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
        norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
        norm.running_var.copy_(torch.tensor([3.5, 0.5, 0.0]))
    (found,) = norms_of(graph_of(model))
    assert found["name"] == "1"
    assert found["scale"] == [1.0, -1.0, 1.414e-09]  # 2/√4, -1/√1, 1e-9/√0.5
    assert found["shift"] == [-0.5, -2.0, 1.0]  # 0.5 - 1·1, 0 - (-1)(-2), 1 - 0
    assert found["variance"] == [3.5, 0.5, 0.0]
    assert (found["channels"], found["shown"], found["at"]) == (3, 3, None)
    # the first two spread by 1·√3.5 and 1·√0.5; the last does not vary at all
    assert found["dead"] == 1


def test_of_many_channels_some_are_kept_evenly_spread() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1000, 1), nn.BatchNorm2d(1000, affine=False))
    with torch.no_grad():
        model[1].running_mean.copy_(torch.arange(1000.0))
    (found,) = norms_of(graph_of(model))
    assert (found["channels"], found["shown"], len(found["shift"])) == (1000, 256, 256)
    assert found["at"][:3] == [0, 3, 7]
    assert found["at"][-1] == 996
    kept = torch.tensor(found["at"], dtype=torch.float64)
    expected = -kept / (1 + 1e-5) ** 0.5
    # four digits are kept, so half a unit of the fourth at most is lost
    assert torch.allclose(torch.tensor(found["shift"], dtype=torch.float64), expected, rtol=5e-4, atol=0)


def test_what_is_no_number_and_what_is_not_stored_leave_gaps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    with torch.no_grad():
        model[1].running_var.copy_(torch.tensor([float("nan"), 1.0]))
    first, second = norms_of(graph_of(model))
    assert first["variance"] == [None, 1.0]
    assert first["scale"][0] is None
    assert "scale" not in second


def test_a_batchnorm_that_never_ran_is_there_without_figures() -> None:
    assert [norm["name"] for norm in norms_of(graph_of(Net()))] == ["block.bn", "idle"]


class Split(nn.Module):
    """Weights of its own beside a layer inside of it, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(torch.nn.functional.conv2d(x, self.weight)))


def test_the_rows_sum_to_the_parameters_of_the_whole() -> None:
    model = Split()
    rows = layers_of(observe(model, Inputs((torch.zeros(1, 3, 2, 2),))).graph, 2)["layers"]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row["name"] == "twice" for row in rows) == 2
