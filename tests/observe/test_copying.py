from __future__ import annotations

import copy
import functools
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bntool.core.errors import ObserveError
from bntool.observe.copying import structural_copy

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _require_shared(model: nn.Module, twin: nn.Module) -> None:
    """Other modules of the same classes under the same names, holding the very same tensors."""
    assert [(n, type(m)) for n, m in twin.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    own, other = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert list(own) == list(other)
    assert all(own[k] is other[k] for k in own)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]


def test_a_copy_shares_every_tensor_and_no_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Sequential(nn.ReLU()))
    twin = structural_copy(model)
    _require_shared(model, twin)
    twin.eval()
    twin[2].append(nn.ReLU())
    twin.register_buffer("late", torch.zeros(1))
    twin[0].note = 1
    assert model.training
    assert len(model[2]) == 1
    assert "late" not in model._buffers
    assert not hasattr(model[0], "note")


def test_shared_modules_and_parameters_stay_shared() -> None:
    act, first, second = nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    twin = structural_copy(nn.Sequential(first, act, second, act))
    assert twin[1] is twin[3]
    assert twin[1] is not act
    assert twin[0].weight is twin[2].weight is first.weight


def test_hooks_are_copied_and_not_shared() -> None:
    model = nn.Linear(3, 3)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    twin = structural_copy(model)
    twin._forward_hooks.clear()
    model(torch.zeros(1, 3))
    assert calls == ["hook"]


class _References(nn.Module):
    """Its members refer to each other in the ways people write."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.order = [self.conv]
        self.table: dict[str, Any] = {"first": (self.conv, 1)}
        self.step = self.run_conv
        self.partly = functools.partial(self.run_conv)
        self.me = self.order

    def run_conv(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_references_inside_the_model_point_into_the_copy() -> None:
    model = _References()
    twin = structural_copy(model)
    _require_shared(model, twin)
    assert twin.order[0] is twin.conv
    assert twin.table["first"][0] is twin.conv
    assert twin.step.__self__ is twin
    assert twin.partly.func.__self__ is twin
    assert twin.me is twin.order


def test_modules_in_a_plain_list_are_copied() -> None:
    model = nn.Module()
    model.hidden = [nn.Linear(2, 2)]
    assert structural_copy(model).hidden[0] is not model.hidden[0]


@pytest.mark.parametrize("form", ["parametrized", "hook"])
def test_weight_normalised_layers_are_copied_after_a_forward(form: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    if form == "parametrized":
        parametrizations.weight_norm(model[0])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old form, still in many checkpoints
            nn.utils.weight_norm(model[0])
    expected = model(X)
    twin = structural_copy(model)
    _require_shared(model, twin)
    assert torch.equal(twin(X), expected)


class _OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnCopy:
        made = _OwnCopy(self.in_features, self.out_features)
        made.weight, made.bias = copy.deepcopy(self.weight, memo), copy.deepcopy(self.bias, memo)
        made.copied = True
        return made


def test_a_class_with_its_own_way_to_be_copied_keeps_it() -> None:
    for model in (_OwnCopy(2, 2), nn.Sequential(_OwnCopy(2, 2))):
        twin = structural_copy(model)
        _require_shared(model, twin)
        assert all(m.copied for m in twin.modules() if isinstance(m, _OwnCopy))


class _Stubborn(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Stubborn:
        raise RuntimeError("only one of me")


@pytest.mark.parametrize("nested", [False, True])
def test_a_class_that_cannot_be_copied_is_named(nested: bool) -> None:
    model = nn.Sequential(_Stubborn(2, 2)) if nested else _Stubborn(2, 2)
    with pytest.raises(ObserveError, match="only one of me") as caught:
        structural_copy(model)
    assert caught.value.where == "_Stubborn"


class _Chosen(nn.Linear):
    def __new__(cls, width: int) -> _Chosen:
        assert width > 0
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


def test_a_class_with_a_constructor_of_its_own_is_not_constructed_again() -> None:
    model = _Chosen(3)
    _require_shared(model, structural_copy(model))


def test_what_a_training_step_left_behind_does_not_stop_the_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.features = {"deep": [model(X)]}
    model.loss = model(X).sum()
    twin = structural_copy(model)
    assert twin.features is not model.features
    assert twin.features["deep"][0] is model.features["deep"][0]
    twin.features["more"] = 1
    assert "more" not in model.features


def test_what_python_cannot_copy_is_shared() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    model.stream = (n for n in range(3))
    twin = structural_copy(model)
    assert twin.lock is model.lock
    assert twin.stream is model.stream


def test_a_scripted_submodule_comes_along() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        body = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), body).eval()
    twin = structural_copy(model)
    assert twin[0].weight is model[0].weight
    assert torch.equal(twin(X), model(X))


def test_a_copy_of_a_copy_is_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    _require_shared(model, structural_copy(structural_copy(model)))


def test_a_configuration_is_copied_and_what_refers_to_itself_too() -> None:
    model = nn.Linear(2, 2)
    model.config = {"size": (1, 2), "stages": [{"depth": 3}]}
    model.same = model.config["stages"]
    model.loop = [1]
    model.loop.append(model.loop)
    twin = structural_copy(model)
    assert twin.config == model.config
    assert twin.same is twin.config["stages"]
    twin.same[0]["depth"] = 4
    assert model.same[0]["depth"] == 3
    assert twin.loop[1] is twin.loop
    assert twin.loop is not model.loop


def test_a_parameter_as_a_key_is_still_the_parameter() -> None:
    model = nn.Linear(2, 2)
    model.groups = {model.weight: "decay"}
    assert next(iter(structural_copy(model).groups)) is model.weight
