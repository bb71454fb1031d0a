"""What several laws need, on a graph of a few ops made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bntool.core.reasons import Reason
from bntool.graph.affine import identity
from bntool.laws.base import (
    LAWS,
    Refused,
    along,
    constant_operand,
    constant_over,
    identities,
    no_shift,
    non_negative,
    of_input,
    only_input,
    variable_roles,
)
from tests.laws.by_hand import Seen, affine

NAN = float("nan")


UNKNOWN = torch.zeros(0)
"""A constant whose numbers are not known."""


def test_the_roles_that_depend_on_the_data_leave_out_what_is_written_to() -> None:
    seen = Seen(input=None, other=torch.ones(3), third=None, out=None, out_1=None)
    assert variable_roles(seen, seen.op) == ["input", "third"]
    assert seen.op.reads == ["input", "other", "third"]
    assert seen.op.writes == ["out", "out_1"]
    assert Seen(input=None, other=None).op.writes == ["input"]


def test_one_input_alone_may_depend_on_the_data() -> None:
    seen = Seen(input=None, weight=torch.ones(3), out=None)
    assert only_input(seen, seen.op) is seen.graph.values[0]
    seen = Seen(input=None, weight=None)
    with pytest.raises(Refused, match="mul in here has a second input") as caught:
        only_input(seen, seen.op)
    assert caught.value.reason is Reason.UNKNOWN_OP


def test_the_map_of_the_input_is_refused_beside_any_other() -> None:
    seen = Seen(input=None, weight=None)
    mine = affine([1.0, 2.0, 3.0])
    assert of_input(seen.op, {"input": mine}) is mine
    for maps in ({"weight": mine}, {"input": mine, "weight": mine}):
        with pytest.raises(Refused, match="computes with its weight") as caught:
            of_input(seen.op, maps)
        assert caught.value.reason is Reason.NONLINEAR


def test_a_map_has_the_rank_of_its_value() -> None:
    mine = affine([1.0, 2.0])
    assert along(mine, 3, "it") is mine
    for rank in (2, 4):
        with pytest.raises(Refused, match=f"the map has 3 axes, it has {rank}"):
            along(mine, rank, "it")


def test_a_map_that_varies_nowhere_has_size_one() -> None:
    same = affine([2.0, NAN, 2.0], [1.0, 1.0, NAN])
    found = constant_over(same, [0, 1], "it")
    assert (tuple(found.scale.shape), float(found.scale), float(found.shift)) == ((1, 1, 1), 2.0, 1.0)
    untouched = affine([2.0, 3.0])
    assert constant_over(untouched, [0, 2], "it") is untouched
    for varies in (affine([2.0, 3.0]), affine([2.0, 2.0], [0.0, 1.0]), affine([NAN, 2.0, 3.0])):
        with pytest.raises(Refused, match="varies along axis 1, which it mixes"):
            constant_over(varies, [0, 1], "it")


def test_no_scale_below_zero_where_the_order_counts() -> None:
    non_negative(affine([0.0, 1.0, NAN]), "it")
    with pytest.raises(Refused, match="2 of 4 channels have γ < 0 at it") as caught:
        non_negative(affine([-1.0, -0.5, 0.0, NAN]), "it")
    assert caught.value.reason is Reason.NEGATIVE_SCALE


def test_no_shift_where_it_would_be_lost() -> None:
    no_shift(affine([2.0, 3.0], [0.0, NAN]), Reason.NONLINEAR, "it")
    with pytest.raises(Refused, match="nonlinear: it"):
        no_shift(affine([1.0, 1.0], [0.0, 1e-300]), Reason.NONLINEAR, "it")


def test_a_number_is_the_operand_whatever_else_there_is() -> None:
    seen = Seen({"number": 0.0}, input=None)
    found = constant_operand(seen, seen.op, "input")
    assert (found.tensor.tolist(), tuple(found.tensor.shape)) == ([[[0.0]]], (1, 1, 1))
    assert found.literal == ("number", (0.0,), (1, 1, 1))


def test_a_constant_is_shaped_for_the_output() -> None:
    for role, other in (("input", "other"), ("other", "input")):
        seen = Seen(**{role: None, other: torch.tensor([[1.0], [2.0], [3.0]]), "out": None})
        found = constant_operand(seen, seen.op, role)
        assert found.tensor.dtype is torch.float64
        assert found.tensor.tolist() == [[[1.0], [2.0], [3.0]]]


@pytest.mark.parametrize(
    "inputs",
    [
        {"input": None},
        {"input": None, "other": None},
        {"input": None, "other": UNKNOWN},
        {"input": None, "other": torch.ones(1), "third": torch.ones(1)},
        {"input": None, "other": torch.ones(1, dtype=torch.complex64)},
        {"input": None, "other": torch.ones((1 << 16) + 1)},
    ],
)
def test_what_is_no_known_factor(inputs: dict[str, Tensor | None]) -> None:
    seen = Seen({"number": None}, **inputs)
    with pytest.raises(Refused, match="not a known factor") as caught:
        constant_operand(seen, seen.op, "input")
    assert caught.value.reason is Reason.UNKNOWN_OP


def test_the_largest_constant_that_is_read() -> None:
    seen = Seen(input=None, other=torch.ones(1 << 16))
    assert constant_operand(seen, seen.op, "input").tensor.numel() == 65536


def test_an_output_that_nobody_asked_about_stays_as_it_is() -> None:
    seen = Seen(input=None, outputs=3)
    mine = affine([2.0, 3.0, 4.0])
    found = identities(seen, seen.op, {1: mine})
    assert found[1] is mine
    assert [found[0], found[2]] == [identity(3), identity(3)]


def test_every_kind_has_a_way_up_and_a_way_down() -> None:
    assert {"add", "mul", "relu", "reshape", "concat", "avg_pool", "product"} <= LAWS.keys()
    for up, down in LAWS.values():
        assert callable(up)
        assert callable(down)
        assert up is not down
