"""Where a fold is proved: on small inputs that lead the model the same way, and on longer ones at need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects import elsewhere
from bntool.subjects.base import Checking
from bntool.subjects.elsewhere import Elsewhere, covers
from bntool.subjects.module import ModuleSubject


def seen(model: nn.Module, *shape: int) -> elsewhere.Seen:
    return Elsewhere(model, observe(model, Inputs((torch.randn(*shape),)))).seen


def strided(*more: nn.Module) -> nn.Sequential:
    """Three strides of two; eight pixels are one place of the last map."""
    layers = [
        layer
        for i in range(3)
        for layer in (nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1), *more).eval()


def test_the_small_input_leaves_two_places_wherever_there_were_several() -> None:
    model = strided()
    found = seen(model, 1, 3, 64, 64)
    assert found.small is not None and found.covers and found.long is None
    assert found.small.inputs.shapes() == "2x3x11x19"
    (last,) = (op for op in found.small.graph.ops if op.scope == "9")
    assert found.small.graph.output(last).shape == (2, 4, 2, 3)


def test_a_run_on_which_only_padding_meets_a_weight_covers_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=6, dilation=6), nn.AdaptiveAvgPool2d(2)).eval()
    own, small, smaller = (
        observe(model, Inputs((torch.randn(1, 3, side, side),))).graph for side in (16, 9, 5)
    )
    assert covers(small, own)
    assert not covers(smaller, own)  # the outer taps lie beyond it
    assert covers(own, smaller)


class Does(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


BY_SIZE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "width": lambda n, x: n.bn(n.conv(x)) if x.shape[-1] <= 48 else n.conv(x),
    "height": lambda n, x: n.bn(n.conv(x)) if x.size(2) <= 48 else n.conv(x),
    "smaller side": lambda n, x: n.bn(n.conv(x)) if min(x.shape[2:]) <= 48 else n.conv(x),
    "numbers": lambda n, x: n.bn(n.conv(x)) if x[0].numel() <= 3 * 48 * 48 else n.conv(x),
    "rows": lambda n, x: n.bn(n.conv(x)) if len(x[0, 0]) <= 48 else n.conv(x),
    "slice": lambda n, x: torch.cat([n.bn(n.conv(x))[..., :46], n.conv(x)[..., 46:]], 3),
    "tiles": lambda n, x: torch.cat([n.bn(n.conv(x).split(46, 2)[0]), *n.conv(x).split(46, 2)[1:]], 2),
}


@pytest.mark.parametrize("what", BY_SIZE)
def test_what_a_model_does_by_size_is_looked_at_on_a_longer_input(what: str) -> None:
    model = Does(BY_SIZE[what]).eval()
    nn.init.constant_(model.bn.running_mean, 1.0)
    found = seen(model, 1, 3, 48, 48)
    assert found.small is not None and found.small.inputs.shapes() == "2x3x9x17"
    assert found.long is not None and found.long.inputs.shapes() == "1x3x81x81"
    result = bntool.fold(model, torch.randn(1, 3, 48, 48))
    x = torch.randn(1, 3, 90, 90)
    assert not result.modified
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=0)


def test_what_does_the_same_everywhere_needs_no_longer_input() -> None:
    model = strided(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert seen(model, 1, 3, 96, 96).long is None


def test_a_volume_is_proved_on_a_small_one() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, 2, 1)
    ).eval()
    found = seen(model, 1, 3, 16, 48, 48)
    assert found.small is not None and found.small.inputs.shapes() == "2x3x9x17x25"


def test_a_head_of_fixed_width_keeps_the_size_and_is_told() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 46 * 46, 2)
    ).eval()
    found = seen(model, 1, 3, 48, 48)
    assert found.small is not None and found.small.inputs.shapes() == "2x3x48x48"
    result = bntool.fold(model, torch.randn(1, 3, 48, 48))
    assert result.modified
    assert "not proved on other sizes, since the model takes none of" in result.checks[0].detail


def test_a_size_that_the_model_calls_its_only_one_is_not_left() -> None:
    model: Any = strided()
    model.pretrained_cfg = {"fixed_input_size": True}
    result = bntool.fold(model, torch.randn(1, 3, 64, 64))
    assert result.modified
    assert "says that it takes one size alone" in result.checks[0].detail


def test_what_was_refused_is_remembered_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def noted(model: nn.Module, inputs: Inputs, **how: Any) -> Any:
        tried.append(inputs.shapes())
        return observe(model, inputs, **how)

    monkeypatch.setattr(elsewhere, "observe", noted)
    for _ in range(2):
        # pools round down: of eleven pixels one place is left
        seen(
            nn.Sequential(nn.Conv2d(3, 5, 1), *(nn.MaxPool2d(2) for _ in range(3)), nn.Conv2d(5, 4, 1)),
            1,
            3,
            64,
            64,
        )
    assert tried == ["2x3x11x19", "2x3x17x25", "2x3x17x25"]


class Logged(nn.Module):
    """Tells every run of it and its copies: the type and shape of the input."""

    runs: list[tuple[torch.dtype, tuple[int, ...]]]

    def __init__(self) -> None:
        super().__init__()
        self.body = strided()
        type(self).runs = []

    def forward(self, x: Tensor) -> Tensor:
        _RUNS.append((x.dtype, tuple(x.shape)))
        out: Tensor = self.body(x)
        return out


_RUNS: list[tuple[torch.dtype, tuple[int, ...]]] = []


def test_a_fold_is_proved_at_the_price_of_one_more_run() -> None:
    model = Logged().eval()
    example = torch.randn(1, 3, 96, 96)
    _RUNS.clear()
    noted: list[Any] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            noted.append((args[0].dtype, tuple(args[0].shape))) if isinstance(module, Logged) else None
        )
    )
    try:
        result = bntool.fold(model, example)
    finally:
        hook.remove()
    assert [row.passed for row in result.checks] == [True, True]
    # before and after, in its own precision; all that is float64 is small
    assert noted.count((torch.float32, (1, 3, 96, 96))) == 2
    wide = [shape for dtype, shape in noted if dtype == torch.float64]
    assert wide == [(2, 3, 11, 19)] * 2


def test_with_the_full_check_there_is_a_second_small_input_of_other_sides() -> None:
    model = strided()
    subject = ModuleSubject(model, torch.randn(1, 3, 64, 64))
    shapes = [
        [inputs.shapes() for inputs, _ in found.algebra]
        for full in (False, True)
        if (found := subject.proof(Checking(full=full)).elsewhere) is not None
    ]
    assert shapes == [["2x3x11x19"], ["2x3x11x19", "1x3x13x29"]]


def test_where_the_small_input_tells_too_little_there_is_a_second_one() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = strided()

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] % 2 == x.shape[3] % 2 == 0
            out: Tensor = self.body(x)
            return out

    found = ModuleSubject(Even().eval(), torch.randn(1, 3, 64, 64)).proof(Checking()).elsewhere
    assert found is not None
    assert [inputs.shapes() for inputs, _ in found.algebra] == ["2x3x10x10", "1x3x10x42"]


def test_a_long_sequence_is_made_shorter_where_its_features_may_not() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.layer(x).transpose(1, 2)))

    found = seen(Sequences().eval(), 1, 64, 6)
    assert found.small is not None and found.small.inputs.shapes() == "2x16x6"
