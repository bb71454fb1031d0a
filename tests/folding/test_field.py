"""Eight classes of BatchNorms in models of other libraries that algebra folds: one small model of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bntool
from tests.fold_zoo import enliven

EXACT = 1e-10
"""Relative to the peak, in float64: the limit of the algebra."""


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("gamma", "beta", "mean", "variance"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.gamma * (self.variance + 1e-5).rsqrt())[:, None, None]
        return x * scale + (self.beta[:, None, None] - self.mean[:, None, None] * scale)


class Linear(nn.Module):
    """A linear layer of a library's own, with no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Graph(nn.Module):
    """Messages along edges, summed up at nodes, with a bias behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias, self.bn = (
            nn.Linear(5, 4, bias=False),
            nn.Parameter(torch.randn(4)),
            nn.BatchNorm1d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        edges = torch.arange(len(x) * 2) % len(x)
        sent = self.linear(x)[edges.flip(0)]
        summed = torch.zeros(len(x), 4, dtype=x.dtype).scatter_add(0, edges[:, None].expand_as(sent), sent)
        return self.bn(summed + self.bias)


def sloped() -> nn.Module:
    layer = nn.PReLU(4)
    layer.weight.data = torch.tensor([0.1, 0.3, 0.2, 0.7])
    return layer


def unshifted() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, -0.3])
    return norm


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.bn(y + m.third(F.gelu(m.second(y)))).softmax(1)


def branches(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.stem(x))
    return F.relu(m.bn(m.conv(y)) + m.own(y))


IMAGE, ROWS, SERIES = (2, 3, 7, 7), (6, 5), (2, 3, 30)
CLASSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a frozen one as arithmetic": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(), nn.ReLU()), IMAGE),
    "an identity branch": (
        lambda: Net(
            branches,
            stem=nn.Conv2d(3, 4, 1),
            conv=nn.Conv2d(4, 4, 3, padding=1),
            bn=nn.BatchNorm2d(4),
            own=nn.BatchNorm2d(4),
        ),
        IMAGE,
    ),
    "sums over nodes": (Graph, ROWS),
    "a standard deviation": (
        lambda: Net(
            lambda m, x: m.out(torch.cat([(y := m.bn(m.conv(x).tanh())).mean(-1), y.std(-1)], 1)),
            conv=nn.Conv1d(3, 4, 3),
            bn=nn.BatchNorm1d(4),
            out=nn.Linear(8, 2),
        ),
        SERIES,
    ),
    "a linear layer of no known class": (
        lambda: nn.Sequential(Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()),
        ROWS,
    ),
    "behind a residual sum": (
        lambda: Net(
            residual,
            first=nn.Linear(5, 4),
            second=nn.Linear(4, 8),
            third=nn.Linear(8, 4),
            bn=nn.BatchNorm1d(4),
        ),
        ROWS,
    ),
    "a PReLU and a negative scale": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), sloped(), unshifted(), nn.Tanh()),
        IMAGE,
    ),
    "a weight that is computed": (
        lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_batchnorm_of_the_class_folds_exactly(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CLASSES[name]
    model = make()
    if name != "a PReLU and a negative scale":  # which lets a scale by, and no shift
        enliven(model)
    model = model.double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    result = bntool.fold(model, x, bake=name == "a weight that is computed")
    assert result.plan.sites and not result.plan.skips
    assert (result.model(x) - model(x)).abs().max() <= EXACT * model(x).abs().max()
