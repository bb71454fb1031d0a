"""Insertion looks where the example does not lead: other sizes, training, and the text of the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.inserting.reaching import is_reached_into

Forward = Callable[[Any, Tensor], Any]


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = _layers()
        self.blocks = nn.ModuleList([_layers(), _layers()])
        self.f[0].weight.data.mul_(0.5)  # before any insertion

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Called(Net):
    """Every way to call them by what they are called."""

    def forward(self, x: Tensor) -> Tensor:
        f = self.f
        for block in (f, self.blocks[1]):
            x = block(x)
        for _, block in enumerate(self.blocks[:1]):
            x = block(x)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.requires_grad_(True)
        return x if len(self.blocks) > 9 else f.forward(x)


def _first(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers[0](x)


class Early(nn.Sequential):
    def early(self, x: Tensor) -> Tensor:
        return self[:2](x)


class OwnMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Early(*_layers())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def _sliced(self: Any, x: Tensor) -> Tensor:
    f = self.f
    return f[:2](x)


def _by_attribute(self: Any, x: Tensor) -> Tensor:
    return getattr(self, "f")[1](x)  # noqa: B009


def _by_computed_name(self: Any, x: Tensor) -> Tensor:
    return getattr(self, "".join("f"))[1](x)


def _by_modules(self: Any, x: Tensor) -> Tensor:
    return self._modules["f"][0](x)


def _by_submodule(self: Any, x: Tensor) -> Tensor:
    return self.get_submodule("f.2")(x)


def _by_length(self: Any, x: Tensor) -> Tensor:
    return x if len(self.f) > 4 else self.f(x)


def _in_turn(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.f):
        x = layer(x)
        if i == 1:
            break
    return x


def _by_children(self: Any, x: Tensor) -> Tensor:
    return nn.Sequential(*list(self.f.children())[:2])(x)


def _handed_on(self: Any, x: Tensor) -> Tensor:
    return _first(self.f, x)


def _named_inside(self: Any, x: Tensor) -> Tensor:
    return (f := self.f)[0](x) if x.any() else f(x)


WAYS: list[Forward] = [
    _sliced,
    _by_attribute,
    _by_computed_name,
    _by_modules,
    _by_submodule,
    _by_length,
    _in_turn,
    _by_children,
    _handed_on,
    _named_inside,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_class_that_takes_children_by_their_places_is_told(way: Forward) -> None:
    cls = type("Reaching", (Net,), {"forward": Called.forward, "other": way, "__module__": __name__})
    assert is_reached_into(cls(), "f")


def test_a_sequential_that_is_called_alone_is_not() -> None:
    for name in ("f", "blocks.1"):
        assert not is_reached_into(Called(), name)
    assert is_reached_into(OwnMethod(), "f")


class ElsewhereCut(Net):
    """Reached in a way that no text tells, where the example does not lead."""

    def stop(self, x: Tensor) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        if self.stop(x):
            return dict(vars(self))["_modules"]["f"][:2](x)
        return self.f(x)


class CutWhenLarge(ElsewhereCut):
    def stop(self, x: Tensor) -> bool:
        return x.shape[-1] > 20


class CutInTraining(ElsewhereCut):
    def stop(self, x: Tensor) -> bool:
        return self.training


class Again(nn.Module):
    """An activation that training, or a larger input, calls again."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.d, self.e = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.drop = nn.Dropout()

    def again(self, x: Tensor) -> bool:
        return self.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.e(self.d(self.a(self.c(x)))))
        return self.a(y) if self.again(x) else y


class AgainWhenLarge(Again):
    def again(self, x: Tensor) -> bool:
        return x.shape[-1] > 20


@pytest.mark.parametrize("cls", [CutWhenLarge, CutInTraining])
def test_a_sequential_that_another_path_cuts_keeps_its_numbers(cls: type[Net]) -> None:
    model = cls().eval()
    result = bntool.insert(model, torch.rand(1, 3, 16, 16))
    assert {site.form for site in result.sites} == {"wrap"}
    for training, side in ((False, 32), (True, 16)):
        x = torch.rand(2, 3, side, side)
        quiet = result.model.train(training)
        for site in result.sites:
            quiet.get_submodule(site.bn).eval()
        assert torch.equal(model.train(training)(x), quiet(x))


@pytest.mark.parametrize("cls", [Again, AgainWhenLarge])
def test_an_activation_that_runs_again_elsewhere_holds_no_batchnorm(cls: type[Again]) -> None:
    result = bntool.insert(cls().eval(), torch.rand(1, 3, 16, 16))
    assert {site.conv: site.form for site in result.sites} == {"c": "subclass", "d": "wrap"}
    assert any("c: form wrap changed the model" in note for note in result.plan.notes)


def test_what_could_not_be_tried_is_said() -> None:
    class Targets(Again):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets are missing")
            return self.e(self.d(self.a(self.c(x))))

    (note,) = bntool.insert(Targets().eval(), torch.rand(1, 3, 16, 16)).plan.notes
    assert note == "not tried in training mode: targets are missing"
