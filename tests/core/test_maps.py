"""Affine maps as data: judged without computing them, and what passes computes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from bntool.core import maps
from bntool.core.maps import Allowance, nested_tuples, shape_of
from bntool.core.schema import Damaged
from bntool.graph import steps

TENSORS = {"w": torch.rand(8), "plane": torch.rand(8, 1, 1)}
BN = ["bn", "bn1"]
PLACED = ["place", BN, 4, 1]


def _shape(kind: str, name: str) -> tuple[int, ...]:
    if kind == "bn" and name == "bn1":
        return (8,)
    if kind == "tensor" and name in TENSORS:
        return tuple(TENSORS[name].shape)
    raise Damaged(f"there is no {name!r}")


def _leaf(kind: str, name: str) -> Any:
    return TENSORS[name] if kind == "tensor" else (torch.rand(8), torch.rand(8))


def test_every_step_that_computes_is_judged_and_no_other() -> None:
    assert maps._STEPS.keys() == steps.PRIMITIVES.keys()


@pytest.mark.parametrize(
    "expr",
    [
        BN,
        PLACED,
        ["place", BN, 3, -1],
        ["identity", 3],
        ["scale_part", BN],
        ["shift_part", PLACED],
        ["unscaled_shift", PLACED],
        ["fill", ["embed", BN, 0, 20, 2, 18, 2]],
        ["embed", ["identity", 2], 1, 5, 0, 3, 1],
        ["reshape", PLACED, [1, 8, 3, 3], [1, 72]],
        ["reshape", BN, [2, 8], [16]],
        ["collapse", PLACED, 1],
        ["permute", PLACED, [0, 2, 3, 1]],
        ["slice", PLACED, 1, 2, None, 3],
        ["slice", PLACED, 1, -3, 9223372036854775807, 1],
        ["take", BN, 0, [7, 0, 0]],
        ["put", ["take", BN, 0, [0, 1]], 0, 5, [4, 4]],
        ["divide_shift", PLACED, ["tensor", "w", [1, 8, 1, 1]]],
        ["multiply_shift", PLACED, ["number", [0.5], [1, 1, 1, 1]]],
        ["before_add", PLACED, ["tensor", "plane", [1, 8, 1, 1]], 1.0],
        ["after_add", ["identity", 4], ["tensor", "plane", [1, 8, 1, 1]], -1.0],
        ["times", PLACED, ["number", [2.0, 3.0], [1, 1, 2, 1]], -1],
        ["plus", PLACED, ["tensor", "w", [1, 8, 1, 1]], 2],
        ["compose", PLACED, ["identity", 4]],
        ["merge", PLACED, PLACED],
        ["add", PLACED, ["shift_part", ["identity", 4]]],
        ["concat", 1, [8, 4, 8], PLACED, ["identity", 4], PLACED],
    ],
    ids=str,
)
def test_what_passes_computes_the_shape_that_was_told(expr: Any) -> None:
    expr = nested_tuples(expr)
    shape = shape_of(expr, _shape, Allowance(1000))
    pair = steps.evaluate(expr, _leaf)
    assert [tuple(part.shape) for part in pair] == [shape, shape]
    assert all(isinstance(part, Tensor) for part in pair)


@pytest.mark.parametrize(
    "expr",
    [
        [], "bn", 3, None, {}, [[]], [1], [["bn"], "bn1"],
        ["bn"], ["bn", 3], ["bn", "nope"], ["bn", "bn1", "bn1"], ["no_step", BN], ["no_step"], ["slice"],
        ["identity", -1], ["identity", 8 * 10**7], ["identity", True], ["identity", "2"],
        ["compose", BN], ["compose", BN, BN, BN], ["add", BN, ["take", BN, 0, [0, 1]]],
        ["place", PLACED, 4, 1], ["place", BN, 4, 4], ["place", BN, 10**9, 1], ["place", BN, 0, 0],
        ["scale_part", BN, 1], ["reshape", BN, [3, 7], [21]], ["reshape", BN, [2, 8], [15]],
        ["reshape", BN, [8], [-1]], ["reshape", ["identity", 1], [10**9, 10**9], [10**9, 10**9]],
        ["collapse", BN, 1], ["collapse", ["slice", BN, 0, 0, 0, 1], 0], ["permute", PLACED, [0, 1, 2]],
        ["permute", PLACED, [0, 1, 2, 2]], ["slice", BN, 0, 0, 8, 0], ["slice", BN, 0, 0, 8, -1],
        ["slice", BN, 0, 0], ["embed", BN, 0, 10**13, 0, 1, 1], ["embed", BN, 0, 16, 0, 9, 1],
        ["embed", BN, 0, 2**31, 0, 8, 1], ["take", BN, 0, [8]], ["take", BN, 0, [-1]], ["take", BN, 0, "01"],
        ["put", BN, 0, 16, [0]], ["put", BN, 0, 4, list(range(8))],
        ["times", BN, ["tensor", "w", [8]], 2], ["times", BN, ["tensor", "w", [8]], 10**9],
        ["times", BN, 3, 1], ["times", BN, ["tensor", "nope", [8]], 1],
        ["times", BN, ["tensor", "w", [9]], 1],
        ["times", BN, ["number", [1.0], [2]], 1], ["times", BN, ["number", [None], [1]], 1],
        ["times", BN, ["number", ["1"], [1]], 1], ["times", BN, ["number", [1.0] * 3, [3]], 1],
        ["plus", BN, ["tensor", "w", [8]]], ["plus", BN, ["tensor", "w", [8]], "1"],
        ["concat", 0, [8]], ["concat", 0, [8, 8], BN], ["concat", 0, [9], BN], ["concat", 1, [8], BN],
        ["concat", 0, [8, 1], BN, PLACED], ["concat", 0, [2**31, 2**31], ["identity", 1], ["identity", 1]],
    ],
    ids=lambda expr: str(expr)[:60],
)  # fmt: skip
def test_what_would_not_compute_is_refused(expr: Any) -> None:
    with pytest.raises(Damaged) as caught:
        shape_of(nested_tuples(expr), _shape, Allowance(1000))
    assert caught.value.why


def test_a_map_nested_beyond_all_use_is_refused() -> None:
    expr: Any = BN
    for _ in range(100_000):
        expr = ["fill", expr]
    with pytest.raises(Damaged, match="nested too deeply"):
        nested_tuples(expr)


def test_repeats_that_multiply_are_refused_before_they_are_computed() -> None:
    expr: Any = ["identity", 1]
    for turn in range(40):
        expr = ["concat", 0, [1, 1], ["slice", expr, 0, 0, 1, 1], ["identity", 1]]
        expr = ["reshape", expr, [2**30, 2], [2**31]] if turn % 8 == 7 else expr
    with pytest.raises(Damaged, match="more numbers than a model of 1,000"):
        shape_of(nested_tuples(expr), _shape, Allowance(1000))


def test_many_small_maps_cost_their_calls() -> None:
    allowance, started = Allowance(1000), time.monotonic()
    maps_of_a_plan = (shape_of(("bn", "bn1"), _shape, allowance) for _ in range(10**6))
    with pytest.raises(Damaged, match="more numbers"):
        list(maps_of_a_plan)
    assert time.monotonic() - started < 2
