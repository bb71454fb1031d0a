"""How maps move: the branches that a shift may go to, and readers that look at a part of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.folding.traversal import Choices, require_fit
from bntool.graph.affine import Affine, condition, identity
from bntool.graph.dataflow import Value
from bntool.laws import Refused
from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data, folded_exactly

FILL = Numbers("positive", True, 1e-5, 1.0, 0)


@pytest.mark.parametrize(("branches", "goes"), [(2, True), (16, True), (17, False)])
def test_a_shift_is_offered_to_sixteen_branches(branches: int, goes: bool) -> None:
    """All but the last that is tried stand behind a ReLU, which lets no shift by."""

    def run(m: Any, x: Tensor) -> Tensor:
        outs = [conv(x) for conv in m.convs]
        return m.bn(sum(map(torch.relu, outs[1:-1]), outs[0].relu()) + outs[-1])  # type: ignore[no-any-return]

    parts = {
        "convs": nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(branches)),
        "bn": FILL.fill(nn.BatchNorm2d(4)),
    }
    plan, _ = folded_exactly(Net(run, parts), data(1, 4, 3, 3))
    assert [site.bn for site in plan.fold_sites] == (["bn"] if goes else [])
    assert all(skip.reason is Reason.MIXED_BRANCHES for skip in plan.skips)


PICKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "slice": (lambda y: y[:, :3], lambda y: y[:, 3:]),
    "index": (lambda y: y[:, [0, 2, 1]], lambda y: y[:, [5, 3, 4]]),
    "index_select": (
        lambda y: y.index_select(1, torch.tensor([0, 2, 1])),
        lambda y: y.index_select(1, torch.tensor([5, 3, 4])),
    ),
    "select": (lambda y: y[:, 1].unsqueeze(1).repeat(1, 1, 1, 1), lambda y: y[:, 0]),
}


@pytest.mark.parametrize("kind", PICKS)
@pytest.mark.parametrize("later", [True, False])
def test_the_part_that_another_reader_looks_at_may_stay_as_it_is(kind: str, later: bool) -> None:
    mine, other = PICKS[kind]

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        rest = None if later else other(y)
        normed = m.bn(mine(y))
        return torch.cat([normed.flatten(), (other(y) if rest is None else rest).flatten()])

    parts = {"conv": nn.Conv2d(4, 6, 1), "bn": FILL.fill(nn.BatchNorm2d(1 if kind == "select" else 3))}
    plan, _ = folded_exactly(Net(run, parts), data(2, 4, 5, 5))
    (site,) = plan.fold_sites
    assert site.into == ("conv",)
    assert "inverse" not in site.laws  # nothing is done to the other part, and so nothing undone


@pytest.mark.parametrize("kind", PICKS)
def test_a_part_that_both_look_at_must_change_for_both(kind: str) -> None:
    mine, _ = PICKS[kind]

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.cat([m.bn(mine(y)).flatten(), mine(y).flatten()])

    parts = {"conv": nn.Conv2d(4, 6, 1), "bn": FILL.fill(nn.BatchNorm2d(1 if kind == "select" else 3))}
    plan, _ = folded_exactly(Net(run, parts), data(2, 4, 5, 5))
    assert [skip.reason for skip in plan.skips] == [Reason.OUTPUT_USED_ELSEWHERE]


@pytest.mark.parametrize("both", [True, False])
def test_a_map_is_taken_in_by_no_layer_that_reads_it_as_its_weight(*, both: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return nn.functional.linear(y if both else x, y)

    plan, _ = folded_exactly(Net(run, {"bn": FILL.fill(nn.BatchNorm1d(4))}), data(2, 4))
    (skip,) = plan.skips
    assert "a weight of linear depends on the data" in skip.detail


def affine(scale: list[float], shift: list[float]) -> Affine:
    numbers = (torch.tensor(n, dtype=torch.float64).reshape(1, -1, 1) for n in (scale, shift))
    return Affine(*numbers, ("bn", "bn"))


def test_every_way_to_choose_is_tried_once_the_last_choice_first() -> None:
    """A choice among two, and one among three that is met only behind the first of those."""
    choices, seen = Choices(), list[tuple[int, ...]]()
    while True:
        choices.restart()
        first = choices.choose(2)
        seen.append((first,) if first else (first, choices.choose(3)))
        if not choices.next():
            break
    assert seen == [(0, 0), (0, 1), (0, 2), (1,)]


def test_what_undoing_a_map_magnifies_is_that_of_its_worst_channel() -> None:
    assert condition(identity(3)) == 4.0
    assert condition(affine([2.0], [1.0])) == (1 + 2 + 1) * (1 + 1 / 2 + 1 / 2)
    assert condition(affine([-2.0, 1.0], [-1.0, 0.0])) == 8.0
    assert condition(affine([0.0, 1.0], [0.0, 0.0])) == float("inf")


def test_a_map_has_the_sizes_of_its_value_or_one() -> None:
    require_fit(Value(0, (2, 3, 4)), affine([1.0, 2.0, 3.0], [0.0] * 3))
    require_fit(Value(0, (2, 3, 4)), affine([2.0], [0.0]))
    for shape in ((2, 2, 4), (2, 3), (3,), (1, 2, 3, 4)):
        with pytest.raises(Refused) as caught:
            require_fit(Value(0, shape), affine([1.0, 2.0, 3.0], [0.0] * 3))
        assert caught.value.reason is Reason.AXIS_MISMATCH
